"""Runs a sequence: runs and a row of the matrix per task; resumes where it was killed."""

import gc
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hft.config import to_yaml
from hft.continual.config import RECIPE_NAME, SequencePlan
from hft.continual.data import SequenceData
from hft.continual.matrix import BASE_ROW, MATRIX_NAME, Matrix
from hft.continual.metrics import METRICS
from hft.continual.scoring import SUITE, score_tasks
from hft.errors import HFTError
from hft.jsonl import read_jsonl
from hft.machine import broadcast, is_main, reset_peak_memory, say
from hft.methods.strategy import Row
from hft.model.weights import local_folder
from hft.record.identity import differences
from hft.record.manifest import write_text
from hft.runs.config import comparable, read_saved_config
from hft.runs.plan import load_tokenizer, make_plan
from hft.runs.train import cannot_write_to, train

SEQUENCE_NAME = "sequence.yaml"  # in the sequence's folder: all its keys, written once its data are complete


def run_sequence(plan: SequencePlan, data: SequenceData) -> Matrix:
    """Run a sequence, or what is left of it; the matrix is the same in every process."""
    rounds = data.rounds(plan)
    broadcast(prepare(plan, data) if is_main() else None)
    tests = {task: read_jsonl(plan.data(f"{task}-test")) for task in plan.settings.tasks}
    matrix = broadcast(load_matrix(plan, tests) if is_main() else None)
    if plan.settings.score_start and not matrix.rounds:
        base, revision = plan.common["model_name_or_path"], plan.config(rounds[0][0]).revision
        start = str(local_folder(base, revision)) if revision else base
        add_row(plan, matrix, BASE_ROW, start, plan.out / BASE_ROW, tests)
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


def sequence_keys(plan: SequencePlan) -> dict[str, Any]:
    """All keys of a sequence and its runs, as `hft continual` takes them."""
    own = asdict(plan.settings) | plan.strategy.keys()
    own = {key: value for key, value in own.items() if value is not None and key != "score_batch_size"}
    first = {"round": plan.given_round} if plan.given_round else {}
    return plan.common | own | first | {"output_dir": str(plan.out), "run_name": plan.name}


def prepare(plan: SequencePlan, data: SequenceData) -> None:
    """Write what all runs have in common, and the rows of each, unless that is done; `sequence.yaml` comes last."""
    if (plan.out / SEQUENCE_NAME).exists():
        saved = comparable(read_saved_config(plan.out / SEQUENCE_NAME))
        if found := differences(comparable(sequence_keys(plan)), saved):
            raise HFTError(
                f"{plan.out} holds a sequence with other settings ({'; '.join(found)}); give the same, or another "
                "--output_dir"
            )
        return
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write_to(plan.out, error) from error
    write_text(plan.out / RECIPE_NAME, to_yaml(plan.common))
    data.shorten(load_tokenizer(plan.config(data.rounds(plan)[0][0])), plan)
    data.write(plan)
    write_text(plan.out / SEQUENCE_NAME, to_yaml(sequence_keys(plan)))


def load_matrix(plan: SequencePlan, tests: dict[str, list[Row]]) -> Matrix:
    if (plan.out / MATRIX_NAME).exists():
        return Matrix.load(plan.out)
    metrics = [list(METRICS[plan.settings.metrics[task]]) for task in tests]
    return Matrix(
        tasks=list(tests),
        metrics=[first for first, *_ in metrics],
        others={name: [] for name in sorted({name for _, *others in metrics for name in others})},
        counts=list(map(len, tests.values())),
        about={"strategy": plan.strategy.name, "method": plan.common.get("method"), "run": plan.name},
    )


def add_row(
    plan: SequencePlan, matrix: Matrix, name: str, model: str, folder: Path, tests: dict[str, list[Row]]
) -> None:
    """Score a model on test rows, and save the row of that name in the matrix; its scores go to `folder`."""
    settings = plan.settings
    limits = {"longest_answer": settings.max_answer_length, "batch_size": settings.score_batch_size}
    scores = broadcast(score_tasks(model, tests, settings.metrics, **limits, out=folder))
    free_memory()

    def row(metrics: list[str]) -> list[float | None]:
        found = map(scores.find, matrix.tasks, metrics)
        return [score.value if score else None for score in found]

    matrix.rounds.append(name)
    matrix.scores.append(row(matrix.metrics))
    for metric, rows in matrix.others.items():
        rows.append(row([metric] * len(matrix.tasks)))
    matrix.about |= {"dtype": scores.dtype, "versions": scores.versions}
    if is_main():
        matrix.save(plan.out)
        if len(matrix.after_rounds) == len(matrix.tasks):
            matrix.scores_of_sequence(SUITE, model, scores.model_sha256, settings.test_rows).save(plan.out)


def log_to_wandb(plan: SequencePlan, matrix: Matrix) -> str:
    """Log a sequence to wandb, and say where: each task's score, OP and BWT over the rounds, the matrix as a table."""
    import wandb

    from hft.runs.tracking import finish, open_run

    group = f"{Path(plan.common['model_name_or_path']).name} sft"  # that of its runs
    run, where = open_run(name=plan.name, group=group, job_type="sequence", config=sequence_keys(plan))
    rows = [[name, *row] for name, row in zip(matrix.rounds, matrix.scores, strict=True)]
    run.log({"matrix": wandb.Table(["round", *matrix.tasks], rows)})
    found = matrix.summary()
    for t, row in enumerate(matrix.after_rounds):
        scores = {task: value for task, value in zip(matrix.tasks, row, strict=True) if value is not None}
        run.log(scores | {"round": t + 1, "OP": found["op"][t], "BWT": found["bwt"][t]})
    finish()
    return where


def free_memory() -> None:
    gc.collect()
    reset_peak_memory()
