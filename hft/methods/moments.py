"""Carries the state of an optimizer from one run to the next, by parameter name."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hft.freezing import sharded_like, whole
from hft.machine import is_main
from hft.parts import TrainsInPart, checkpoint_name, parts_of

MOMENTS_NAME = "moments.safetensors"


class CarryMoments(TrainerCallback):
    """Starts a run with the optimizer state of the run before, and leaves its own in the run's folder.

    What is frozen in this run, parameters and elements of them, keeps the state that it had; a parameter that never
    trained starts with none, and so do all if the folder of the run before holds none. TRACE's code has one optimizer
    for all tasks, which is the same where everything trains.
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
        for name, parameter, part in _trained(model):
            for key, value in self.states.get(name, {}).items():
                trained = part.take(value.to(parameter.device)) if part and value.dim() else value
                count = value.to(parameter.device if counts_on_device else "cpu", copy=True)
                optimizer.state[parameter][key] = sharded_like(trained, parameter) if value.dim() else count

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        for name, parameter, part in _trained(model):
            before = self.states.pop(name, {})
            now = {key: value for key, value in optimizer.state.get(parameter, {}).items() if torch.is_tensor(value)}
            now = {key: whole(value.detach()) for key, value in now.items()}
            for key, value in now.items() if part else ():
                if value.dim():  # the frozen elements keep what they had
                    start = before.get(key, torch.zeros(part.shape, dtype=value.dtype))
                    now[key] = part.put(start.to(value.device), value)
            self.states[name] = {key: value.cpu().contiguous() for key, value in now.items()}
        if is_main():
            flat = {f"{name}|{key}": value for name, kept in self.states.items() for key, value in kept.items()}
            save_file(flat, Path(args.output_dir) / MOMENTS_NAME)


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter, TrainsInPart | None]]:
    """The trained parameters by the checkpoint's names, and how those that train in part are put together."""
    parts = {part.original1: part[0] for part in parts_of(model).values()}
    return [(checkpoint_name(name), p, parts.get(p)) for name, p in model.named_parameters() if p.requires_grad]
