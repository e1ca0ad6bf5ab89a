"""The thin trainers."""

from transformers import Trainer

from hft.training.adapters import AdapterDPOTrainer, AdapterSFTTrainer
from hft.training.dpo import HFTDPOTrainer
from hft.training.sft import HFTSFTTrainer


def half(trainer: type[Trainer]) -> type[Trainer]:
    """The class that half fine-tunes what a trainer of TRL's trains."""
    return next(cls for cls in (HFTSFTTrainer, HFTDPOTrainer) if issubclass(cls, trainer))


def with_adapter(trainer: type[Trainer]) -> type[Trainer]:
    """The class that trains an adapter as a trainer of TRL's does."""
    return next(cls for cls in (AdapterSFTTrainer, AdapterDPOTrainer) if issubclass(cls, trainer))


__all__ = ["AdapterDPOTrainer", "AdapterSFTTrainer", "HFTDPOTrainer", "HFTSFTTrainer", "half", "with_adapter"]
