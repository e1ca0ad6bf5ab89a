"""`hft diff`: how far models have moved from where they started (paper section 5, Figure 4)."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from hft.errors import HFTError
from hft.machine import indented, say
from hft.merging.checkpoint import Checkpoint, check_alike, rounds_between, why_not_base
from hft.merging.operators import blocks
from hft.model.anatomy import BLOCKS, Part, Unit, anatomy_of, meta_model
from hft.record.manifest import write_json
from hft.record.palette import DASHES, style_of
from hft.runs.config import read_saved_config
from hft.runs.result import CONFIG_NAME
from hft.selection.selection import ELEMENTWISE
from hft.text import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# `what`, `block`, `elements`, and `change`: the mean of |model - start| over the elements, by model.
Row = Mapping[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Compare models with their start, and print, write and draw what is found."""
    parser = argparse.ArgumentParser(prog="hft diff", description="How far models have moved from their start.")
    parser.add_argument("start", metavar="START", help="the model that they started from: a folder or a Hub id")
    parser.add_argument("models", metavar="MODEL", nargs="+", help="the models to compare with it")
    parser.add_argument("--out", help="folder for diff.png and diff.json")
    parser.add_argument("--group", type=int, default=1, help="neighboring layers per row; Figure 4 groups two")
    options = parser.parse_intermixed_args(arguments)
    if options.group < 1:
        raise HFTError(f"group is a number of layers, got {options.group}")
    start, *models = map(Checkpoint.open, [options.start, *options.models])
    check_alike(start, *models)
    found = compare(start, models, group=options.group)
    say(comparison_text(found))
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        methods = dict(zip(found["layers"][0]["change"], map(method_of, models), strict=True))
        plot_comparison(found, methods).savefig(out / "diff.png")
        write_json(out / "diff.json", found)
        say("", f"{options.out}/diff.png, diff.json")
    return 0


def compare(start: Checkpoint, models: Sequence[Checkpoint], *, group: int = 1) -> dict[str, Any]:
    """What `diff.json` holds: rows by block of `group` neighboring layers, and of what is outside the layers.

    `rounds` has rows of each model whose units trained in different numbers of rounds, by that number; `notes` say
    which models have none, and why.
    """
    anatomy = anatomy_of(meta_model(start.config))
    labels = [Path(model.name).name for model in models]
    if len(set(labels)) < len(labels):
        labels = [model.name for model in models]
    wholes = {name: Part(name, tuple(start.specs[name].shape)) for name in start.parameters}
    sums = total_changes(start, models, [*parts_of(anatomy.units), *(wholes[name] for name in anatomy.outside_layers)])

    def row(what: str, block: str, parts: Sequence[Part]) -> Row:
        elements = sum(part.numel for part in parts)
        means = (sum(total[part] for part in parts) / elements for total in sums)
        return {"what": what, "block": block, "elements": elements, "change": dict(zip(labels, means, strict=True))}

    layers = []
    for first in range(0, anatomy.num_layers, group):
        last = min(first + group, anatomy.num_layers) - 1
        what = str(first) if first == last else f"{first}-{last}"
        for block in BLOCKS:
            if units := [unit for unit in anatomy.units if first <= unit.layer <= last and unit.block == block]:
                layers.append(row(what, block, parts_of(units)))
    ends = {"embeddings": anatomy.embeddings, "others": anatomy.others}
    outside = [row(what, "outside", [wholes[name] for name in names]) for what, names in ends.items() if names]
    rounds, notes = {}, []
    for label, model in zip(labels, models, strict=True):
        past = rounds_between(start, model)
        chosen = (one["selection"] for one in past)
        in_part = [c["policy"] for c in chosen if c.get("policy") in ELEMENTWISE and c.get("granularity") != "unit"]
        why = why_not_base(model, start) or (in_part and f"the {in_part[0]} policy trained its units in part")
        if why:
            notes.append(f"no rounds of {label}: {why}")
            continue
        frozen, by_count = [set(one["frozen_units"]) for one in past], {}
        for unit in anatomy.units:
            by_count.setdefault(sum(unit.name not in names for names in frozen), []).append(unit)
        if len(by_count) > 1:
            rounds[label] = [row(str(n), "layers", parts_of(units)) for n, units in sorted(by_count.items())]
    return {"start": start.name, "layers": layers, "outside": outside, "rounds": rounds, "notes": notes}


