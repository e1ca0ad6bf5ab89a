"""The thin trainers."""

from hft.training.adapters import AdapterDPOTrainer, AdapterSFTTrainer
from hft.training.dpo import HFTDPOTrainer
from hft.training.sft import HFTSFTTrainer

__all__ = ["AdapterDPOTrainer", "AdapterSFTTrainer", "HFTDPOTrainer", "HFTSFTTrainer"]
