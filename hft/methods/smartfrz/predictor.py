"""The predictor of the smartfrz schedule: attention over a layer's recent weights says whether it may freeze.

SmartFRZ (arXiv 2401.16720) records weights of every layer, as many of each, and gives the recent ones to a small
attention network that was trained beforehand, on labels from the similarity of representations. No code was released.
Ours are the description of a window that does not depend on the model (`describe_window`), the network's size, and the
runs that it was trained on, of small models on the demo data: at scale it is a starting point, not a result.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from hft.freezing import whole
from hft.model.anatomy import Unit

PREDICTOR_WEIGHTS = Path(__file__).with_name("smartfrz.safetensors")
SAMPLES = 128  # weights of a layer that are recorded
WINDOW = 6  # recordings that the predictor sees
RECORDINGS = WINDOW - 1  # in an interval, so that a window spans one


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
    """Describe windows by what does not depend on a model's size or scale, nor on which weights were sampled.

    Args:
        windows: `(layers, WINDOW, SAMPLES)`, oldest first.
        largest: `(layers,)`, the largest distance that each layer has moved between two recordings so far.

    Returns:
        `(layers, WINDOW - 1, WINDOW)`: of each move its length, relative to the largest one and as a logarithm, and its
        cosines with all moves of the window.
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


@functools.cache
def trained_predictor() -> Predictor:
    """The predictor with the weights that come with the package."""
    predictor = Predictor()
    predictor.load_state_dict(load_file(PREDICTOR_WEIGHTS))
    return predictor.eval()


@torch.no_grad()
def layers_to_freeze(windows: Mapping[int, Sequence[Sequence[float]]], largest: Sequence[float]) -> list[int]:
    """The layers that may freeze, given the windows of those that train and the largest move of each; one stays.

    A layer that has not moved so far, such as in a warmup from 0, never freezes.
    """
    layers = [layer for layer, window in windows.items() if len(window) == WINDOW and largest[layer] > 0]
    if not layers:
        return []
    recorded = torch.tensor([windows[layer] for layer in layers])
    logits = trained_predictor()(describe_window(recorded, torch.tensor([largest[layer] for layer in layers])))
    ranked = sorted(zip(logits.tolist(), layers, strict=True), reverse=True)
    frozen = sorted(layer for logit, layer in ranked if logit > 0)
    return frozen if len(frozen) < len(windows) else sorted(layer for _, layer in ranked[:-1])
