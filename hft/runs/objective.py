"""What a model is trained on: the pieces in which SFT and DPO differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trl import DPOConfig, SFTConfig

OBJECTIVES = ("sft", "dpo")


def config_class(objective: str) -> type:
    """TRL's config of an objective."""
    return DPOConfig if objective == "dpo" else SFTConfig


def trainer_class(objective: str, *, adapter: bool) -> type:
    """Our trainer of an objective, or that of the methods that train an adapter."""
    from hft import training

    if adapter:
        return training.AdapterDPOTrainer if objective == "dpo" else training.AdapterSFTTrainer
    return training.HFTDPOTrainer if objective == "dpo" else training.HFTSFTTrainer


def rows_of(objective: str) -> Callable[..., Any]:
    """The function that checks a dataset's rows and brings them into the form that the trainer takes."""
    from hft import data

    return data.preference_rows if objective == "dpo" else data.sft_rows


def in_pairs(objective: str) -> bool:
    """Whether rows are pairs of answers, compared with a reference model."""
    return objective == "dpo"
