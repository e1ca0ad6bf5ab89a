"""Rows to train and evaluate on: loaded, checked one by one, and checked again as TRL prepared them."""

from hft.data.loading import LoadedData, fingerprint, load_data, load_split
from hft.data.prepared import check_prepared, tokens_digest
from hft.data.rows import preference_rows, sft_rows
from hft.data.templates import refusals

__all__ = [
    "LoadedData",
    "check_prepared",
    "fingerprint",
    "load_data",
    "load_split",
    "preference_rows",
    "refusals",
    "sft_rows",
    "tokens_digest",
]