def parts_of(units: Iterable[Unit]) -> list[Part]:
    """The parts of some units, of which two may share one."""
    return list(dict.fromkeys(part for unit in units for part in unit.parts))


def total_changes(start: Checkpoint, models: Sequence[Checkpoint], parts: Iterable[Part]) -> list[dict[Part, float]]:
    """The sum of |model - start| over each part, in each model."""
    by_name: dict[str, list[Part]] = {}
    for part in parts:
        by_name.setdefault(part.parameter, []).append(part)
    sums: list[dict[Part, float]] = [{} for _ in models]
    for name, own in tqdm(by_name.items(), desc="comparing", unit="tensor", leave=False):
        before = start.fp32(name)
        holders = torch.zeros(before.shape, dtype=torch.int16)  # of each element the part that holds it
        for index, part in enumerate(own):
            part.mark(holders, index)
        for model, sum_of in zip(models, sums, strict=True):
            total = torch.zeros(len(own), dtype=torch.float64)
            for values, indices in blocks((model.fp32(name) - before).abs(), holders):
                total += torch.bincount(indices, values.double(), minlength=len(own))
            if not total.isfinite().all():
                raise HFTError(f"{name} holds NaN or infinity in {model.name} or in {start.name}")
            sum_of |= dict(zip(own, total.tolist(), strict=True))
    return sums


def comparison_text(found: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(row["block"] for row in found["layers"]))
    models = list(found["layers"][0]["change"])

    def lines(rows: Sequence[Row]) -> list[list[str]]:
        cells: dict[str, list[str]] = {}
        for row in rows:
            cells.setdefault(row["what"], [row["what"]]).extend(f"{row['change'][model]:.2e}" for model in models)
        return list(cells.values())

    heads = [name if model is models[-1] else "" for name in names for model in models]
    text: list[Sequence[str] | str] = [["", *heads], ["layer", *models * len(names)], *lines(found["layers"])]
    text += ["", ["outside", *models], *lines(found["outside"])]
    for model, rows in found["rounds"].items():
        text += ["", f"units by the rounds in which they were trained in {model}", ["rounds", *models], *lines(rows)]
    text += ["", *found["notes"]] if found["notes"] else []
    return f"mean absolute change from {found['start']}\n" + indented(aligned(text))


def method_of(model: Checkpoint) -> str:
    """The method of a run; the name of any other model."""
    config = model.folder / CONFIG_NAME
    return (read_saved_config(config) if config.exists() else {}).get("method") or Path(model.name).name


def plot_comparison(found: Mapping[str, Any], methods: Mapping[str, str]) -> Figure:
    """Attention and MLP over the layers, units over their rounds; a method has a color, its models have dashes."""
    from matplotlib.figure import Figure

    of_block = {block: [row for row in found["layers"] if row["block"] == block] for block in BLOCKS}
    panels = [("attention", "layer", of_block["attention"]), ("MLP", "layer", of_block["mlp"])]
    panels += [(f"units by how often {model} trained them", "rounds", rows) for model, rows in found["rounds"].items()]
    styles, drawn = {}, []
    for model, method in methods.items():
        color, marker = style_of(method)
        dashes = DASHES[drawn.count(method) % len(DASHES)]
        styles[model] = {"color": color, "marker": marker, "markersize": 4, "linestyle": dashes, "label": model}
        drawn.append(method)
    figure = Figure(figsize=(4.4 * len(panels), 3.6), dpi=120, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, xlabel, rows) in zip(all_axes, panels, strict=True):
        draw_changes(axes, rows, styles)
        axes.set_title("\n".join(textwrap.wrap(title, 42)), loc="left", fontsize=10)
        axes.set_xlabel(xlabel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
    all_axes[0].set_ylabel(f"mean |change| from {Path(found['start']).name}")
    columns = max(1, int(12 * 4.4 * len(panels) / (max(map(len, methods)) + 7)))
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    figure.set_figheight(3.4 + 0.2 * -(-len(methods) // columns))
    return figure


def draw_changes(axes: Axes, rows: Sequence[Row], styles: Mapping[str, dict[str, Any]]) -> None:
    """A line per model over the layers or rounds of `rows`, as `diff.json` has them; `styles` are for `plot`."""
    from matplotlib.ticker import MaxNLocator

    x = [int(row["what"].partition("-")[0]) for row in rows]
    for model, style in styles.items():
        axes.plot(x, [row["change"][model] for row in rows], **style)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
