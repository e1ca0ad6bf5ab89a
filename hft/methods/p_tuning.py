"""P-tuning (arXiv 2103.10385): trained vectors before each prompt, made by a small MLP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hft.methods.adapter import Adapter


@dataclass
class PTuning(Adapter):
    """A learned prompt."""

    name: ClassVar[str] = "p-tuning"
    description: ClassVar[str] = "trained vectors before the prompt, made by an MLP; SFT only"
    learns_prompt: ClassVar[bool] = True
    reloads: ClassVar[bool] = False  # PEFT puts the encoder's output where its input belongs
    peft_names: ClassVar[dict[str, str]] = {
        "num_virtual_tokens": "num_virtual_tokens",
        "encoder_hidden_size": "encoder_hidden_size",
    }

    num_virtual_tokens: int | None = field(default=None, metadata={"help": "Length of the prompt or prefix."})
    encoder_hidden_size: int | None = field(default=None, metadata={"help": "Width of P-tuning's prompt encoder."})

    def peft_class(self):
        from peft import PromptEncoderConfig

        return PromptEncoderConfig

    def prepare_inputs(self, inputs: dict[str, Any]) -> None:
        # The first token would become the target of the last virtual one, and is not counted as a target.
        if "labels" in inputs:
            inputs["labels"] = inputs["labels"].index_fill(1, inputs["labels"].new_zeros(1), -100)


METHOD = PTuning
