"""What every model of the stages scores on every task: its benchmark where the task has one, else its held-out loss."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hft.cpi.config import CPIPlan, suite_of
from hft.cpi.group import load_groups, run_names
from hft.cpi.probe import start_of
from hft.cpi.runs import TEST
from hft.errors import HFTError
from hft.evaluation.evaluate import evaluate, loss_on
from hft.evaluation.suites import Settings
from hft.jsonl import read_jsonl
from hft.machine import indented, say
from hft.record.manifest import write_json
from hft.record.scores import SCORES_FOLDER, Score
from hft.runs.result import RESULTS_NAME
from hft.text import aligned

SCORES_NAME = "scores.json"
ALONE = "{} alone"  # the model that was fine-tuned on a task alone, in the table


def score_models(plan: CPIPlan) -> None:
    """Score the base, the probes, and the models before and after each group, on each task, unless that is done."""
    groups, base = load_groups(plan), start_of(plan)
    models = models_of(plan, groups)
    *_, final = models.values()
    held_out = [loss_on(task, read_jsonl(plan.data_of(task) / TEST), final) for task in plan.tasks]
    found: dict[str, dict[str, Score]] = {}
    for name, folder in {"base": base, **models}.items():
        out = plan.out / "base" if name == "base" else folder  # the base may be the user's own folder, or the Hub's
        losses = evaluate(str(folder), "cpi", Settings(chat=False), out, held_out)
        found[name] = {task: losses.find(task) for task in plan.tasks}
        for task, benchmark in ((key, task.benchmark) for key, task in plan.tasks.items() if task.benchmark):
            settings = Settings(**plan.config.eval | {"tasks": (benchmark,)})
            score = evaluate(str(folder), suite_of(benchmark), settings, out).find(benchmark)
            found[name][task] = score or found[name][task]
    shutil.copytree(final / SCORES_FOLDER, plan.out / SCORES_FOLDER, dirs_exist_ok=True)  # where `hft paper` looks
    content = {name: {task: asdict(value) for task, value in by_task.items()} for name, by_task in found.items()}
    measured = measures(groups, found)
    write_json(plan.out / SCORES_NAME, {"scores": content, **measured})
    say("scores", indented(score_table(found, measured)), "", f"{plan.out / SCORES_NAME}")


def models_of(plan: CPIPlan, groups: Sequence[Sequence[str]]) -> dict[str, Path]:
    """The models that the stages have made so far, by their names in the table, in the order of the stages."""
    models, names = {ALONE.format(task): plan.probe_of(task) for task in sorted(plan.tasks)}, run_names(groups)
    models |= {f"backbone {name}": plan.out / "backbone" / name for name in names} | {"fused": plan.out / "fused"}
    models |= {name: plan.out / "groups" / name for name in names}
    *_, last = models.values()
    if not (last / RESULTS_NAME).exists():
        raise HFTError(f"{last} is not there, or not finished: run `hft cpi train` first")
    return {name: folder for name, folder in models.items() if folder.exists()}


def measures(groups: Sequence[Sequence[str]], found: Mapping[str, Mapping[str, Score]]) -> dict[str, Any]:
    """`normalized`, the final model's mean score relative to single-task SFT, and `forgetting` of each task.

    Forgetting is how much worse, in percent, the final model is than the model right after the task's group. A loss
    counts by its inverse. Both are ours: the paper's normalization cannot be recovered, and it has no forgetting rate.
    """
    *_, final = found.values()
    after = {task: found[run][task] for run, names in zip(run_names(groups), groups, strict=True) for task in names}
    forgetting = {task: 100 * (1 - ratio(final[task], score)) for task, score in after.items()}
    alone = {task: found[ALONE.format(task)][task] for task in after if ALONE.format(task) in found}
    if len(alone) < len(after):
        return {"forgetting": forgetting}
    normalized = sum(ratio(final[task], score) for task, score in alone.items()) / len(alone)
    return {"forgetting": forgetting, "normalized": normalized}


def ratio(score: Score, reference: Score) -> float:
    """How good a score is relative to another one of the same task; NaN where that is 0."""
    a, b = (score.value, reference.value) if score.higher_is_better else (reference.value, score.value)
    return a / b if b else float("nan")


def score_table(found: Mapping[str, Mapping[str, Score]], measured: Mapping[str, Any]) -> str:
    tasks = next(iter(found.values()))
    rows: list[list[str] | str] = [["", *tasks], ["", *(f"{one.metric}, {one.unit}" for one in tasks.values())]]
    rows += [[name, *(f"{by_task[task].value:.3f}" for task in tasks)] for name, by_task in found.items()]
    rows.append(["forgetting, %", *(f"{measured['forgetting'][task]:.2f}" for task in tasks)])
    if "normalized" in measured:
        rows.append(f"{measured['normalized']:.3f} of single-task SFT, mean over tasks (1: as good)")
    return aligned(rows)
