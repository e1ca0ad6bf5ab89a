"""Rows to train and evaluate on: loaded, checked one by one, and checked again as TRL prepared them."""

from hft.data.loading import LoadedData, fingerprint, load_data, load_split
from hft.data.rows import preference_rows, sft_rows

__all__ = ["LoadedData", "fingerprint", "load_data", "load_split", "preference_rows", "sft_rows"]
