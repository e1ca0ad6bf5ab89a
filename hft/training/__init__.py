"""The thin trainers."""

from hft.training.dpo import HFTDPOTrainer
from hft.training.sft import HFTSFTTrainer

__all__ = ["HFTDPOTrainer", "HFTSFTTrainer"]
