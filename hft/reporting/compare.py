"""`hft compare`: differences between models that answered the same rows, with intervals."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hft.errors import HFTError
from hft.evaluation.subject import folder_of
from hft.machine import say
from hft.reporting.collect import Group, LoadedRun, collect
from hft.reporting.columns import columns_of
from hft.reporting.measure import CHOOSE_ROWS, Column, Key, conditions_that_differ, parts_of
from hft.reporting.statistics import Curve, Difference, difference
from hft.text import aligned


@dataclass(frozen=True)
class Comparison:
    """A score, or the mean of some, of two groups of runs on the same rows."""

    column: Column
    difference: Difference
    scored: int  # rows that either of the two first runs answered

    @property
    def better(self) -> bool | None:
        """Whether the second group is better; None if the difference is not significant."""
        found = self.difference
        return (found.mean > 0) == self.column.higher_is_better if found.told_apart else None

    def sentence(self, before: str, after: str) -> str:
        found, unit = self.difference, "points" if self.column.unit == "%" else self.column.unit
        interval = "95% interval {:+.3g} to {:+.3g}".format(*found.interval)
        if self.better is None:
            power = f"; with 80% power this n detects {found.detectable:.2g} {unit}" if found.se else ""
            return f"{self.column.name}: no significant difference ({interval}){power}"
        word = "better" if self.better else "worse"
        return f"{self.column.name}: {after} is {word} than {before} by {abs(found.mean):.3g} {unit} ({interval})"

    def row(self) -> list[str]:
        found, digits = self.difference, 2 if self.column.unit == "%" else 4
        cells = [f"{value:.{digits}f}" for value in (found.before, found.after)]
        cells += [f"{found.mean:+.{digits}f}", f"{found.se:.{digits}f}"]
        cells += [" to ".join(f"{end:+.{digits}f}" for end in found.interval), f"{found.p:.2g}"]
        flips = "" if found.gained is None else f"{found.gained}/{found.lost}"
        rows = f"{found.rows:,}" + (f" of {self.scored:,}" if found.rows < self.scored else "")
        return [self.column.name, self.column.unit, *cells, flips, rows, "{}, {}".format(*found.seeds)]


def compare(before: Group, after: Group, column: Column) -> Comparison | str | None:
    """Compare two groups on a column; why they cannot be compared, or None if either was not scored."""
    runs = [sorted(group.runs, key=lambda run: str(run.order)) for group in (before, after)]
    tasks = [values_of([*runs[0], *runs[1]], key) for key in column.keys]
    for found in tasks:
        if found is None or isinstance(found, str):
            return found
    orders, first = [[run.order for run in group] for group in runs], len(runs[0])
    matched = orders[0] == orders[1] and len(set(orders[0])) == first > 1  # they saw the same batches one by one
    groups = [values[:first] for values, _ in tasks], [values[first:] for values, _ in tasks]
    return Comparison(column, difference(*groups, matched=matched), sum(count for _, count in tasks))


def values_of(runs: Sequence[LoadedRun], key: Key) -> tuple[np.ndarray, int] | str | None:
    """The values of runs on the rows that all answered, of shape (runs, rows), and the number of rows that any did."""
    suite, task, metric = key
    scored = [one for run in runs for one, _ in parts_of([key], run.scores)]
    if len(scored) < len(runs):
        return None
    for one in scored:
        if unlike := conditions_that_differ(scored[0], one, CHOOSE_ROWS):
            return f"scored under other conditions ({', '.join(unlike)})"
    tables = [run.rows(suite, task) for run in runs]
    if without := [run.folder.name for run, table in zip(runs, tables, strict=True) if table is None]:
        return f"the rows of {without[0]} were not kept; score it again with --log_samples true"
    if any(metric not in table or not pd.api.types.is_numeric_dtype(table[metric]) for table in tables):
        return f"{metric} is a number of the whole benchmark and not of its rows"
    values = pd.concat([table.set_index("row")[metric] for table in tables], axis=1)
    shared = values.dropna()
    if len(shared) < 2:
        return f"{len(shared)} of its rows was answered by all models; score them on the same"
    return shared.to_numpy().T, len(values)


def curves_of(groups: Sequence[Group], x: Column, y: Column) -> dict[str, Curve] | str:
    """The curve of each arm, in what it has more than the base on the same rows; a sentence if that cannot be said.

    None without two arms, one of them at two learning rates. Of groups with more seeds than others the first are taken.
    """
    placed = [group for group in groups if group.first.learning_rate and group.measure(x) and group.measure(y)]
    base = next((group.first for group in groups if group.first.method == "base" and group.measure(x)), None)
    if placed and base is None:
        return "the base shows what was forgotten: score it (hft eval BASE --task_data RUN), and report it too"
    arms = [group.arm for group in placed]
    if len(set(arms)) in (0, 1, len(arms)):
        return {}
    seeds = min(len(group.runs) for group in placed)
    runs = [run for group in placed for run in sorted(group.runs, key=lambda run: str(run.order))[:seeds]]
    cubes = []
    for column in (x, y):
        found = values_of([base, *runs], column.keys[0])
        if found is None or isinstance(found, str):
            return found or {}
        more = (found[0][1:] - found[0][0]) * (1 if column.higher_is_better else -1)
        cubes.append(more.reshape(len(placed), seeds, -1))
    return {arm: Curve(*(cube[[one == arm for one in arms]] for cube in cubes)) for arm in dict.fromkeys(arms)}


def main(arguments: Sequence[str]) -> int:
    """Compare scored models with the first one; runs that differ only in their seeds count as one."""
    parser = argparse.ArgumentParser(
        prog="hft compare",
        description="Compare models that answered the same rows with the first one: paired differences with their 95% "
        "intervals over rows and seeds. Runs that differ only in their seeds are one group, unless that leaves "
        "only one. For right and wrong answers gained/lost counts the rows that improved and worsened, and p is "
        "McNemar's; otherwise p is that of a paired t-test.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run, merge or model that hft eval scored")
    first, *others = groups_of(parser.parse_args(arguments).runs)
    for other in others:
        names = [group.label for group in (first, other)]
        if len(set(names)) < len(names) or first.first.model != other.first.model:
            names = [group.first.folder.name for group in (first, other)]
        say(*said([column for some in columns_of([first, other]).values() for column in some], first, other, names), "")
    return 0


def said(columns: Iterable[Column], first: Group, other: Group, names: Sequence[str]) -> list[str]:
    found = [(column, compare(first, other, column)) for column in columns]
    numbers = [one for _, one in found if isinstance(one, Comparison)]
    reasons = [f"{column.name}: no difference, {one}" for column, one in found if isinstance(one, str)]
    if not numbers and not reasons:
        raise HFTError(f"{names[0]} and {names[1]} have no score in common; run hft eval on both")
    head = ["", "unit", *names, "difference", "se", "95% interval", "p", "gained/lost", "rows", "seeds"]
    table = [aligned([head, *(one.row() for one in numbers)], left=2), ""] if numbers else []
    return [*table, *(one.sentence(*names) for one in numbers), *reasons]


def groups_of(models: Sequence[str]) -> list[Group]:
    """The groups of some models, in the order in which they were given."""
    folders = [folder_of(model).resolve() for model in models]
    groups = sorted(collect(models).groups, key=lambda group: min(folders.index(run.folder) for run in group.runs))
    runs = [run for group in groups for run in group.runs]
    weights = {next((found[0].model_sha256 for found in run.scores.values()), run.folder) for run in runs}
    if len(weights) < len(models):
        raise HFTError("one model was given twice, or a copy of it; give each once")
    if len(groups) == 1:
        groups = [Group([run], "", run.folder.name) for run in runs]
    if len(groups) < 2:
        raise HFTError("give two models or more: hft compare RUN RUN [RUN ...]")
    return groups
