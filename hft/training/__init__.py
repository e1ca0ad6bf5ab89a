"""The thin trainers."""

from hft.training.sft import HFTSFTTrainer

__all__ = ["HFTSFTTrainer"]
