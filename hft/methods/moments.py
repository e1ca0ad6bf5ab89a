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

    What is frozen in this run, parameters and elements of them, keeps the state that it had; what never trained starts
    with none. TRACE's code has one optimizer for all tasks, which is the same where everything trains.
    """

    def __init__(self, previous: str):
        path = Path(previous, MOMENTS_NAME)
        self.moments = load_file(path) if path.exists() else {}  # by `PARAMETER|KEY` of the optimizer's state

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step:  # the checkpoint has them
            return
        counts_on_device, trained = optimizer.param_groups[0].get("fused"), _trained(model)
        for name, value in self.moments.items():
            owner, _, key = name.partition("|")
            if owner in trained:
                parameter, part = trained[owner]
                moment = part.take(value.to(parameter.device)) if part and value.dim() else value
                count = value.to(parameter.device if counts_on_device else "cpu", copy=True)
                optimizer.state[parameter][key] = sharded_like(moment, parameter) if value.dim() else count

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        for owner, (parameter, part) in _trained(model).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value):
                    name, moment = f"{owner}|{key}", whole(value.detach())
                    if part and value.dim():  # the frozen elements keep what they had
                        start = self.moments.get(name, torch.zeros(part.shape, dtype=moment.dtype))
                        moment = part.put(start.to(moment.device), moment)
                    self.moments[name] = moment.cpu().contiguous()
        if is_main():
            save_file(self.moments, Path(args.output_dir) / MOMENTS_NAME)


def _trained(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Parameter, TrainsInPart | None]]:
    """The trained parameters by the checkpoint's names, and how those that train in part are put together."""
    parts = {part.original1: part[0] for part in parts_of(model).values()}
    return {checkpoint_name(name): (p, parts.get(p)) for name, p in model.named_parameters() if p.requires_grad}
