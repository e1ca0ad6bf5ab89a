"""Figures of a report, by matplotlib, as SVG on white."""

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hft.config import fill
from hft.merging.diff import draw_changes
from hft.objectives import OBJECTIVES, find_objective
from hft.record.palette import COLORS, DASHES, FAINT, INK, MARKERS, OWN, TRAINED, style_of
from hft.reporting.collect import Group, LoadedRun, rate_text
from hft.reporting.measure import Column, Measured

WIDTH = 4.6  # inches, so that 9 points are readable on a phone
# For matplotlib's `rc_context`.
RC = {"rc": {"svg.hashsalt": "hft"}, "fname": Path(__file__).with_name("templates") / "report.mplstyle"}

PREFIX = re.compile(f"^({'|'.join(map(str.upper, OBJECTIVES))}) ")  # of an arm, where there are several objectives


def look(arm: str, objective: str = "") -> dict[str, Any]:
    """Arguments of `plot` for a method; an objective changes the line, with hollow markers where it is not solid."""
    color, marker = style_of(PREFIX.sub("", arm))
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
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = max(1, min(len(labels), int(66 / (max(map(len, labels)) + 7))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.8, columnspacing=1.2)
    figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(labels) // columns))
    return figure


def frontier(groups: Sequence[Group], x: Column, y: Column, ways: Sequence[Mapping[str, Any]] = ()) -> Figure | None:
    """What was learned against what was kept, a curve per arm over learning rates; None unless two groups have both.

    `ways` are contents of `keep.json`, the way from a tuned model to its base.
    """
    placed = [(group, a, b) for group in groups if (a := group.measure(x)) and (b := group.measure(y))]
    if len(placed) < 2:
        return None
    figure, axes = canvas(f"{x.name}, {x.unit} → better", f"{y.name}, {y.unit} → better", 3.2)
    for number, arm in enumerate(dict.fromkeys(group.arm for group, *_ in placed)):
        points = [point for point in placed if point[0].arm == arm]
        style = look(arm, points[0][0].first.objective) | {"zorder": 3 - number / 100}  # the first on top
        axes.plot([a.value for _, a, _ in points], [b.value for *_, b in points], **style | {"marker": ""})
        for size, (_, a, b) in enumerate(points):
            axes.errorbar(a.value, b.value, b.bar, a.bar, elinewidth=1, **style | {"markersize": 6 + 1.5 * size})
        axes.plot([], [], label=arm, **style)
    for way in ways:
        line = [point["scores"] for point in way["points"] if not isinstance(point["alpha"], dict)]  # not by block
        values = [[scores.get("/".join(column.keys[0][1:])) for column in (x, y)] for scores in line]
        if values and None not in values[0]:
            line = {"color": style_of(way["method"])[0], "linestyle": ":", "label": f"{way['method']} to its base"}
            axes.plot(*zip(*values, strict=True), **line)
    for column, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        axis.set_inverted(not column.higher_is_better)
        axis.set_major_locator(MaxNLocator(6))
    return with_legend(figure)


def radar(groups: Sequence[Group], columns: Sequence[Column]) -> Figure:
    """Figure 1: a polygon per group."""
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    axes = figure.add_subplot(projection="polar", theta_offset=pi / 2, theta_direction=-1)
    best = [max(group.measure(column).value for group in groups) or 1 for column in columns]
    angles = [2 * pi * index / len(columns) for index in range(len(columns) + 1)]
    for group in groups:
        values = [group.measure(column).value / top for column, top in zip(columns, best, strict=True)]
        axes.plot(angles, [*values, values[0]], label=group.label, **look(group.arm, group.first.objective))
    axes.set_xticks(angles[:-1], [f"{column.label}\n{top:.1f}" for column, top in zip(columns, best, strict=True)])
    axes.set_yticks([0.25, 0.5, 0.75, 1], [])
    axes.set_ylim(0, 1.04)
    axes.tick_params(pad=9)
    axes.spines["polar"].set_color(FAINT)
    return with_legend(figure)


def ratio_curves(groups: Sequence[Group], column: Column) -> Figure | None:
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
        x, y, errors = zip(*((x, number.value, number.bar) for x, number in points), strict=True)
        axes.errorbar(x, y, errors, label=f"hft{more}", **look("hft", objective))
        if x[-1] == 100:
            axes.axhline(y[-1], color=OWN["fft"][0], linestyle=":", label=f"fft{more}")
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
    trained = {name: ~mask for name, mask in masks_of(run.folder, made).items()}
    drawn = Selection(anatomy, fill(SelectionConfig, made.selection), frozenset(made.trained_units), trained)
    if history := made.schedule.get("history"):
        figure = plot_schedule(drawn, history, made.schedule["steps"])
    else:
        figure = plot_selection(drawn, words=("stays tuned", "goes back") if made.tuned else ("trains", "frozen"))
    figure.set_size_inches(WIDTH, 0.65 * figure.get_figheight())
    axes = figure.axes[0]
    axes.set_yticks(axes.get_yticks(), [one.get_text().replace("layernorm", "norm") for one in axes.get_yticklabels()])
    return figure


def heatmap(matrix: Mapping[str, Any]) -> Figure:
    """The scores of a sequence of tasks by round; the stronger the color the higher."""
    scores = np.ma.masked_invalid(np.array(matrix["scores"], float))
    figure, axes = canvas("", "after round", 0.9 + 0.3 * len(scores))
    shades = LinearSegmentedColormap.from_list("score", ["white", TRAINED])
    axes.pcolormesh(scores, cmap=shades, vmin=0, vmax=(scores.max() or 1) / 0.75)
    for (y, x), value in np.ndenumerate(scores.filled(np.nan)):
        if np.isfinite(value):
            axes.text(x + 0.5, y + 0.5, f"{value:.1f}", ha="center", va="center", fontsize=8)
    axes.set(frame_on=False)
    axes.invert_yaxis()
    axes.grid(visible=False)
    rounds, tasks = np.arange(len(matrix["rounds"])) + 0.5, np.arange(len(matrix["tasks"])) + 0.5
    axes.set_yticks(rounds, matrix["rounds"])
    axes.set_xticks(tasks, matrix["tasks"], rotation=35, ha="right", rotation_mode="anchor")
    return figure


def task_curves(matrix: Mapping[str, Any]) -> Figure:
    """The score of each task of a sequence over the rounds, and OP after each."""
    figure, axes = canvas("after round", "score, %")
    for number, (task, scores) in enumerate(pd.DataFrame(matrix["scores"], columns=matrix["tasks"]).items()):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        axes.plot(scores.dropna(), label=task, color=color, marker=marker)
    first = len(matrix["scores"]) - len(matrix["op"])
    axes.plot(range(first, first + len(matrix["op"])), matrix["op"], label="OP", color=INK, linewidth=2.5)
    axes.set_xticks(range(len(matrix["rounds"])), matrix["rounds"], rotation=35, ha="right", rotation_mode="anchor")
    return with_legend(figure)


def curves(series: Sequence[tuple[Group, Sequence[tuple[int, float]]]], ylabel: str) -> Figure | None:
    """Values over steps, averaged over a group's runs and in bins of many steps; dashes tell groups of one arm."""
    series = [(group, values) for group, values in series if values]
    if not series:
        return None
    figure, axes = canvas("step", ylabel)
    drawn = Counter()
    for group, values in series:
        points = pd.DataFrame(values, columns=["step", "value"]).groupby("step", as_index=False).mean()
        points = points.groupby(points.index // -(-len(points) // 150)).mean()
        style = look(group.arm) | {"linestyle": DASHES[drawn[group.arm] % len(DASHES)]}
        drawn[group.arm] += 1
        style |= {"marker": ""} if len(points) > 30 else {}
        axes.plot(points["step"], points["value"], label=group.label, **style)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return with_legend(figure)


def to_svg(figure: Figure, name: str, title: str) -> str:
    """A figure as SVG for a page; `name` goes before its ids, which would clash with other figures'."""
    with io.StringIO() as file, rc_context(**RC):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
