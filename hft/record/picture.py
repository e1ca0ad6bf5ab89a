"""Pictures of selections and schedules: layers x units, and layers x steps."""

import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hft.methods.schedule import fractions_of, from_row, trained_fraction
from hft.model.anatomy import Anatomy
from hft.record.palette import FROZEN, TRAINED
from hft.selection import Selection

SHADES = LinearSegmentedColormap.from_list("fraction", [FROZEN, TRAINED])


def plot_selection(selection: Selection, title: str = "", words: tuple[str, str] = ("trains", "frozen")) -> Figure:
    """One column per layer, one row per unit, embeddings above and an untied head below; frozen ones are gray.

    What trains in part is colored in between; a unit that some layers lack stays white there.
    """
    num_layers, (first, last) = selection.anatomy.num_layers, ends_of(selection.anatomy)
    units = sorted(selection.anatomy.units, key=lambda unit: unit.block)
    cells = [(unit.block, unit.kind, unit.layer, selection.trained_fraction(unit)) for unit in units]
    table = pd.DataFrame(cells, columns=["block", "kind", "layer", "trained"])
    table = table.pivot_table("trained", ["block", "kind"], "layer", sort=False).reindex(columns=range(num_layers))
    kinds = [kind if block not in ("experts", "router") else f"{block} {kind}" for block, kind in table.index]
    summary = f"{selection.fraction_of_layers:.1%} of the layers {words[0]}"
    names = [*map(label, first), *kinds, *map(label, last)]
    axes = _axes(max(5, 0.24 * num_layers + 2.2), 0.3 * len(names) + 1.4, title, summary, names)
    look = {"cmap": SHADES, "vmin": 0, "vmax": 1, "edgecolors": "white", "linewidth": 1}
    rows = range(len(first), len(first) + len(kinds) + 1)
    axes.pcolormesh(range(num_layers + 1), rows, table, **look)
    for row, name in [*enumerate(first), *enumerate(last, rows[-1])]:
        mask = selection.frozen_masks.get(name)
        fraction = float(name in selection.trained_parameters) if mask is None else 1 - mask.count() / mask.numel
        axes.pcolormesh([0, num_layers], [row, row + 1], [[fraction]], **look)
    ticks = range(0, num_layers, every(num_layers))
    axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_xlabel("layer")
    legend = [Patch(color=color, label=word) for color, word in zip((TRAINED, FROZEN), words, strict=True)]
    axes.figure.legend(handles=legend, loc="outside lower right", ncols=2, frameon=False)
    return axes.figure


def plot_schedule(selection: Selection, history: Sequence[dict[str, Any]], steps: int, title: str = "") -> Figure:
    """One row per layer, one column per phase, as wide as the phase is long; the color is the layer's trained fraction.

    `history` holds the phases as `hft.methods.schedule.to_row` writes them; `steps` are those of the whole run.
    """
    anatomy, phases = selection.anatomy, [from_row(selection, row) for row in history]
    layers = [[trained_fraction(layer, trained) for _, trained in phases] for layer in anatomy.layers]
    first, last = ends_of(anatomy)
    above, below = ([[float(name in trained) for _, trained in phases] for name in names] for names in (first, last))
    shown = [str(layer) if layer % every(anatomy.num_layers) == 0 else "" for layer in range(anatomy.num_layers)]
    names = [*map(label, first), *shown, *map(label, last)]
    summary = f"{fractions_of(selection, phases, steps)['mean']:.1%} of the layers trains on average"
    axes = _axes(8, 0.2 * len(names) + 1.6, title, summary, names)
    edges, grid = [*(step for step, _ in phases), steps], [*above, *layers, *below]
    drawn = axes.pcolormesh(edges, range(len(grid) + 1), grid, cmap=SHADES, vmin=0, vmax=1)
    axes.set(xlabel="step", ylabel="layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(drawn, ax=axes, label="trained fraction", ticks=[0, 1], fraction=0.03, pad=0.02)
    return axes.figure


def ends_of(anatomy: Anatomy) -> tuple[list[str], list[str]]:
    """The embeddings, which are beside the layers in the module tree, and the head, which is not."""
    tree = anatomy.units[0].name.partition(".")[0]
    first = [name for name in anatomy.embeddings if name.partition(".")[0] == tree]
    return first, [name for name in anatomy.embeddings if name not in first]


def label(name: str) -> str:
    return name.split(".")[-2]


def every(num_layers: int) -> int:
    return 1 if num_layers <= 8 else 4 if num_layers <= 40 else 8


def _axes(width: float, height: float, title: str, summary: str, names: Sequence[str]) -> Axes:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    lines = textwrap.wrap(f"{title}{': ' if title else ''}{summary}", int(9 * width))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize="large")
    axes = figure.add_subplot(frame_on=False)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_yticks([row + 0.5 for row in range(len(names))], names)
    return axes
