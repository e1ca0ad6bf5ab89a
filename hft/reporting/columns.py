"""The columns in which models are compared: each score, and the paper's means of some."""

from collections.abc import Iterable

from hft.record.scores import Score
from hft.reporting.collect import Group
from hft.reporting.measure import Column, parts_of
from hft.reporting.paper import find_table

# Suites and tasks in the order of their tables, by the names that people know; others follow under their own.
SUITE_LABELS = {
    "quick": "task, drift and facts",
    "general": "general ability",
    "knowledge": "basic knowledge",
    "recent": "OpenCompass",
}
TASK_LABELS = {
    "task": "task loss",
    "drift": "drift",
    "kl": "KL to base",
    "facts": "facts",
    "mmlu_0shot": "MMLU 0-shot",
    "gsm8k": "GSM8K",
    "bbh": "BBH",
    "tydiqa": "TyDiQA",
    "truthfulqa": "TruthfulQA",
    "humaneval": "HumanEval",
    "mmlu_5shot": "MMLU 5-shot",
    "nq_open": "NQ",
    "triviaqa": "TriviaQA",
    "hotpotqa": "HotpotQA",
    "ifeval": "IFEval",
    "humaneval_greedy": "HumanEval greedy",
    "mbpp": "MBPP",
    "math": "MATH",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "nq": "NQ",
    "livecodebench": "LiveCodeBench",
}
TASK_LOSS = Column((("quick", "task", "loss"),), "task loss", "nats/token", False)
DRIFT = Column((("quick", "drift", "loss"),), "drift", "nats/token", False)
KL = Column((("quick", "kl", "kl"),), "KL to base", "nats/token", False)
FACTS = Column((("quick", "facts", "acc_centered"),), "facts, centered")
GENERAL = Column(find_table("1").keys("Overall"), "mean of 6")
KNOWLEDGE = Column(find_table("2").keys("Overall"), "mean of 3")
MEASURES = (TASK_LOSS, DRIFT, KL, FACTS, GENERAL, KNOWLEDGE)


def columns_of(groups: Iterable[Group], *, steps: bool = False) -> dict[str, list[Column]]:
    """The columns of each suite, or with `steps` of its checkpoints; last the paper's means of tasks that are there."""
    runs = [run for group in groups for run in group.runs]
    scored = [one for run in runs for one in (run.steps.values() if steps else [run.scores])]
    found: dict[str, dict[tuple[str, str], Score]] = {}
    for suite, scores in (item for one in scored for item in one.items()):
        for score in scores.scores:
            found.setdefault(suite, {}).setdefault((score.task, score.metric), score)
    columns: dict[str, list[Column]] = {}
    for suite in sorted(found, key=lambda name: (rank(name, SUITE_LABELS), name)):
        tasks, columns[suite] = [task for task, _ in found[suite]], []
        for (task, metric), score in sorted(found[suite].items(), key=lambda item: rank(item[0][0], TASK_LABELS)):
            label = TASK_LABELS.get(task, task.replace("_", " "))
            if tasks.count(task) > 1:
                label += f", {metric.removeprefix('acc_').replace('_', ' ')}"
            columns[suite].append(Column(((suite, task, metric),), label, score.unit, score.higher_is_better))
        means = [mean for mean in (GENERAL, KNOWLEDGE) if mean.suite == suite]
        columns[suite] += [mean for mean in means if any(parts_of(mean.keys, one) for one in scored)]
    return columns


def rank(name: str, names: Iterable[str]) -> int:
    return next((index for index, other in enumerate(names) if other == name), 1000)
