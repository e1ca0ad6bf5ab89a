"""Makes a run obey a schedule: freezes and thaws between steps, and keeps what was measured through a resume."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from hft.errors import HFTError
from hft.machine import is_sharded, world_size
from hft.methods import smartfrz
from hft.methods.schedule import (
    ScheduleConfig,
    from_row,
    interval_at,
    mean_fraction,
    next_start,
    of_layers,
    outside,
    share,
    to_row,
    trained_at,
)
from hft.selection import Selection


def prepare(args: TrainingArguments) -> None:
    """Make a trainer's settings bear parameters that are frozen and thawed while it runs.

    DDP takes its buckets from what trains when it wraps the model, which is everything, since a schedule freezes only
    at the first step. A frozen parameter is then an unused one, which DDP must be told to look for; Trainer tells it
    so only without gradient checkpointing.

    Raises:
        HFTError: the settings cannot be reconciled with a schedule.
    """
    if is_sharded(args):
        raise HFTError(
            "a schedule is untested under FSDP, where a resume would make optimizer state for frozen parameters too; "
            "use one GPU (make's NUM_GPUS=1), or recipes/accelerate/ddp.yaml"
        )
    if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise HFTError("reentrant gradient checkpointing loses gradients under a schedule; set use_reentrant: false")
    if args.fp16:
        raise HFTError("a schedule is untested with fp16, whose scaler skips steps; set bf16")
    if args.restore_callback_states_from_checkpoint:
        raise HFTError("a schedule restores its own state; remove restore_callback_states_from_checkpoint")
    args.ddp_find_unused_parameters = True


class Schedule(TrainerCallback, ExportableState):
    """Freezes and thaws parameters at the steps where the schedule switches.

    The first freeze comes with the first step, when the optimizer already holds every parameter: an optimizer built
    after it would leave the frozen ones out for good. A parameter that freezes loses its gradient, since optimizers
    skip only parameters without one, whatever `requires_grad` says, and by default its optimizer state.

    Attributes:
        history: the stages so far, as `hft.methods.schedule.to_row` writes them.
        measured: what a measuring schedule has measured and decided so far.
        steps: steps of the whole run, once it has begun.
    """

    def __init__(self, selection: Selection, config: ScheduleConfig):
        self.selection = selection
        self.config = config
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self.measured: dict[str, Any] = {}
        self._outside = outside(selection)
        self._scheduled = {name for unit in selection.anatomy.units for name in unit.parameters}.union(self._outside)
        self._trained: frozenset[str] | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint's trainer state holds of the schedule."""
        return {"args": {}, "attributes": {"steps": self.steps, "history": self.history, "measured": self.measured}}

    def record(self, step: int) -> dict[str, Any]:
        """What the manifest holds besides the config: stages so far, and the trainable fractions over them.

        Args:
            step: how many steps have been taken.
        """
        if not self.history:
            return {}
        begun = [from_row(self.selection, row) for row in self.history]
        first, last = (share(self.selection.anatomy.units, begun[index][1]) for index in (0, -1))
        shares = {"first": first, "last": last, "mean": mean_fraction(self.selection, begun, step)}
        return {"steps": self.steps, "shares": shares, "history": self.history}

    def ever_trained(self) -> frozenset[str]:
        """Names of the units, and of the parameters outside the layers, that have trained at some step."""
        return frozenset().union(*(from_row(self.selection, row)[1] for row in self.history))

    def on_train_begin(self, args, state, control, **kwargs):
        """Take up what the checkpoint knows of the schedule, if there is one.

        Raises:
            HFTError: the checkpoint's run was to take another number of steps, where intervals hang on it.
        """
        saved = state.stateful_callbacks[type(self).__name__]["attributes"] if state.global_step else {}
        if saved and self.config.intervals and saved["steps"] != state.max_steps:
            raise HFTError(
                f"cannot resume: schedule {self.config.schedule} was laid out over {saved['steps']} steps, not "
                f"{state.max_steps}; give the same number, another --output_dir, or --resume_from_checkpoint none"
            )
        self.history, self.measured = saved.get("history", []), saved.get("measured", {})
        self.steps, self._trained = state.max_steps, None

    def on_step_begin(self, args, state, control, *, model, optimizer, **kwargs):
        """Freeze and thaw what the schedule says for the coming step."""
        step, trained = state.global_step, self.trained_at(state.global_step, model)
        if not self.history or trained != from_row(self.selection, self.history[-1])[1]:
            self.history.append(to_row(self.selection, step, trained))
        switches = step % self.config.switch_every == 0 if self.config.switch_every else False
        if switches or trained != self._trained:
            self._trained = trained
            self.enforce(model, optimizer, clear=switches and self.config.schedule == "badam")

    def trained_at(self, step: int, model: nn.Module) -> frozenset[str]:
        """What trains at a step; measuring schedules decide it at the first step of an interval."""
        if self.config.schedule == "autofreeze":
            return self._autofreeze(interval_at(self.config, self.steps, step))
        if self.config.schedule == "smartfrz":
            return self._smartfrz(step, model)
        return trained_at(self.selection, self.config, self.steps, step)

    def enforce(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, clear: bool) -> None:
        """Set `requires_grad` of every scheduled parameter, and see to the gradients and states of the frozen ones.

        Args:
            model: the model, not wrapped.
            optimizer: holds all scheduled parameters, whether or not they train now.
            clear: delete the state of every parameter, that of the trained ones too.
        """
        units = [unit for unit in self.selection.anatomy.units if unit.name in self._trained]
        names = {name for unit in units for name in unit.parameters}.union(self._trained.intersection(self._outside))
        for name, parameter in model.named_parameters():
            if name not in self._scheduled:
                continue
            trains = name in names
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None
            if clear or (not trains and self.config.optimizer_state in (None, "reset")):
                optimizer.state.pop(parameter, None)
            elif self.config.optimizer_state == "offload":
                move(optimizer.state.get(parameter, {}), parameter.device if trains else torch.device("cpu"))

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        """Measure the gradient as the optimizer gets it: of all micro-batches and processes, and clipped."""
        if self.config.schedule == "autofreeze":
            parameters = dict(model.named_parameters())
            for layer in range(self.measured["start"], self.selection.anatomy.num_layers):
                units = self.selection.anatomy.layer(layer)
                gradients = [parameters[name].grad for unit in units for name in unit.parameters]
                norms = [torch.linalg.vector_norm(gradient, 1) for gradient in gradients if gradient is not None]
                self.measured["sums"][layer] += float(torch.stack(norms).sum()) if norms else 0.0
            self.measured["steps"] += 1

    def _autofreeze(self, interval: int) -> frozenset[str]:
        """All but the first layers, and with them the input embeddings: only then does the backward pass end early.

        The paper takes the L1 norm of the gradient summed over an interval, which needs another gradient's memory.
        Here the L1 norms of each step are averaged, which needs one number a layer; and where the original builds the
        optimizer anew, here the layers that go on training keep their moments. A head that is tied to the embeddings
        freezes with them.
        """
        layers = self.selection.anatomy.num_layers
        seen = self.measured
        if not seen:
            seen.update(start=0, means=None)
        elif interval != seen["interval"]:
            means = [total / seen["steps"] for total in seen["sums"]]
            if seen["means"] is not None:
                seen["start"] = broadcast_decision(
                    next_start(seen["means"], means, seen["start"], self.config.percentile)
                )
            seen["means"] = means
        if interval != seen.get("interval"):
            seen.update(interval=interval, steps=0, sums=[0.0] * layers)
        return of_layers(self.selection, range(seen["start"], layers)).union(self._ends(frozen=seen["start"] > 0))

    def _smartfrz(self, step: int, model: nn.Module) -> frozenset[str]:
        """All but the layers that the predictor of `hft.methods.smartfrz` has frozen, wherever they are.

        Ours: the input embeddings freeze with the first layer, as under AutoFreeze.
        """
        layers, seen = range(self.selection.anatomy.num_layers), self.measured
        if not seen:
            seen.update(interval=0, frozen=[], windows=[[] for _ in layers], largest=[0.0 for _ in layers])
        recordings = self.config.intervals * smartfrz.RECORDINGS
        if step == 0 or step * recordings // self.steps != (step - 1) * recordings // self.steps:
            parameters = dict(model.named_parameters())
            for layer in set(layers).difference(seen["frozen"]):
                window = seen["windows"][layer]
                window.append(smartfrz.sample(parameters, self.selection.anatomy.layer(layer)))
                del window[: -smartfrz.WINDOW]
                moved = smartfrz.step_norms(torch.tensor(window[-2:])).tolist()
                seen["largest"][layer] = max([seen["largest"][layer], *moved])
        interval = interval_at(self.config, self.steps, step)
        if interval != seen["interval"]:
            seen["interval"] = interval
            windows = {layer: seen["windows"][layer] for layer in layers if layer not in seen["frozen"]}
            found = broadcast_decision(smartfrz.layers_to_freeze(windows, dict(enumerate(seen["largest"]))))
            seen["frozen"] = sorted([*seen["frozen"], *found])
            seen["windows"] = [[] if layer in seen["frozen"] else seen["windows"][layer] for layer in layers]
        active = set(layers).difference(seen["frozen"])
        return of_layers(self.selection, active).union(self._ends(frozen=0 not in active))

    def _ends(self, *, frozen: bool) -> list[str]:
        """What trains outside the layers, with or without the input embeddings."""
        first = next(iter(self.selection.anatomy.embeddings))  # in model order, so that of the input
        return [name for name in self._outside if not (frozen and name == first)]


def broadcast_decision(decision: Any) -> Any:
    """The first process's decision: others may have rounded what it hangs on otherwise."""
    return broadcast_object_list([decision])[0] if world_size() > 1 else decision


def move(state: dict[str, Any], device: torch.device) -> None:
    """Move one parameter's optimizer state to a device, in place; step counters, which are scalars, stay."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim():
            state[key] = value.to(device)
