"""Pictures of selections and schedules: layers x units, and layers x steps."""

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hft.methods.schedule import fractions_of, from_row, trained_fraction
from hft.selection import Selection

FROZEN, TRAINED = "#cfd8dc", "#e4572e"
SHADES = LinearSegmentedColormap.from_list("fraction", [FROZEN, TRAINED])


def plot_selection(selection: Selection, title: str = "", words: tuple[str, str] = ("trains", "frozen")) -> Figure:
    """One column per layer, one row per unit; trained units are colored, frozen ones gray.

    A unit that trains in part, and experts of which some train, are colored in between. A unit that some layers lack
    stays white there. `words` are the legend of trained and frozen.
    """
    units, num_layers = selection.anatomy.units, selection.anatomy.num_layers
    kinds = list(dict.fromkeys((unit.block, unit.kind) for unit in sorted(units, key=lambda u: u.block)))
    cells: dict[tuple[int, int], list[float]] = {}
    for unit in units:
        cell = kinds.index((unit.block, unit.kind)), unit.layer
        cells.setdefault(cell, []).append(selection.trained_fraction(unit))
    grid = [[float("nan")] * num_layers for _ in kinds]
    for (row, layer), fractions in cells.items():
        grid[row][layer] = sum(fractions) / len(fractions)

    summary = f"{selection.fraction_of_layers:.1%} of the layers {words[0]}"
    axes = _axes(max(5, 0.24 * num_layers + 2.2), 0.3 * len(kinds) + 1.4, title, summary)
    axes.pcolormesh(grid, cmap=SHADES, vmin=0, vmax=1, edgecolors="white", linewidth=1)
    names = [kind if block not in ("experts", "router") else f"{block} {kind}" for block, kind in kinds]
    axes.set_yticks([row + 0.5 for row in range(len(kinds))], names)
    ticks = range(0, num_layers, 1 if num_layers <= 8 else 4)
    axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_xlabel("layer")
    legend = [Patch(color=color, label=word) for color, word in zip((TRAINED, FROZEN), words, strict=True)]
    axes.figure.legend(handles=legend, loc="outside lower right", ncols=2, frameon=False)
    return axes.figure


def plot_schedule(selection: Selection, history: Sequence[dict[str, Any]], steps: int, title: str = "") -> Figure:
    """One row per layer, one column per phase, as wide as the phase is long; the color is the layer's trained fraction.

    The rows above and below the layers are the input embeddings and, unless it is tied to them, the head. `history`
    holds the phases as `hft.methods.schedule.to_row` writes them; `steps` are those of the whole run.
    """
    anatomy, phases = selection.anatomy, [from_row(selection, row) for row in history]
    layers = [[trained_fraction(layer, trained) for _, trained in phases] for layer in anatomy.layers]
    first, *last = [[float(name in trained) for _, trained in phases] for name in anatomy.embeddings]
    grid = [first, *layers, *last]

    mean = fractions_of(selection, phases, steps)["mean"]
    summary = f"{mean:.1%} of the layers trains on average"
    axes = _axes(8, 0.2 * len(grid) + 1.6, title, summary)
    edges = [step for step, _ in phases] + [steps]
    drawn = axes.pcolormesh(edges, range(len(grid) + 1), grid, cmap=SHADES, vmin=0, vmax=1)
    every = 1 if anatomy.num_layers <= 8 else 4
    names = ["embeddings", *map(str, range(anatomy.num_layers)), *(["head"] if last else [])]
    ticks = [0, *range(1, anatomy.num_layers + 1, every), *range(anatomy.num_layers + 1, len(grid))]
    axes.set_yticks([tick + 0.5 for tick in ticks], [names[tick] for tick in ticks])
    axes.set_ylabel("layer")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(drawn, ax=axes, label="trained fraction", ticks=[0, 1], fraction=0.03, pad=0.02)
    return axes.figure


def _axes(width: float, height: float, title: str, summary: str) -> Axes:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    lines = textwrap.wrap(f"{title}{': ' if title else ''}{summary}", int(11 * width))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize="large")
    axes = figure.add_subplot()
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    return axes
