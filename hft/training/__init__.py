"""TRL's trainers, half fine-tuned (`half`) or with an adapter (`with_adapter`)."""

import functools

from trl import DPOTrainer, SFTTrainer

from hft.training.adapters import AdapterTuning
from hft.training.mixin import HalfFineTuning

__all__ = ["HFTDPOTrainer", "HFTSFTTrainer", "HalfFineTuning", "half", "with_adapter"]


@functools.cache
def half(trainer: type) -> type:
    """A subclass of a trainer that half fine-tunes. The trainer may be any TRL trainer or your own subclass.

    It takes the trainer's own arguments, by name, and those of `HalfFineTuning`:

        trainer = hft.half(GRPOTrainer)("Qwen/Qwen3-0.6B", args, reward_funcs=reward, train_dataset=rows)
    """
    return extended(HalfFineTuning, trainer, f"HFT{trainer.__name__}")


@functools.cache
def with_adapter(trainer: type) -> type:
    """A subclass of a trainer that trains one of PEFT's adapters; it takes an `adapter` (`AdapterTuning`)."""
    return extended(AdapterTuning, trainer, f"Adapter{trainer.__name__}")


def extended(mixin: type, trainer: type, name: str) -> type:
    tags = [*getattr(trainer, "_tag_names", []), "hft"]
    doc = f"`{trainer.__name__}` with {mixin.__name__}."
    return type(name, (mixin, trainer), {"_tag_names": tags, "__doc__": doc, "__module__": __name__})


HFTSFTTrainer, HFTDPOTrainer = half(SFTTrainer), half(DPOTrainer)
