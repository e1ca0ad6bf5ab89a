"""What holds a run to its plan, whatever the engine and TRL make of it."""

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hft.errors import HFTError
from hft.freezing import check_frozen
from hft.methods import steps_elsewhere
from hft.model.anatomy import layers_of
from hft.parts import checkpoint_name
from hft.selection import Selection


class HoldToPlan(TrainerCallback):
    """Refuses to train otherwise than planned, once the engine has prepared everything: every engine has its own ways.

    What trains is held in fp32 or wider, the rest at least as wide as on disk. Under a schedule there is no `selection`
    that says what requires a gradient. `acts`: whether anything acts around the step.
    """

    def __init__(self, trainer: Trainer, selection: Selection | None, dtypes: dict[str, torch.dtype], *, acts: bool):
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
                why = f"{name} should be held in {planned} and the engine has made it {parameter.dtype}"
                raise HFTError(f"{why}; launch with hft's own configs, and with an accelerate that hft allows")
        if not self.flat:
            self.check_optimizer(args, model, getattr(optimizer, "optimizer", optimizer))
        rows = None if self.own_loader else train_dataloader.total_batch_size * args.gradient_accumulation_steps
        if rows not in (None, self.rows):
            raise HFTError(f"a step takes {rows} rows, but {self.rows} are planned; did something change the batch?")

    def on_epoch_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.eval()  # if it is schedule-free, before the best checkpoint is loaded over its weights

    def check_optimizer(self, args, model, optimizer) -> None:
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p not in held]
        if missing and (self.acts or not steps_elsewhere(args)):
            raise HFTError(f"{missing[0]} should train, but the optimizer lacks it; give it all trained parameters")
        if self.acts and callable(getattr(optimizer, "eval", None)):
            why = f"{type(optimizer).__name__} keeps its own copy of the weights, which the method cannot reach"
            raise HFTError(f"{why}; set optim to adamw_torch")


class CheckpointedLayers(TrainerCallback):
    """Keeps which layers are checkpointed: the first `count`, by default those that Trainer chose.

    TRL (1.16) switches checkpointing off while a reference computes or a model generates, and on again in every layer,
    without `offload`, and with keys that torch does not know, so that the next step would fail.
    """

    def __init__(self, count: int | None = None):
        self.count = count

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.count is not None:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model  # without PEFT's adapter
            for index, layer in enumerate(layers_of(base)[1]):
                layer.gradient_checkpointing = index < self.count
        switched_off: list[nn.Module] = []

        def switch_off() -> None:
            switched_off[:] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
            for module in switched_off:
                module.gradient_checkpointing = False

        def switch_on(*args, **kwargs) -> None:
            for module in switched_off:
                module.gradient_checkpointing = True

        model.gradient_checkpointing_disable, model.gradient_checkpointing_enable = switch_off, switch_on
