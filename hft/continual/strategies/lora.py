"""LoraSeqFT: one adapter learns all tasks, one after another, on a base that never changes (paper section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hft.errors import HFTError
from hft.methods.strategy import Strategy

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback


@dataclass
class LoraSeqFT(Strategy):
    """Each round starts with the adapter of the round before. Nothing is merged in between, as in TRACE's code."""

    name: ClassVar[str] = "lora"
    acts_on_steps: ClassVar[bool] = True
    takes_adapter: ClassVar[bool] = True

    def callbacks(self, trainer: Trainer) -> list[TrainerCallback]:
        from peft import load_peft_weights, set_peft_model_state_dict

        if self.previous_run:
            if not (Path(self.previous_run) / "adapter_config.json").exists():
                raise HFTError(f"strategy lora: {self.previous_run} holds no adapter to start from")
            set_peft_model_state_dict(trainer.model, load_peft_weights(self.previous_run, device="cpu"))
        return super().callbacks(trainer)
