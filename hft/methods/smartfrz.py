"""SmartFRZ (arXiv 2401.16720; paper Table 5): a trained predictor freezes layers by their recent weights, in any order.

The authors record weights of every layer, as many of each, and give the recent ones to a small attention network that
was trained beforehand, on labels from the similarity of representations. No code was released. Ours are the description
of a window that does not depend on the model (`describe_window`), the network's size, and the runs that it was trained
on, of small models on the demo data: at scale it is a starting point, not a result. Ours, too: the input embeddings
freeze with the first layer, as under AutoFreeze.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from safetensors.torch import load_file
from torch import nn

from hft.config import option
from hft.freezing import whole
from hft.machine import broadcast
from hft.methods.schedule import Schedule, layers_and_ends
from hft.model.anatomy import Unit
from hft.selection import Selection

PREDICTOR_WEIGHTS = Path(__file__).with_suffix(".safetensors")
SAMPLES = 128  # weights of a layer that are recorded
WINDOW = 6  # recordings that the predictor sees
RECORDINGS = WINDOW - 1  # in an interval, so that a window spans one


@dataclass
class SmartFRZ(Schedule):
    name: ClassVar[str] = "smartfrz"
    known_before_run: ClassVar[bool] = False

    intervals: PositiveInt = option("Number of equal parts of the run; layers freeze between them.", 10)

    def decide(
        self, selection: Selection, step: int, steps: int, model: nn.Module, measured: dict[str, Any]
    ) -> frozenset[str]:
        layers, interval = range(selection.anatomy.num_layers), self.interval_at(steps, step)
        if not measured:
            measured.update(interval=0, frozen=[], windows=[[] for _ in layers], largest=[0.0 for _ in layers])
        windows, largest, recordings = measured["windows"], measured["largest"], self.intervals * RECORDINGS
        active = [layer for layer in layers if layer not in measured["frozen"]]
        if step * recordings // steps != (step - 1) * recordings // steps:
            parameters = dict(model.named_parameters())
            for layer in active:
                windows[layer] = [*windows[layer], sample(parameters, selection.anatomy.layers[layer])][-WINDOW:]
                largest[layer] = max([largest[layer], *step_norms(torch.tensor(windows[layer][-2:])).tolist()])
        if interval != measured["interval"]:
            measured["interval"] = interval
            for layer in broadcast(layers_to_freeze({layer: windows[layer] for layer in active}, largest)):
                measured["frozen"] = sorted([*measured["frozen"], layer])
                windows[layer] = []
                active.remove(layer)
        return layers_and_ends(selection, active)


def sample(parameters: Mapping[str, torch.Tensor], units: Sequence[Unit]) -> list[float]:
    """`SAMPLES` weights of a layer, always the same ones, spread over all its elements."""
    tensors = [parameters[name].detach() for name in dict.fromkeys(name for unit in units for name in unit.parameters)]
    size, golden = sum(tensor.numel() for tensor in tensors), 0.6180339887498949
    places = torch.tensor(sorted(int(size * (index * golden % 1)) for index in range(SAMPLES)))
    weights = []
    for tensor in tensors:
        inside = places[(places >= 0) & (places < tensor.numel())].to(tensor.device)
        weights += whole(tensor).reshape(-1)[inside].float().tolist()
        places = places - tensor.numel()
    return weights


def step_norms(windows: torch.Tensor) -> torch.Tensor:
    """How far each layer moved between recordings: `(..., recordings, SAMPLES)` to `(..., recordings - 1)`."""
    return windows.diff(dim=-2).norm(dim=-1)


def describe_window(windows: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Windows `(layers, WINDOW, SAMPLES)` by what does not depend on a model's size or scale, nor on which weights were
    sampled: `(layers, WINDOW - 1, WINDOW)`, of each move the logarithm of its length relative to the layer's largest so
    far, `(layers,)`, and its cosines with all moves of the window.
    """
    moves = windows.diff(dim=1)
    lengths = torch.log10(step_norms(windows) / largest.clamp_min(1e-30)[:, None] + 1e-4)
    directions = nn.functional.normalize(moves, dim=-1)
    return torch.cat([lengths[..., None], directions @ directions.transpose(1, 2)], dim=-1)


class Predictor(nn.Module):
    """One layer of self-attention over the moves of a window, read out at the last one."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.embed = nn.Linear(WINDOW, width)
        self.position = nn.Parameter(torch.zeros(WINDOW - 1, width))
        self.attention = nn.MultiheadAttention(width, num_heads=2, batch_first=True)
        self.read_out = nn.Linear(width, 1)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits `(layers,)` that a layer may freeze, given `describe_window`'s `(layers, WINDOW - 1, WINDOW)`."""
        tokens = self.embed(windows) + self.position
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.read_out((tokens + attended)[:, -1]).squeeze(-1)


@torch.no_grad()
def layers_to_freeze(windows: Mapping[int, Sequence[Sequence[float]]], largest: Sequence[float]) -> list[int]:
    """The layers that may freeze, given the windows of those that train and the largest move of each; one stays.

    A layer that has not moved so far, such as in a warmup from 0, never freezes.
    """
    layers = [layer for layer, window in windows.items() if len(window) == WINDOW and largest[layer] > 0]
    if not layers:
        return []
    predictor = Predictor().eval()
    predictor.load_state_dict(load_file(PREDICTOR_WEIGHTS))
    recorded = torch.tensor([windows[layer] for layer in layers])
    logits = predictor(describe_window(recorded, torch.tensor([largest[layer] for layer in layers])))
    ranked = sorted(zip(logits.tolist(), layers, strict=True), reverse=True)
    frozen = sorted(layer for logit, layer in ranked if logit > 0)
    return frozen if len(frozen) < len(windows) else sorted(layer for _, layer in ranked[:-1])
