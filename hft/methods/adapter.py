"""What an adapter is: parameters that PEFT adds to a model that is frozen whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from hft.config import option
from hft.errors import HFTError, reason
from hft.methods.part import MethodPart
from hft.model.anatomy import anatomy_of, meta_model
from hft.selection import Selection, SelectionConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, TrainerCallback, TrainingArguments

NOT_PEFTS = ("learning_rate_factor",)


@dataclass
class Adapter(MethodPart):
    """A PEFT adapter. Keys that are not given have PEFT's defaults.

    Attributes:
        peft_class: name of PEFT's config class.
        peft_names: PEFT's name of a key where it differs, or None where PEFT has none.
        learns_prompt: whether it puts a learned prompt before each row.
        keeps_checkpointing: whether it works with activation checkpointing.
        upcasts_base: whether the base may be upcast before the adapter is made.
        reloads: whether PEFT can load one of its checkpoints back into the model that trained it.
        matrix_bytes: bytes per element of the layers' matrices, if the base is quantized.
    """

    kind: ClassVar[str] = "adapter"
    shardable: ClassVar[bool] = False
    acts_around_step: ClassVar[bool] = False
    peft_class: ClassVar[str]
    peft_names: ClassVar[dict[str, str | None]] = {}
    learns_prompt: ClassVar[bool] = False
    keeps_checkpointing: ClassVar[bool] = True
    upcasts_base: ClassVar[bool] = True
    reloads: ClassVar[bool] = True
    matrix_bytes: ClassVar[float | None] = None

    learning_rate_factor: float = option(
        "The adapter's learning rate as a multiple of the recipe's; --learning_rate alone wins over both.",
        1.0,
        kw_only=True,
    )

    def peft_config(self, **more: Any) -> PeftConfig:
        """PEFT's config of this adapter."""
        import peft

        keys = {self.peft_names.get(key, key): value for key, value in self.given(NOT_PEFTS).items()}
        keys.pop(None, None)
        return getattr(peft, self.peft_class)(task_type="CAUSAL_LM", **keys, **more)

    def check_args(self, args: TrainingArguments, *, has_reference: bool = False) -> None:
        if args.load_best_model_at_end and not self.reloads:
            raise HFTError(f"{self.name} cannot load its best checkpoint again; remove load_best_model_at_end")
        if self.learns_prompt and has_reference:
            why = "its untrained prompt already moves the policy away from it"
            raise HFTError(f"{self.name} cannot train against a reference: {why}; use lora")
        if self.learns_prompt and (getattr(args, "packing", False) or getattr(args, "padding_free", False)):
            raise HFTError(f"{self.name} puts its prompt before each row, so rows cannot be packed; drop packing")

    def load_kwargs(self, args: TrainingArguments) -> dict[str, Any]:
        """What `from_pretrained` gets to load the base."""
        return {}

    def extra_loss(self, model: PeftModel) -> torch.Tensor | None:
        """A term that is added to the training loss."""
        return None

    def callbacks(self, model: PeftModel) -> list[TrainerCallback]:
        """What the trainer needs beside the adapter itself."""
        return []

    @contextmanager
    def saving_checkpoint(self, model: PeftModel) -> Iterator[None]:
        """Around PEFT's own saving of a checkpoint."""
        yield

    def state(self, model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
        """What an exact resume needs beside the trained parameters; names hold a `|`."""
        yield from ()

    def restore(self, model: PeftModel, saved: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""

    def footprint(self, model_config: PretrainedConfig) -> AdapterFootprint:
        """What it adds to a model, counted on one without storage; refuses settings that PEFT refuses."""
        from peft import get_peft_model

        base = meta_model(model_config)
        anatomy, buffers = anatomy_of(base), sum(buffer.numel() for buffer in base.buffers())
        try:
            model = get_peft_model(base, self.peft_config())
        except (ValueError, TypeError) as error:
            raise HFTError(f"{self.name}: {reason(error)}") from error
        freeze_ranknum(model)
        return AdapterFootprint(
            anatomy,
            SelectionConfig(policy="explicit", freeze=["*"], freeze_embeddings=True),
            trained_units=frozenset(),
            frozen_outside=frozenset(anatomy.others),
            adapter=self,
            added={name: p.numel() for name, p in model.named_parameters() if p.requires_grad},
            held=sum(buffer.numel() for buffer in model.buffers()) - buffers,
        )


@dataclass(frozen=True, kw_only=True)
class AdapterFootprint(Selection):
    """The selection that freezes a model whole, and what an adapter adds to it."""

    adapter: Adapter  # which one
    added: dict[str, int]  # elements of each trained parameter, by its name in the model that has the adapter
    held: int  # elements that the adapter holds without training them, in fp32

    @property
    def trained_parameters(self) -> list[str]:
        return list(self.added)

    @property
    def num_trained(self) -> int:
        return sum(self.added.values())

    def base_bytes(self, bytes_per_element: float) -> float:
        """Bytes of everything that is frozen, with that many per element where it is not quantized."""
        anatomy, matrix_bytes = self.anatomy, self.adapter.matrix_bytes or bytes_per_element
        matrices = sum(unit.numel for unit in anatomy.units if unit.block != "norm")
        in_fp32 = self.held, next(iter(anatomy.embeddings.values()))  # the input's: `hft.freezing.upcast`
        rest = anatomy.numel - matrices - in_fp32[1]
        return matrices * matrix_bytes + rest * bytes_per_element + 4 * sum(in_fp32)

    def record(self) -> dict[str, Any]:
        return self.adapter.record()

    def summary(self) -> str:
        settings = ", ".join(f"{key} {value}" for key, value in self.adapter.given(NOT_PEFTS).items())
        return (
            f"adapter {self.adapter.name}: {settings}; the model is frozen whole\n{self.num_trained:,} parameters "
            f"train, {self.fraction_of_model:.2%} of the model's {self.anatomy.numel:,}"
        )


def freeze_ranknum(model: nn.Module) -> None:
    """Freeze the number that AdaLoRA divides by: PEFT (0.21) lets it train, yet neither saves nor restores it."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
