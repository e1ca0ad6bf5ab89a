"""Holds what the engine has made of a run against its plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import Trainer, TrainerCallback

from hft.errors import HFTError
from hft.freezing import check_frozen
from hft.methods import steps_elsewhere
from hft.parts import checkpoint_name
from hft.selection import Selection

if TYPE_CHECKING:
    from hft.training.base import ManifestMixin


class HoldToPlan(TrainerCallback):
    """Refuses to train otherwise than planned, once the engine has prepared everything: every engine has its own ways.

    A selection says what requires a gradient, unless a schedule changes that. Dtypes are those on disk: what trains is
    held in fp32 or wider, the rest at least as wide as it is stored. `acts`: whether anything acts around the step.
    """

    def __init__(
        self, trainer: ManifestMixin, selection: Selection | None, dtypes: dict[str, torch.dtype], *, acts: bool
    ):
        self.selection, self.dtypes, self.acts = selection, dtypes, acts
        self.flat = trainer.is_deepspeed_enabled  # which holds all parameters flat
        self.own_loader = type(trainer).get_train_dataloader is not Trainer.get_train_dataloader  # such as GRPO's
        self.rows = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        if self.selection is not None:
            check_frozen(model, self.selection)
        for name, parameter in model.named_parameters():
            stored = self.dtypes.get(checkpoint_name(name), parameter.dtype)
            planned = torch.promote_types(stored, torch.float32) if parameter.requires_grad else stored
            if torch.promote_types(parameter.dtype, planned) != parameter.dtype:
                raise HFTError(
                    f"{name} should be held in {planned} and the engine has made it {parameter.dtype}; launch with "
                    "hft's own configs, and with an accelerate that hft allows"
                )
        if not self.flat:
            self.check_optimizer(args, model, getattr(optimizer, "optimizer", optimizer))
        rows = None if self.own_loader else train_dataloader.total_batch_size * args.gradient_accumulation_steps
        if rows not in (None, self.rows):
            raise HFTError(f"a step would take {rows} rows, planned are {self.rows}; did something change the batch?")

    def on_epoch_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.eval()  # if it is schedule-free, before the best checkpoint is loaded over its weights

    def check_optimizer(self, args, model, optimizer) -> None:
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p not in held]
        if missing and (self.acts or not steps_elsewhere(args)):
            raise HFTError(f"{missing[0]} should train and the optimizer does not hold it; give it all that train")
        if self.acts and callable(getattr(optimizer, "eval", None)):
            raise HFTError(
                f"{type(optimizer).__name__} keeps the weights that it moves to itself, where the method does not "
                "reach them; set optim to adamw_torch"
            )
