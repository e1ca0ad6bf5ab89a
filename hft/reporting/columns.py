"""The columns in which models are compared: each score, and the paper's means of some."""

from collections.abc import Iterable, Mapping

from hft.evaluation.suites import SUITES
from hft.record.scores import Score, SuiteScores
from hft.reporting.collect import Group
from hft.reporting.measure import Column, parts_of
from hft.reporting.paper import find_table, tables

TASK_LOSS = Column((("quick", "task", "loss"),), "task loss", "nats/token", False)
DRIFT = Column((("quick", "drift", "loss"),), "drift", "nats/token", False)
KL = Column((("quick", "kl", "kl"),), "KL to base", "nats/token", False)
FACTS = Column((("quick", "facts", "acc_centered"),), "facts, centered")
GENERAL = Column(find_table("1").keys("Overall"), "mean of 6")
KNOWLEDGE = Column(find_table("2").keys("Overall"), "mean of 3")
MEASURES = (TASK_LOSS, DRIFT, KL, FACTS, GENERAL, KNOWLEDGE)
# The names that people know, in the order of their tables; other scores follow under their own.
LABELS = {column.keys[0]: column.label for column in (TASK_LOSS, DRIFT, KL, FACTS)}
LABELS |= {key: name for table in tables().values() for name, key in table.scores.items()}


def columns_of(groups: Iterable[Group], *, steps: bool = False) -> dict[str, list[Column]]:
    """The columns of each suite, or with `steps` of its checkpoints; last the paper's means of tasks that are there."""
    runs = [run for group in groups for run in group.runs]
    scored = [one for run in runs for one in (run.steps.values() if steps else [run.scores])]
    suites = sorted({suite for one in scored for suite in one}, key=lambda name: (order(name, SUITES), name))
    return {suite: columns_of_suite(suite, scored) for suite in suites}


def columns_of_suite(suite: str, scored: Iterable[Mapping[str, SuiteScores]]) -> list[Column]:
    found: dict[tuple[str, str, str], Score] = {}
    for score in (score for one in scored if suite in one for score in one[suite].scores):
        found.setdefault((suite, score.task, score.metric), score)
    tasks = [task for _, task, _ in found]
    columns = []
    for key in sorted(found, key=lambda key: order(key, LABELS)):
        _, task, metric = key
        name = task if tasks.count(task) == 1 else f"{task}, {metric.removeprefix('acc_')}"
        label = LABELS.get(key, name.replace("_", " "))
        columns.append(Column((key,), label, found[key].unit, found[key].higher_is_better))
    means = [mean for mean in (GENERAL, KNOWLEDGE) if mean.keys[0][0] == suite]
    return columns + [mean for mean in means if any(parts_of(mean.keys, one) for one in scored)]


def order(name: object, names: Iterable[object]) -> int:
    return [*names, name].index(name)
