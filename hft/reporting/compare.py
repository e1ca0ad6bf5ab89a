"""`hft compare`: what tells models apart that answered the same rows, and what does not."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from hft.errors import HFTError
from hft.machine import say
from hft.record.identity import differences
from hft.record.scores import Score, Scores, rows_of
from hft.reporting.collect import Group, LoadedRun, collect, run_config
from hft.reporting.measure import Key
from hft.reporting.paired import Difference, difference
from hft.text import aligned


@dataclass(frozen=True)
class Comparison:
    """One score of two groups of runs on the same rows."""

    score: Score  # of the first run, for names, unit and direction
    before: float  # means over rows and seeds
    after: float
    difference: Difference

    @property
    def better(self) -> bool | None:
        """Whether the second group is better; None if the groups are not told apart."""
        found = self.difference
        return (found.mean > 0) == self.score.higher_is_better if found.told_apart else None


def compare(before: Group, after: Group, key: Key) -> Comparison | str | None:
    """Compare two groups on one score; a sentence if they cannot be compared, None if either was not scored."""
    suite, task, metric = key
    runs = [*before.runs, *after.runs]
    scored = [run.scores[suite].of(task) if suite in run.scores else None for run in runs]
    if None in scored:
        return None
    if unlike := conditions_that_differ(scored):
        return f"{task} was scored under other conditions ({', '.join(unlike)}); score the models alike to compare them"
    tables = [rows_of(run.folder, suite, task) for run in runs]
    if without := [run.folder.name for run, table in zip(runs, tables, strict=True) if table is None]:
        return f"the rows of {task} were not kept for {without[0]}; score it again with --log_samples true"
    if any(metric not in table or not pd.api.types.is_numeric_dtype(table[metric]) for table in tables):
        return None  # a number of the whole benchmark, not of its rows
    values = pd.concat([table.set_index("row")[metric] for table in tables], axis=1, join="inner").dropna()
    if len(values) < 2:
        return f"fewer than two rows of {task} were scored by all models"
    groups = values.to_numpy().T[: len(before.runs)], values.to_numpy().T[len(before.runs) :]
    score = scored[0].find(task, metric)
    return Comparison(score, *(group.mean() for group in groups), difference(*groups, matched=matched(before, after)))


def conditions_that_differ(scored: Sequence[Scores]) -> list[str]:
    """The names of the conditions under which some scores were measured that are not the same for all."""
    conditions = [
        {"settings": one.settings, "rows": one.data, "versions": one.versions, "dtype": one.dtype}
        | {"benchmark": one.inputs.get("benchmark")}
        for one in scored
    ]
    return sorted({name for other in conditions[1:] for name in differences(conditions[0], other)})


def matched(before: Group, after: Group) -> bool:
    """Whether the runs of two groups saw the same batches one by one."""
    orders = [[order_of_batches(run) for run in group.runs] for group in (before, after)]
    return len(orders[0]) > 1 and orders[0] == orders[1] and len(set(orders[0])) == len(orders[0])


def order_of_batches(run: LoadedRun) -> tuple[int | None, ...]:
    config = run_config(run.folder)
    return config.get("seed"), config.get("data_seed")


def comparisons(before: Group, after: Group) -> Iterator[Comparison | str]:
    """All scores that both groups have, in the order of the first one's; what cannot be compared is said once."""
    said = set()
    for suite, found in before.first.scores.items():
        for score in found.scores:
            one = compare(before, after, (suite, score.task, score.metric))
            if one is not None and one not in said:
                said.add(one if isinstance(one, str) else "")
                yield one


def sentence(one: Comparison, before: str, after: str) -> str:
    """What a comparison says."""
    score, found = one.score, one.difference
    low, high = found.interval
    seeds = f" and {found.seeds} seeds" if found.seeds > 1 else ", n = 1 seed"
    name = f"{score.task} ({score.metric})"
    interval = f"95% interval {low:+.3g} to {high:+.3g}, {found.rows:,} rows{seeds}"
    if one.better is None:
        return f"{name}: not told apart ({interval}); these rows would show {found.detectable:.2g} {score.unit}"
    word = "better" if one.better else "worse"
    return f"{name}: {after} is {word} than {before} by {abs(found.mean):.3g} {score.unit} ({interval})"


def table(found: Iterable[Comparison], before: str, after: str) -> str:
    rows = [["", "metric", before, after, "difference", "95% interval", "p", "gained/lost", "rows", "seeds"]]
    for one in found:
        score, delta = one.score, one.difference
        low, high = delta.interval
        flips = "" if delta.gained is None else f"{delta.gained}/{delta.lost}"
        cells = [f"{one.before:.3f}", f"{one.after:.3f}", f"{delta.mean:+.3f}", f"{low:+.3f} to {high:+.3f}"]
        rows.append([score.task, score.metric, *cells, f"{delta.p:.3g}", flips, f"{delta.rows:,}", str(delta.seeds)])
    return aligned(rows, left=2)


def main(arguments: Sequence[str]) -> int:
    """Compare scored models with the first one; runs that differ only in their seeds count as one."""
    parser = argparse.ArgumentParser(
        prog="hft compare",
        description="Compare models that answered the same rows with the first one: paired differences with their 95% "
        "intervals over rows and seeds. Runs that differ only in their seeds are one group. gained/lost are rows that "
        "became right and wrong; p is McNemar's for them, otherwise that of the paired t-test.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, merge or model that hft eval scored")
    folders = parser.parse_args(arguments).runs
    found, order = collect(folders), [Path(folder).resolve() for folder in folders]
    groups = sorted(found.groups, key=lambda group: min(order.index(run.folder) for run in group.runs))
    if len(groups) < 2:
        raise HFTError("give two models that differ in more than their seeds: hft compare RUN RUN [RUN ...]")
    first, *others = groups
    for other in others:
        names = [group.label if len(found.models) == 1 else group.first.folder.name for group in (first, other)]
        parts = list(comparisons(first, other))
        if not parts:
            raise HFTError(f"{names[0]} and {names[1]} have no score in common; run hft eval on both")
        numbers = [part for part in parts if isinstance(part, Comparison)]
        notes = [part for part in parts if isinstance(part, str)]
        say(*([table(numbers, *names), ""] if numbers else []), *(sentence(one, *names) for one in numbers), *notes, "")
    return 0
