"""AutoFreeze (arXiv 2102.01386; paper Table 5): the first layers freeze for good as their gradients settle.

With them freeze the input embeddings: only then does the backward pass end early. The original takes the L1 norm of the
gradient summed over an interval, a second gradient in memory; ours averages the L1 norms of the steps, and the layers
that still train keep their moments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import PositiveInt
from torch import nn

from hft.config import Percent, option
from hft.freezing import whole
from hft.machine import broadcast
from hft.methods.schedule import Schedule, layers_and_ends
from hft.selection import Selection


@dataclass
class AutoFreeze(Schedule):
    name: ClassVar[str] = "autofreeze"
    known_before_run: ClassVar[bool] = False

    intervals: PositiveInt = option("Number of equal parts of the run; layers freeze between them.", 10)
    percentile: Percent = option(
        "Percentile of the layers' changes in gradient norm; layers before the first to reach it freeze.",
        50.0,
    )

    def decide(
        self, selection: Selection, step: int, steps: int, model: nn.Module, measured: dict[str, Any]
    ) -> frozenset[str]:
        num_layers, interval = selection.anatomy.num_layers, self.interval_at(steps, step)
        if not measured:
            measured.update(start=0, means=None)
        elif interval != measured["interval"]:
            means = [total / measured["steps"] for total in measured["sums"]]
            if measured["means"] is not None:  # other ranks may differ by rounding
                measured["start"] = broadcast(next_start(measured["means"], means, measured["start"], self.percentile))
            measured["means"] = means
        if interval != measured.get("interval"):
            measured.update(interval=interval, steps=0, sums=[0.0] * num_layers)
        return layers_and_ends(selection, range(measured["start"], num_layers))

    def on_gradients(self, selection: Selection, model: nn.Module, measured: dict[str, Any]) -> None:
        parameters = dict(model.named_parameters())
        for layer in range(measured["start"], selection.anatomy.num_layers):
            names = dict.fromkeys(name for unit in selection.anatomy.layers[layer] for name in unit.parameters)
            gradients = [parameters[name].grad for name in names]
            norms = [whole(torch.linalg.vector_norm(gradient, 1)) for gradient in gradients if gradient is not None]
            measured["sums"][layer] += float(torch.stack(norms).sum()) if norms else 0.0
        measured["steps"] += 1


def next_start(before: Sequence[float], now: Sequence[float], start: int, percentile: float) -> int:
    """The first layer from `start` on whose norm changed by the percentile of all changes in the last two intervals."""
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.abs(np.subtract(before, now)[start:]) / np.asarray(before)[start:]
    reached = np.flatnonzero(change >= np.percentile(change, percentile))
    return start + int(reached[0]) if len(reached) else start  # a NaN freezes nothing
