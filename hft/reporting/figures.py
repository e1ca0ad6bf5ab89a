"""Figures of a report, by matplotlib, as SVG on white."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, pi
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from hft.config import fill
from hft.merging.diff import draw_changes
from hft.objectives import OBJECTIVES, find_objective
from hft.record.palette import COLORS, DASHES, FAINT, INK, MARKERS, OWN, TRAINED, style_of
from hft.reporting.collect import Group, LoadedRun, rate_text
from hft.reporting.measure import Column, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 4.6  # inches, so that 9 points are readable on a phone
# For matplotlib's `rc_context`.
RC = {"rc": {"svg.hashsalt": "hft"}, "fname": Path(__file__).with_name("templates") / "report.mplstyle"}

# Color and marker of each kind of group, in every figure.
Styles = Mapping[str, tuple[str, str]]


def styles_of(kinds: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A style per kind, that of its method. An objective changes none."""
    prefix = re.compile(f"^({'|'.join(map(str.upper, OBJECTIVES))}) ")
    return {kind: style_of(prefix.sub("", kind)) for kind in (*OWN, *kinds)}


def plot_style(style: tuple[str, str], objective: str = "") -> dict[str, Any]:
    """Arguments of `plot` for a style; markers are hollow where an objective's line is not solid."""
    color, marker = style
    line = find_objective(objective).linestyle if objective else "-"
    inside, edge = (color, "white") if line == "-" else ("white", color)
    markers = {"marker": marker, "markerfacecolor": inside, "markeredgecolor": edge, "markeredgewidth": 0.8}
    return {"color": color, "linestyle": line, "markersize": 6} | markers


