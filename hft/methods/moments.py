"""Carries the state of an optimizer from one run to the next, by parameter name."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hft.freezing import sharded_like, whole
from hft.machine import is_main

MOMENTS_NAME = "moments.safetensors"


class CarryMoments(TrainerCallback):
    """Starts a run with the optimizer state of the run before, and leaves its own in the run's folder.

    A parameter that is frozen in this run keeps the state that it had; one that never trained starts with none, and so
    do all if the folder of the run before holds none. TRACE's code has one optimizer for all tasks, which is the same
    where everything trains.
    """

    def __init__(self, previous: str):
        path = Path(previous, MOMENTS_NAME)
        self.states: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in (load_file(path) if path.exists() else {}).items():
            parameter, _, key = name.partition("|")
            self.states.setdefault(parameter, {})[key] = tensor

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step:  # the checkpoint has them
            return
        counts_on_device = optimizer.param_groups[0].get("fused")
        for name, parameter in _trained(model):
            for key, value in self.states.get(name, {}).items():
                count = value.to(parameter.device if counts_on_device else "cpu", copy=True)
                optimizer.state[parameter][key] = sharded_like(value, parameter) if value.dim() else count

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        for name, parameter in _trained(model):
            now = {key: value for key, value in optimizer.state.get(parameter, {}).items() if torch.is_tensor(value)}
            self.states[name] = {key: whole(value.detach()).cpu().contiguous() for key, value in now.items()}
        if is_main():
            flat = {f"{name}|{key}": value for name, kept in self.states.items() for key, value in kept.items()}
            save_file(flat, Path(args.output_dir) / MOMENTS_NAME)


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
