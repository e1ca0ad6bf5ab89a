"""Runs a sequence: for each task its runs and a row of the matrix; it resumes where it was killed."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from hft.config import to_yaml
from hft.continual.config import RECIPE_NAME, Run, SequencePlan
from hft.continual.data import Data, write_rows
from hft.continual.gradients import read_rows
from hft.continual.matrix import MATRIX_NAME, START, Matrix
from hft.continual.metrics import METRICS
from hft.continual.scoring import SUITE, score
from hft.errors import HFTError
from hft.machine import broadcast, is_main, reset_peak_memory, say
from hft.methods.strategy import Row
from hft.record.identity import differences
from hft.record.manifest import write_text
from hft.runs.config import comparable, read_config
from hft.runs.plan import RunPlan, load_tokenizer, make_plan
from hft.runs.train import train

SEQUENCE_NAME = "sequence.yaml"  # in the sequence's folder: all its keys, written once its data are complete


def first_plan(plan: SequencePlan, run: Run, rows: list[Row]) -> RunPlan:
    """The plan of the first run, made before the sequence has written anything.

    Raises:
        HFTError: the run cannot be made as asked, whatever the machine.
    """
    with tempfile.TemporaryDirectory() as temporary:
        write_rows(path := Path(temporary) / f"{run.name}.jsonl", rows)
        flags = run.flags | {"dataset_name": str(path), "resume_from_checkpoint": "none"}
        return make_plan(plan.config(replace(run, flags=flags)))


def run_sequence(plan: SequencePlan, data: Data) -> Matrix:
    """Run a sequence, or what is left of it.

    Returns:
        The matrix, the same in every process.

    Raises:
        HFTError: the folder holds another sequence, or a run cannot be made or does not pass verify.
    """
    rounds = data.runs(plan)
    broadcast(prepare(plan, data) if is_main() else None)
    tests = {task: read_rows(plan.data(f"{task}-test")) for task in plan.settings.tasks}
    matrix = broadcast(load_matrix(plan, tests) if is_main() else None)
    if plan.settings.score_start and not matrix.rounds:
        add_row(plan, matrix, START, plan.common["model_name_or_path"], plan.out / START, tests)
    done = len(matrix.after_rounds)
    for number, runs in enumerate(rounds[done:], done):
        for run in runs:
            say("", f"round {number + 1} of {len(rounds)}", plan.command(run), "")
            result = train(make_plan(plan.config(run)))
            free_memory()
            if not result.ok:
                raise HFTError(f"{plan.out / run.name} does not pass verify: a frozen tensor changed")
        seen = plan.settings.tasks[: None if plan.settings.score_unseen else number + 1]
        folder = plan.out / runs[-1].name
        add_row(plan, matrix, runs[0].task, str(folder), folder, {task: tests[task] for task in seen})
        say("", matrix.table(), "")
    return matrix


def check_same_sequence(plan: SequencePlan) -> None:
    """Refuse a folder that holds another sequence.

    Raises:
        HFTError: it does; the sentence names every key that differs.
    """
    ours, theirs = (comparable(values) for values in (keys_of(plan), read_config(plan.out / SEQUENCE_NAME)))
    if found := differences(ours, theirs):
        raise HFTError(
            f"{plan.out} holds a sequence with other settings ({'; '.join(found)}); give the same, or another "
            "--output_dir"
        )


def keys_of(plan: SequencePlan) -> dict:
    """All keys of a sequence and its runs, as `hft continual` takes them."""
    own = asdict(plan.settings) | plan.strategy.keys()
    own = {key: value for key, value in own.items() if value is not None and key not in ("order", "score_batch_size")}
    return plan.common | own | {"output_dir": str(plan.out)}


def prepare(plan: SequencePlan, data: Data) -> None:
    """Write what all runs have in common, and the rows of each, unless that is done; `sequence.yaml` comes last.

    Raises:
        HFTError: the folder holds another sequence, or cannot be written.
    """
    if (plan.out / SEQUENCE_NAME).exists():
        check_same_sequence(plan)
        return
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        write_text(plan.out / RECIPE_NAME, to_yaml(plan.common))
        data.shorten(load_tokenizer(plan.config(data.runs(plan)[0][0])), plan)
        data.write(plan)
        write_text(plan.out / SEQUENCE_NAME, to_yaml(keys_of(plan)))
    except OSError as error:
        raise HFTError(f"cannot write to output_dir {plan.out}: {error.strerror}") from error


def load_matrix(plan: SequencePlan, tests: dict[str, list[Row]]) -> Matrix:
    """The matrix of the rows that are complete."""
    if (plan.out / MATRIX_NAME).exists():
        return Matrix.load(plan.out)
    tasks = plan.settings.tasks
    others = {name for task in tasks for name in list(METRICS[plan.settings.metrics[task]])[1:]}
    return Matrix(
        tasks=tasks,
        metrics=[next(iter(METRICS[plan.settings.metrics[task]])) for task in tasks],
        others={name: [] for name in sorted(others)},
        counts=[len(tests[task]) for task in tasks],
        about={"strategy": plan.strategy.name, "method": plan.common.get("method"), "run": plan.name},
    )


def add_row(
    plan: SequencePlan, matrix: Matrix, name: str, model: str, folder: Path, tests: dict[str, list[Row]]
) -> None:
    """Score a model on some tasks, and save the row.

    Args:
        name: of the row.
        model: what is scored.
        folder: where its scores go.
        tests: the rows of the tasks that it is scored on.
    """
    longest, batch = plan.settings.max_answer_length, plan.settings.score_batch_size
    metrics = plan.settings.metrics
    scores = broadcast(score(model, tests, metrics, longest_answer=longest, batch_size=batch, out=folder))
    free_memory()

    def row(metric_of: dict[str, str]) -> list[float | None]:
        found = [scores.find(task, metric_of[task]) if task in metric_of else None for task in matrix.tasks]
        return [one.value if one else None for one in found]

    matrix.rounds.append(name)
    matrix.scores.append(row(dict(zip(matrix.tasks, matrix.metrics, strict=True))))
    for metric, rows in matrix.others.items():
        rows.append(row(dict.fromkeys(matrix.tasks, metric)))
    matrix.about |= {"dtype": scores.dtype, "versions": scores.versions}
    if is_main():
        matrix.save(plan.out)
        if matrix.is_complete:
            limit = plan.settings.test_rows
            matrix.scores_of_sequence(SUITE, model, scores.model_sha256, limit).save(plan.out)


def log_to_wandb(plan: SequencePlan, matrix: Matrix) -> str:
    """Log a sequence to wandb: each task's score, OP and BWT over the rounds, and the matrix as a table.

    Returns:
        A sentence on where to find it.
    """
    import wandb

    from hft.runs.tracking import finish, open_run

    run, where = open_run(name=plan.name, job_type="sequence", config=keys_of(plan))
    rows = [[name, *row] for name, row in zip(matrix.rounds, matrix.scores, strict=True)]
    run.log({"matrix": wandb.Table(["round", *matrix.tasks], rows)})
    found = matrix.summary()
    for t, row in enumerate(matrix.after_rounds):
        scores = {task: value for task, value in zip(matrix.tasks, row, strict=True) if value is not None}
        run.log(scores | {"round": t + 1, "OP": found["op"][t], "BWT": found["bwt"][t]})
    finish()
    return where


def free_memory() -> None:
    """Let go of what a run or a scored model held."""
    gc.collect()
    reset_peak_memory()
