"""`hft compare`: what tells models apart that answered the same rows, and what does not."""

from __future__ import annotations

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
from hft.reporting.measure import Column, Key, conditions_that_differ
from hft.reporting.paired import Difference, difference
from hft.text import aligned

# These only choose rows, and those that both answered are compared.
CHOOSE_ROWS = ("limit", "paper_subsets")


@dataclass(frozen=True)
class Comparison:
    """A score, or the mean of some, of two groups of runs on the same rows."""

    column: Column
    difference: Difference
    scored: int  # rows that either of the two first runs answered

    @property
    def better(self) -> bool | None:
        """Whether the second group is better; None if the groups are not told apart."""
        found = self.difference
        return (found.mean > 0) == self.column.higher_is_better if found.told_apart else None

    def sentence(self, before: str, after: str) -> str:
        """What it says."""
        found, unit = self.difference, "points" if self.column.unit == "%" else self.column.unit
        seeds = "n = 1 seed" if found.seeds == (1, 1) else "{} and {} seeds".format(*found.seeds)
        rows = f"{found.rows:,} rows" + (f" that both answered of {self.scored:,}" if found.rows < self.scored else "")
        test = "McNemar's p" if found.gained is not None else "p"
        numbers = "95% interval {:+.3g} to {:+.3g}".format(*found.interval)
        numbers += f", {test} = {found.p:.2g}, {rows}, {seeds}"
        if self.better is None:
            power = f"; this n would show {found.detectable:.2g} {unit} in 80% of experiments" if found.se else ""
            return f"{self.column.name}: not told apart ({numbers}){power}"
        word = "better" if self.better else "worse"
        return f"{self.column.name}: {after} is {word} than {before} by {abs(found.mean):.3g} {unit} ({numbers})"


def compare(before: Group, after: Group, column: Column) -> Comparison | str | None:
    """Compare two groups on a column; a sentence if they cannot be compared, None if either was not scored."""
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
    scored = [run.scores[suite].of(task) if suite in run.scores else None for run in runs]
    if None in scored or None in (one.find(task, metric) for one in scored):
        return None
    for run, one in zip(runs, scored, strict=True):
        if unlike := conditions_that_differ(scored[0], one, CHOOSE_ROWS):
            both = f"{runs[0].folder.name} and {run.folder.name}"
            return f"{task}: no difference, {both} were scored under other conditions ({', '.join(unlike)})"
    tables = [run.rows(suite, task) for run in runs]
    if without := [run.folder.name for run, table in zip(runs, tables, strict=True) if table is None]:
        return f"{task}: no difference, the rows of {without[0]} were not kept; score it again with --log_samples true"
    if any(metric not in table or not pd.api.types.is_numeric_dtype(table[metric]) for table in tables):
        return f"{task}, {metric}: no difference, it is a number of the whole benchmark and not of its rows"
    values = pd.concat([table.set_index("row")[metric] for table in tables], axis=1)
    shared = values.dropna()
    if len(shared) < 2:
        return f"{task}: no difference, {len(shared)} of its rows was answered by all models; score them on the same"
    return shared.to_numpy().T, len(values)


def table(found: Iterable[Comparison], before: str, after: str) -> str:
    rows = [["", "unit", before, after, "difference", "se", "95% interval", "p", "gained/lost", "rows", "seeds"]]
    for one in found:
        delta = one.difference
        digits = 2 if one.column.unit == "%" else 4
        cells = [f"{value:.{digits}f}" for value in (delta.before, delta.after)]
        cells += [f"{delta.mean:+.{digits}f}", f"{delta.se:.{digits}f}"]
        cells += [" to ".join(f"{end:+.{digits}f}" for end in delta.interval), f"{delta.p:.2g}"]
        flips = "" if delta.gained is None else f"{delta.gained}/{delta.lost}"
        rows.append([one.column.name, one.column.unit, *cells, flips, f"{delta.rows:,}", "{}, {}".format(*delta.seeds)])
    return aligned(rows, left=2)


def main(arguments: Sequence[str]) -> int:
    """Compare scored models with the first one; runs that differ only in their seeds count as one."""
    parser = argparse.ArgumentParser(
        prog="hft compare",
        description="Compare models that answered the same rows with the first one: paired differences with their 95% "
        "intervals over rows and seeds. Runs that differ only in their seeds are one group, unless there is no other. "
        "gained/lost are rows that went up and down, of right and wrong answers; p is then McNemar's, otherwise that "
        "of a paired t-test.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run, merge or model that hft eval scored")
    first, *others = groups_of(parser.parse_args(arguments).runs)
    for other in others:
        names = [group.label for group in (first, other)]
        if len(set(names)) < len(names) or first.first.model != other.first.model:
            names = [group.first.folder.name for group in (first, other)]
        columns = [column for of_suite in columns_of([first, other]).values() for column in of_suite]
        found = dict.fromkeys(compare(first, other, column) for column in columns)  # one reason may hold for several
        numbers = [one for one in found if isinstance(one, Comparison)]
        reasons = [one for one in found if isinstance(one, str)]
        if not numbers and not reasons:
            raise HFTError(f"{names[0]} and {names[1]} have no score in common; run hft eval on both")
        sentences = [one.sentence(*names) for one in numbers]
        say(*([table(numbers, *names), ""] if numbers else []), *sentences, *reasons, "")
    return 0


def groups_of(models: Sequence[str]) -> list[Group]:
    """The groups of some models, in the order in which they were given."""
    folders = [folder_of(model).resolve() for model in models]
    groups = sorted(collect(models).groups, key=lambda group: min(folders.index(run.folder) for run in group.runs))
    runs = [run for group in groups for run in group.runs]
    weights = {next((found[0].model_sha256 for found in run.scores.values()), run.folder) for run in runs}
    if len(weights) < len(models):
        raise HFTError("one model was given twice, or a copy of it; give each once")
    if len(groups) == 1:
        groups = [Group([run], "", "", run.folder.name) for run in runs]
    if len(groups) < 2:
        raise HFTError("give two models or more: hft compare RUN RUN [RUN ...]")
    return groups
