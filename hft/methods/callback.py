"""Makes a run obey a schedule: freezes and unfreezes between steps, and keeps its state through a resume."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hft.errors import HFTError
from hft.methods import schedule as pure
from hft.selection import Selection


class ScheduleCallback(TrainerCallback, ExportableState):
    """Freezes and unfreezes parameters at the steps where a schedule switches.

    The first freeze comes with the first step, when the optimizer already holds every parameter. A parameter that
    freezes loses its gradient, since optimizers skip only parameters without one, and by default its optimizer state.
    """

    def __init__(self, selection: Selection, schedule: pure.Schedule):
        self.selection = selection
        self.schedule = schedule
        self.steps = 0  # of the whole run, once it has started
        self.history: list[dict[str, Any]] = []  # the phases so far, as `hft.methods.schedule.to_row` writes them
        self.measured: dict[str, Any] = {}  # and decided, by a schedule that measures
        self._scheduled = {*selection.anatomy.shapes, *pure.outside_layers(selection)}
        self._trained: frozenset[str] | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"steps": self.steps, "history": self.history, "measured": self.measured}}

    def record(self, step: int) -> dict[str, Any]:
        """What the manifest holds besides the config: the phases of the first `step` steps, and their fractions."""
        if not (history := [row for row in self.history if row["step"] < step]):
            return {}
        fractions = pure.fractions_of(self.selection, self._phases(history), step)
        return {"steps": self.steps, "fractions": fractions, "history": history}

    def ever_trained(self, step: int) -> frozenset[str]:
        """Names of the units, and of parameters outside the layers, that have trained in the first `step` steps."""
        return pure.trained_in(phase for phase in self._phases(self.history) if phase[0] < step)

    def have_state(self, history: list[dict[str, Any]]) -> set[str]:
        """Names of the parameters whose optimizer state a checkpoint holds, given the phases until then."""
        kept = history[-1:] if self.schedule.optimizer_state == "reset" else history
        return pure.parameters_of(self.selection, pure.trained_in(self._phases(kept)))

    def _phases(self, history: list[dict[str, Any]]) -> list[pure.Phase]:
        return [pure.from_row(self.selection, row) for row in history]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Let all that is scheduled require a gradient; restore what a checkpoint holds of the schedule."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name in self._scheduled)
        saved = state.stateful_callbacks[type(self).__name__]["attributes"] if state.global_step else {}
        if saved and hasattr(self.schedule, "intervals") and saved["steps"] != state.max_steps:
            steps = f"{saved['steps']} steps; this run has {state.max_steps}"
            remedy = "give the same number, another --output_dir, or --resume_from_checkpoint none"
            raise HFTError(f"cannot resume: schedule {self.schedule.name} was planned for {steps}; {remedy}")
        self.history, self.measured = saved.get("history", []), saved.get("measured", {})
        self.steps, self._trained = state.max_steps, None

    def on_step_begin(self, args, state, control, *, model, optimizer, **kwargs):
        schedule, steps, step = self.schedule, self.steps, state.global_step
        reshard(model)
        trained = schedule.decide(self.selection, step, steps, model, self.measured)
        if not self.history or trained != pure.from_row(self.selection, self.history[-1])[1]:
            self.history.append(pure.to_row(self.selection, step, trained))
        clear = schedule.clears_state and schedule.interval_at(steps, step) != schedule.interval_at(steps, step - 1)
        if self._trained is None:
            note_dtypes(model)
        if clear or trained != self._trained:
            self._trained = trained
            self.enforce(model, optimizer, clear=clear)

    def on_optimizer_step(self, args, state, control, *, model, **kwargs):
        """Let the schedule measure the gradient that the step has taken, whatever changed it before."""
        self.schedule.on_gradients(self.selection, model, self.measured)

    def enforce(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, clear: bool) -> None:
        """Set `requires_grad` of every scheduled parameter, and drop or move the states of the frozen ones.

        `clear` deletes the state of the trained ones too.
        """
        names, keep = pure.parameters_of(self.selection, self._trained), self.schedule.optimizer_state
        for name, parameter in model.named_parameters():
            if name not in self._scheduled:
                continue
            trains = name in names
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None
            if clear or (not trains and keep == "reset"):
                optimizer.state.pop(parameter, None)
            elif keep == "offload":
                move(optimizer.state.get(parameter, {}), parameter.device if trains else torch.device("cpu"))


def note_dtypes(model: nn.Module) -> None:
    """Let FSDP2 note the dtypes of all that trains in the run before any of it is frozen: in its first forward pass,
    from the parameters that require a gradient then. Others would get gradients in another dtype later.
    """
    if isinstance(model, FSDPModule):
        training = model.training
        with torch.no_grad():
            model.eval()(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
        model.train(training)
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Let a model name its sharded parameters, which FSDP2 may leave gathered after a pass without gradients."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def move(state: dict[str, Any], device: torch.device) -> None:
    """Move one parameter's optimizer state to a device, in place; step counters, which are 0-dimensional, stay."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim():
            state[key] = value.to(device)
