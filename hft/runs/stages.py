"""What a model can be trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from hft.data import preference_rows, sft_rows
from hft.training import AdapterDPOTrainer, AdapterSFTTrainer, HFTDPOTrainer, HFTSFTTrainer
from hft.training.recorded import Recorded


@dataclass(frozen=True)
class Stage:
    """What is trained on: the pieces in which one stage differs from another.

    Attributes:
        rows: brings a dataset, given with its name, into the form that the stage's trainer takes.
        pairs: whether rows are pairs of answers that are held against a reference model.
        adapter_class: the trainer of the methods that train an adapter.
    """

    name: str
    config_class: type[TrainingArguments]
    trainer_class: type[Recorded]
    rows: Callable[[Dataset, str], Dataset]
    pairs: bool
    adapter_class: type[Recorded]


STAGES = {
    "sft": Stage("sft", SFTConfig, HFTSFTTrainer, sft_rows, pairs=False, adapter_class=AdapterSFTTrainer),
    "dpo": Stage("dpo", DPOConfig, HFTDPOTrainer, preference_rows, pairs=True, adapter_class=AdapterDPOTrainer),
}
