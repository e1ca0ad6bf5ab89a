"""`hft diff`: how far models have moved from where they started (paper section 5, Figure 4)."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from hft.errors import HFTError
from hft.machine import indented, say
from hft.merging.checkpoint import Checkpoint, check_alike, rounds_between, why_not_base
from hft.merging.operators import blocks
from hft.model.anatomy import BLOCKS, Anatomy, Part, Unit, anatomy_of, meta_model
from hft.record.manifest import write_json
from hft.record.palette import DASHES, style_of
from hft.runs.config import read_saved_config
from hft.runs.result import CONFIG_NAME
from hft.selection.selection import ELEMENTWISE
from hft.text import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Change:
    """The mean absolute change of some elements, in each model."""

    what: str  # the first and last layer, in how many rounds the units trained, embeddings (with the head), or others
    block: str  # the block in these layers; `layers` for all of them, or `outside`
    elements: int
    change: dict[str, float]  # mean of |model - start|, by model


@dataclass(frozen=True)
class Comparison:
    """How far some models have moved from one start."""

    start: str
    layers: list[Change]  # by layers and block
    outside: list[Change]
    rounds: dict[str, list[Change]]  # of each model whose units trained in different numbers of rounds, by that number
    notes: list[str]  # which models have no such rows, and why

    @property
    def models(self) -> list[str]:
        return list(self.layers[0].change)


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
        Path(options.out).mkdir(parents=True, exist_ok=True)
        methods = dict(zip(found.models, map(method_of, models), strict=True))
        plot_comparison(asdict(found), methods).savefig(Path(options.out, "diff.png"))
        write_json(Path(options.out, "diff.json"), asdict(found))
        say("", f"{options.out}/diff.png, diff.json")
    return 0


def compare(start: Checkpoint, models: Sequence[Checkpoint], *, group: int = 1) -> Comparison:
    """Measure the change of every parameter; `group` neighboring layers make a row."""
    anatomy = anatomy_of(meta_model(start.config))
    labels = [Path(model.name).name for model in models]
    if len(set(labels)) < len(labels):
        labels = [model.name for model in models]
    wholes = {name: Part(name, tuple(start.specs[name].shape)) for name in start.parameters}
    parts = parts_of(anatomy.units)
    sums = total_changes(start, models, [*parts, *(wholes[name] for name in anatomy.outside_layers)])

    def row(what: str, block: str, parts: Sequence[Part]) -> Change:
        elements = sum(part.numel for part in parts)
        change = (sum(total[part] for part in parts) / elements for total in sums)
        return Change(what, block, elements, dict(zip(labels, change, strict=True)))

    layers = []
    for first in range(0, anatomy.num_layers, group):
        last = min(first + group, anatomy.num_layers) - 1
        for block in BLOCKS:
            units = [unit for unit in anatomy.units if first <= unit.layer <= last and unit.block == block]
            what = str(first) if first == last else f"{first}-{last}"
            layers += [row(what, block, parts_of(units))] if units else []
    rounds, notes = {}, []
    for label, model in zip(labels, models, strict=True):
        if sentence := why_not_base(model, start):
            notes.append(f"no rounds of {label}: {sentence}")
            continue
        counts, in_part = rounds_trained(anatomy, start, model)
        if in_part:
            notes.append(f"no rounds of {label}: the {in_part} policy trained its units in part")
            continue
        by_count = {n: [u for u in anatomy.units if counts[u.name] == n] for n in sorted(set(counts.values()))}
        if len(by_count) > 1:
            rounds[label] = [row(str(n), "layers", parts_of(units)) for n, units in by_count.items()]
    ends = {"embeddings": anatomy.embeddings, "others": anatomy.others}
    outside = [row(what, "outside", [wholes[name] for name in names]) for what, names in ends.items() if names]
    return Comparison(start.name, layers, outside, rounds, notes)


def parts_of(units: Iterable[Unit]) -> list[Part]:
    """The parts of some units, of which two may share one."""
    return list(dict.fromkeys(part for unit in units for part in unit.parts))


def total_changes(start: Checkpoint, models: Sequence[Checkpoint], parts: Iterable[Part]) -> list[dict[Part, float]]:
    by_name: dict[str, list[Part]] = {}
    for part in parts:
        by_name.setdefault(part.parameter, []).append(part)
    sums: list[dict[Part, float]] = [{} for _ in models]
    for name, own in tqdm(by_name.items(), desc="comparing", unit="tensor", leave=False):
        before, holders = start.fp32(name), part_holding(own)
        for model, sum_of in zip(models, sums, strict=True):
            change = (model.fp32(name) - before).abs()
            total = torch.zeros(len(own), dtype=torch.float64)
            for values, indices in blocks(change, holders):
                if len(own) == 1:
                    total += values.sum(dtype=torch.float64)
                else:
                    total += torch.bincount(indices, values.double(), minlength=len(own))
            if not total.isfinite().all():
                raise HFTError(f"{name} holds NaN or infinity in {model.name} or in {start.name}")
            sum_of |= dict(zip(own, total.tolist(), strict=True))
    return sums


def part_holding(parts: Sequence[Part]) -> torch.Tensor:
    """Of each element of a parameter the index of the part that holds it."""
    indices = torch.zeros(parts[0].shape, dtype=torch.uint8 if len(parts) < 256 else torch.int32)
    for index, part in enumerate(parts):
        part.mark(indices, index)
    return indices


def rounds_trained(anatomy: Anatomy, start: Checkpoint, model: Checkpoint) -> tuple[dict[str, int], str]:
    """In how many rounds each unit trained between a start and a model; and the policy that trained some in part."""
    rounds = rounds_between(start, model)
    frozen = [set(one["frozen_units"]) for one in rounds]
    counts = {unit.name: sum(unit.name not in names for names in frozen) for unit in anatomy.units}
    selections = [one["selection"] for one in rounds]
    in_part = [s["policy"] for s in selections if s.get("policy") in ELEMENTWISE and s.get("granularity") != "unit"]
    return counts, in_part[0] if in_part else ""


def comparison_text(found: Comparison) -> str:
    models, names = found.models, list(dict.fromkeys(row.block for row in found.layers))

    def lines(rows: Sequence[Change]) -> list[list[str]]:
        whats = dict.fromkeys(row.what for row in rows)
        return [[w, *(f"{r.change[m]:.2e}" for r in rows if r.what == w for m in models)] for w in whats]

    heads = [name if model is models[-1] else "" for name in names for model in models]
    text: list[Sequence[str] | str] = [["", *heads], ["layer", *models * len(names)], *lines(found.layers)]
    text += ["", ["outside", *models], *lines(found.outside)]
    for model, rows in found.rounds.items():
        text += ["", f"units by the rounds in which they were trained in {model}", ["rounds", *models], *lines(rows)]
    text += ["", *found.notes] if found.notes else []
    return f"mean absolute change from {found.start}\n" + indented(aligned(text))


def method_of(model: Checkpoint) -> str:
    """The method of a run; the name of any other model."""
    config = model.folder / CONFIG_NAME
    return (read_saved_config(config) if config.exists() else {}).get("method") or Path(model.name).name


def plot_comparison(found: Mapping[str, Any], methods: Mapping[str, str]) -> Figure:
    """Attention and MLP over the layers, units over their rounds; a method has a color, its models have dashes."""
    from matplotlib.figure import Figure

    panels = [
        (title, "layer", [row for row in found["layers"] if row["block"] == block])
        for block, title in (("attention", "attention"), ("mlp", "MLP"))
    ]
    panels += [(f"units by how often {model} trained them", "rounds", rows) for model, rows in found["rounds"].items()]
    models, drawn, styles = list(found["layers"][0]["change"]), [methods[name] for name in methods], {}
    for number, name in enumerate(models):
        color, marker = style_of(methods[name])
        dashes = DASHES[drawn[:number].count(methods[name]) % len(DASHES)]
        styles[name] = {"color": color, "marker": marker, "markersize": 4, "linestyle": dashes, "label": name}
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
    columns = max(1, int(12 * 4.4 * len(panels) / (max(map(len, models)) + 7)))
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    figure.set_figheight(3.4 + 0.2 * -(-len(models) // columns))
    return figure


def draw_changes(axes: Axes, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, dict[str, Any]]) -> None:
    """A line per model over the layers or rounds of `rows`, as `diff.json` has them; `styles` are for `plot`."""
    from matplotlib.ticker import MaxNLocator

    x = [int(row["what"].partition("-")[0]) for row in rows]
    for model, style in styles.items():
        axes.plot(x, [row["change"][model] for row in rows], **style)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