def canvas(xlabel: str, ylabel: str, height: float = 2.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.tick_params(length=0)
    return figure, axes


def with_legend(figure: Figure) -> Figure:
    """The figure, grown by a legend."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = max(1, min(len(labels), int(66 / (max(map(len, labels)) + 7))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.8, columnspacing=1.2)
    figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(labels) // columns))
    return figure


def over_seeds(number: Measured) -> float:
    """The length of an error bar."""
    return number.spread if number.n > 1 else 0


def frontier(
    groups: Sequence[Group], x: Column, y: Column, styles: Styles, ways: Sequence[Mapping[str, Any]] = ()
) -> Figure | None:
    """What was learned against what was kept, a curve per arm over learning rates; None unless two groups have both.

    `ways` are contents of `keep.json`, the way from a tuned model to its base.
    """
    placed = [(group, a, b) for group in groups if (a := group.measure(x)) and (b := group.measure(y))]
    if len(placed) < 2:
        return None
    figure, axes = canvas(f"{x.name}, {x.unit} → better", f"{y.name}, {y.unit} → better", 3.2)
    for number, arm in enumerate(dict.fromkeys(group.arm for group, *_ in placed)):
        points = [point for point in placed if point[0].arm == arm]
        group = points[0][0]
        style = plot_style(styles[group.kind], group.first.objective) | {"zorder": 3 - number / 100}  # the first on top
        axes.plot([a.value for _, a, _ in points], [b.value for *_, b in points], **style | {"marker": ""})
        for size, (_, a, b) in enumerate(points):
            axes.errorbar(
                a.value, b.value, over_seeds(b), over_seeds(a), elinewidth=1, **style | {"markersize": 6 + 1.5 * size}
            )
        if group.kind not in axes.get_legend_handles_labels()[1]:
            axes.plot([], [], label=group.kind, **style)
    for way in ways:
        line = [point["scores"] for point in way["points"] if not isinstance(point["alpha"], dict)]  # not by block
        values = [[scores.get("/".join(column.keys[0][1:])) for column in (x, y)] for scores in line]
        if values and None not in values[0]:
            color = styles.get(way["method"], ("gray",))[0]
            axes.plot(*zip(*values, strict=True), color=color, linestyle=":", label=f"{way['method']} to its base")
    for column, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        axis.set_inverted(not column.higher_is_better)
        axis.set_major_locator(MaxNLocator(6))
    return with_legend(figure)


def radar(groups: Sequence[Group], columns: Sequence[Column], styles: Styles) -> Figure:
    """Figure 1: a polygon per group."""
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    axes = figure.add_subplot(projection="polar", theta_offset=pi / 2, theta_direction=-1)
    best = [max(group.measure(column).value for group in groups) or 1 for column in columns]
    angles = [2 * pi * index / len(columns) for index in range(len(columns) + 1)]
    for group in groups:
        values = [group.measure(column).value / top for column, top in zip(columns, best, strict=True)]
        style = plot_style(styles[group.kind], group.first.objective)
        axes.plot(angles, [*values, values[0]], label=group.label, **style)
    axes.set_xticks(angles[:-1], [f"{column.label}\n{top:.1f}" for column, top in zip(columns, best, strict=True)])
    axes.set_yticks([0.25, 0.5, 0.75, 1], [])
    axes.set_ylim(0, 1.04)
    axes.tick_params(pad=9)
    axes.spines["polar"].set_color(FAINT)
    return with_legend(figure)


def ratio_curves(groups: Sequence[Group], column: Column, styles: Styles) -> Figure | None:
    """Figure 3, a curve per learning rate; None unless three fractions of one learning rate were scored."""
    curves: dict[tuple[str, float | None], list[tuple[float, Measured]]] = {}
    for run, number in ((group.first, group.measure(column)) for group in groups if group.first.is_ratio):
        if number:
            points = curves.setdefault((run.objective, run.learning_rate), [])
            points.append((100 * run.fractions["layers"], number))
    curves = {key: sorted(points, key=lambda point: point[0]) for key, points in curves.items() if len(points) > 2}
    if not curves:
        return None
    figure, axes = canvas("trainable fraction of the layers, %", f"{column.name}, {column.unit}")
    for (objective, rate), points in curves.items():
        more = f" {rate_text(rate)}" if len(curves) > 1 and rate else ""
        x, y, errors = zip(*((x, number.value, over_seeds(number)) for x, number in points), strict=True)
        axes.errorbar(x, y, errors, label=f"hft{more}", **plot_style(styles["hft"], objective))
        if x[-1] == 100:
            axes.axhline(y[-1], color=styles["fft"][0], linestyle=":", label=f"fft{more}")
    return with_legend(figure)


def variation(rows: Sequence[Mapping[str, Any]], xlabel: str, lines: Mapping[str, dict[str, Any]]) -> Figure:
    """Figure 4: the change of a block by layer, or of units by the rounds in which they were trained."""
    figure, axes = canvas(xlabel, "mean |change|", 2.6)
    draw_changes(axes, rows, lines)
    return with_legend(figure)


def selection_picture(run: LoadedRun) -> Figure:
    """What trained, units by layers or layers by steps, as `hft.record.picture` draws it."""
    from hft.model.anatomy import anatomy_of, meta_model
    from hft.model.load import read_config
    from hft.record.picture import plot_schedule, plot_selection
    from hft.record.verification import masks_of
    from hft.selection import Selection, SelectionConfig

    made = run.manifest
    anatomy = anatomy_of(meta_model(read_config(str(run.folder), run.folder)))
    masks = masks_of(run.folder, made)
    trained = {name: ~mask for name, mask in masks.items()}
    drawn = Selection(anatomy, fill(SelectionConfig, made.selection), frozenset(made.trained_units), trained)
    if history := made.schedule.get("history"):
        figure = plot_schedule(drawn, history, made.schedule["steps"])
    else:
        words = ("stays tuned", "goes back") if made.tuned else ("trains", "frozen")
        figure = plot_selection(drawn, words=words)
    figure.set_size_inches(WIDTH, 0.65 * figure.get_figheight())
    axes = figure.axes[0]
    axes.set_yticks(axes.get_yticks(), [one.get_text().replace("layernorm", "norm") for one in axes.get_yticklabels()])
    return figure


def heatmap(matrix: Mapping[str, Any]) -> Figure:
    """Scores of a sequence of tasks; the stronger the color the higher.

    `scores` has shape (rounds, tasks), in %, None where a task was not scored.
    """
    tasks, rounds, scores = matrix["tasks"], matrix["rounds"], matrix["scores"]
    figure, axes = canvas("", "after round", 0.9 + 0.3 * len(scores))
    known = [(x, y, v) for y, row in enumerate(scores) for x, v in enumerate(row) if v is not None and isfinite(v)]
    top = max((value for *_, value in known), default=0) or 1
    for x, y, value in known:
        shade = {"color": TRAINED, "alpha": 0.75 * max(0, value / top), "linewidth": 0}
        axes.add_patch(Rectangle((x, y), 1, 1, **shade))
        axes.text(x + 0.5, y + 0.5, f"{value:.1f}", ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, len(tasks)), ylim=(len(scores), 0), frame_on=False)
    axes.grid(visible=False)
    axes.set_xticks([x + 0.5 for x in range(len(tasks))], tasks, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks([y + 0.5 for y in range(len(scores))], rounds)
    return figure


def task_curves(matrix: Mapping[str, Any]) -> Figure:
    """The score of each task of a sequence over the rounds, and OP after each."""
    figure, axes = canvas("after round", "score, %")
    for number, task in enumerate(matrix["tasks"]):
        known = [(x, row[number]) for x, row in enumerate(matrix["scores"]) if row[number] is not None]
        style = plot_style((COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]))
        axes.plot(*zip(*known, strict=True), label=task, **style) if known else None
    first = len(matrix["scores"]) - len(matrix["op"])
    axes.plot(range(first, first + len(matrix["op"])), matrix["op"], label="OP", color=INK, linewidth=2.5)
    axes.set_xticks(range(len(matrix["rounds"])), matrix["rounds"], rotation=35, ha="right", rotation_mode="anchor")
    return with_legend(figure)


def curves(series: Sequence[tuple[Group, Sequence[tuple[int, float]]]], ylabel: str, styles: Styles) -> Figure | None:
    """Values over steps, averaged over a group's runs and in bins of many steps; dashes tell groups of one kind."""
    series = [(group, values) for group, values in series if values]
    if not series:
        return None
    figure, axes = canvas("step", ylabel)
    drawn: dict[str, int] = {}
    for group, values in series:
        number = drawn[group.kind] = drawn.get(group.kind, -1) + 1
        steps = sorted({step for step, _ in values})
        size = -(-len(steps) // 150)
        bins = [set(steps[first : first + size]) for first in range(0, len(steps), size)]
        y = [fmean(value for step, value in values if step in one) for one in bins]
        style = plot_style(styles[group.kind]) | {"linestyle": DASHES[number % len(DASHES)]}
        axes.plot([fmean(one) for one in bins], y, label=group.label, **style | ({"marker": ""} if len(y) > 30 else {}))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return with_legend(figure)


def to_svg(figure: Figure, name: str, title: str) -> str:
    """A figure as SVG for a page; `name` goes before its ids, which would clash with other figures'."""
    with io.StringIO() as file, rc_context(**RC):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
