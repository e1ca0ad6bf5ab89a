"""SmartFRZ (arXiv 2401.16720; paper Table 5): a trained predictor freezes layers by their recent weights."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hft.config import option
from hft.machine import broadcast
from hft.methods.schedule import Schedule, layers_and_ends
from hft.methods.smartfrz.predictor import RECORDINGS, WINDOW, layers_to_freeze, sample, step_norms
from hft.selection import Selection


@dataclass
class SmartFRZ(Schedule):
    """All layers train but those that the predictor of `hft.methods.smartfrz.predictor` has frozen, in any order.

    Ours: the input embeddings freeze with the first layer, as under AutoFreeze.
    """

    name: ClassVar[str] = "smartfrz"
    description: ClassVar[str] = "everything trains at first; a trained predictor freezes layers by their weights"
    known_before_run: ClassVar[bool] = False

    intervals: int = option("Parts of the run, of equal length; layers freeze between.", 10)

    def decide(
        self, selection: Selection, step: int, steps: int, model: nn.Module, measured: dict[str, Any]
    ) -> frozenset[str]:
        layers = range(selection.anatomy.num_layers)
        if not measured:
            measured.update(interval=0, frozen=[], windows=[[] for _ in layers], largest=[0.0 for _ in layers])
        recordings = self.intervals * RECORDINGS
        if step * recordings // steps != (step - 1) * recordings // steps:
            self._record(selection, model, measured)
        active = [layer for layer in layers if layer not in measured["frozen"]]
        if (interval := self.interval_at(steps, step)) != measured["interval"]:
            measured["interval"] = interval
            windows = {layer: measured["windows"][layer] for layer in active}
            for layer in broadcast(layers_to_freeze(windows, measured["largest"])):
                measured["frozen"] = sorted([*measured["frozen"], layer])
                measured["windows"][layer] = []
                active.remove(layer)
        return layers_and_ends(selection, active)

    def _record(self, selection: Selection, model: nn.Module, measured: dict[str, Any]) -> None:
        """Append a recording to the window of each layer that trains, and note the largest move so far."""
        parameters = dict(model.named_parameters())
        for layer, units in enumerate(selection.anatomy.layers):
            if layer not in measured["frozen"]:
                window = measured["windows"][layer]
                window.append(sample(parameters, units))
                del window[:-WINDOW]
                moved = step_norms(torch.tensor(window[-2:])).tolist()
                measured["largest"][layer] = max([measured["largest"][layer], *moved])
