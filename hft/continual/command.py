"""`hft continual`: plan a sequence, and run it; rerun the command to resume."""

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from hft.config import to_yaml
from hft.continual.config import RECIPE_NAME, SequencePlan, SequenceRun, parse_sequence
from hft.continual.data import SequenceData
from hft.continual.matrix import BASE_ROW, MATRIX_NAME, Matrix
from hft.continual.metrics import METRICS, SUITE, benchmark_of
from hft.errors import DoesNotFit, HFTError
from hft.evaluation.evaluate import evaluate
from hft.evaluation.suites import Settings
from hft.jsonl import read_jsonl
from hft.machine import broadcast, indented, is_main, leave_process_group, reset_peak_memory, say
from hft.methods.strategy import Row
from hft.model.weights import local_folder
from hft.planning.fit import why_state_does_not_fit
from hft.planning.forecast import Machine, candidate_of
from hft.planning.memory import GIB
from hft.record.identity import differences
from hft.record.manifest import write_text
from hft.runs.config import Config, comparable, read_saved_config
from hft.runs.plan import Batches, load_tokenizer, make_plan
from hft.runs.train import cannot_write_to, train
from hft.text import aligned

NEEDED = ("lm_eval", "rapidfuzz", "rouge_score", "scipy")
SEQUENCE_NAME = "sequence.yaml"  # in the sequence's folder: all its keys, written once its data are complete


def main(arguments: Sequence[str]) -> int:
    """Plan a sequence, print its commands, and run it: `--config RECIPE.yaml [METHOD.yaml ...] [--key value ...]`."""
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise HFTError(f"a sequence of tasks needs {', '.join(missing)}: pip install 'half-fine-tuning[continual]'")
    plan, machine = parse_sequence(arguments)
    data = SequenceData(plan)
    say("resolved config", indented(to_yaml(plan.keys)))
    with tempfile.TemporaryDirectory() as folder:
        planned = plan_runs(plan, data, machine, Path(folder))
        say("runs", indented(table(planned)), "")
        if not plan.dry_run and (misfit := next((run.misfit for run in planned if run.misfit), None)):
            raise DoesNotFit(misfit)
        if not (machine.gpus or planned[0].misfit):
            first = make_plan(planned[0].config)
            say("first run", indented(first.report()))
    if data.notes:
        say("notes on the data", indented("\n".join(data.notes)), "")
    say("commands", *(f"  {plan.command(run)}" for runs in data.rounds(plan) for run in runs), "")
    if plan.dry_run:
        say("stopped here: no weights were loaded, nothing was written")
        say(f"the sequence writes {plan.out}/recipe.yaml and {plan.out}/data first, which the commands need")
        return 0
    matrix = run_sequence(plan, data)
    say("result", indented(matrix.table()), "", indented(matrix.report()), "", f"{plan.out / MATRIX_NAME}")
    if is_main() and "wandb" in first.args.report_to:
        say(log_to_wandb(plan, matrix))
    leave_process_group()
    return 0


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sequence, before it starts, as if it started from the base."""

    run: SequenceRun
    config: Config
    steps: int | None  # None where rows are packed
    size: float  # bytes per device, with activations where they are known
    flops: float | None  # of the whole run, over all devices; None where they are not known
    misfit: str | None  # a sentence if a device has less than the run takes
    unknown: str | None  # why activations and FLOPs are not known


def plan_runs(plan: SequencePlan, data: SequenceData, machine: Machine, folder: Path) -> list[PlannedRun]:
    """Plan every run of a sequence, its rows in another folder, from the base, whose shapes all of them have."""
    here, planned = replace(plan, out=folder), []
    data.write(here)
    for run in (run for runs in data.rounds(here) for run in runs):
        own = {key: value for key, value in run.flags.items() if key not in ("model_name_or_path", "previous_run")}
        planned.append(plan_run(run, here.config(own | {"resume_from_checkpoint": "none"}), machine))
    return planned


def plan_run(run: SequenceRun, config: Config, machine: Machine) -> PlannedRun:
    planned, _ = candidate_of(config, machine.gpus)
    args, engine = planned.args, planned.engine
    steps = Batches(config, args, engine.processes, len(run.rows)).steps
    size, flops, unknown = planned.state.total, None, None
    try:
        size = planned.memory.total
        if steps is not None:
            flops = planned.step.flops * args.gradient_accumulation_steps * engine.processes * steps
            flops += planned.step.sampling
    except HFTError as error:  # an adapter or a schedule
        unknown = str(error)
    available = machine.available(engine)
    short = 0 if available is None else (size - available) / GIB
    why = None if machine.gpus else why_state_does_not_fit(planned)
    why = why or (f"short by {short:.1f} GiB" if short > 0 else None)
    return PlannedRun(run, config, steps, size, flops, why and f"{run.name} does not fit: {why}", unknown)


def table(runs: Sequence[PlannedRun]) -> str:
    """The runs in columns, the sum of their FLOPs, and what is not known or does not fit."""
    rows: list[list[str] | str] = [["run", "rows", "steps", "GiB per device", "FLOPs"]]
    for one in runs:
        steps = "-" if one.steps is None else f"{one.steps:,}"
        flops = "-" if one.flops is None else f"{one.flops:.3g}"
        rows.append([one.run.name, f"{len(one.run.rows):,}", steps, f"{one.size / GIB:.2f}", flops])
    if all(one.flops is not None for one in runs):
        rows.append(f"{sum(one.flops for one in runs):.3g} FLOPs in all")
    notes = [one.unknown for one in runs] + [one.misfit for one in runs]
    return aligned([*rows, *dict.fromkeys(filter(None, notes))])


def run_sequence(plan: SequencePlan, data: SequenceData) -> Matrix:
    """Run a sequence, or what is left of it; the matrix is the same in every process."""
    rounds, settings = data.rounds(plan), plan.settings
    matrix = broadcast(prepare(plan, data) if is_main() else None)
    tests = {task: read_jsonl(plan.data(f"{task}-test")) for task in settings.tasks}
    if settings.score_start and not matrix.rounds:
        base, revision = plan.common["model_name_or_path"], plan.config(rounds[0][0].flags).revision
        start = str(local_folder(base, revision)) if revision else base
        add_row(plan, matrix, BASE_ROW, start, plan.out / BASE_ROW, tests)
    done = len(matrix.after_rounds)
    for number, runs in enumerate(rounds[done:], done):
        for run in runs:
            say("", f"round {number + 1} of {len(rounds)}", plan.command(run), "")
            result = train(make_plan(plan.config(run.flags)))
            free_memory()
            if not result.ok:
                raise HFTError(f"{plan.out / run.name} does not pass verify: a frozen tensor changed")
        seen = settings.tasks[: None if settings.score_unseen else number + 1]
        folder = plan.out / runs[-1].name
        add_row(plan, matrix, settings.tasks[number], str(folder), folder, {task: tests[task] for task in seen})
        say("", matrix.table(), "")
    return matrix


def prepare(plan: SequencePlan, data: SequenceData) -> Matrix:
    """Write what all runs have in common, and the rows of each, unless that is done; returns the matrix so far."""
    if (plan.out / SEQUENCE_NAME).exists():
        saved = comparable(read_saved_config(plan.out / SEQUENCE_NAME))
        if found := differences(comparable(plan.keys), saved):
            raise HFTError(f"{plan.out} holds another sequence ({'; '.join(found)}); give another --output_dir")
    else:
        try:
            plan.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write_to(plan.out, error) from error
        write_text(plan.out / RECIPE_NAME, to_yaml(plan.common))
        data.shorten(load_tokenizer(plan.config(data.rounds(plan)[0][0].flags)), plan)
        data.write(plan)
        write_text(plan.out / SEQUENCE_NAME, to_yaml(plan.keys))
    if (plan.out / MATRIX_NAME).exists():
        return Matrix.load(plan.out)
    metrics = [list(METRICS[plan.settings.metrics[task]]) for task in data.tests]
    return Matrix(
        tasks=list(data.tests),
        metrics=[first for first, *_ in metrics],
        others={name: [] for name in sorted({name for _, *others in metrics for name in others})},
        counts=[len(rows) for rows in data.tests.values()],
        about={"strategy": plan.strategy.name, "method": plan.common.get("method"), "run": plan.name},
    )


def add_row(
    plan: SequencePlan, matrix: Matrix, name: str, model: str, folder: Path, tests: dict[str, list[Row]]
) -> None:
    """Score a model on test rows, and save the row of that name in the matrix; its scores go to `folder`."""
    settings, longest = plan.settings, plan.settings.max_answer_length
    benchmarks = [benchmark_of(task, rows, settings.metrics[task], longest) for task, rows in tests.items()]
    how = Settings(chat=False, batch_size=settings.score_batch_size)
    scores = broadcast(evaluate(model, SUITE, how, folder, benchmarks))
    free_memory()
    matrix.add(name, scores)
    if is_main():
        matrix.save(plan.out)
        if len(matrix.after_rounds) == len(matrix.tasks):
            matrix.totals(scores, settings.test_rows).save(plan.out)


def log_to_wandb(plan: SequencePlan, matrix: Matrix) -> str:
    """Log a sequence to wandb, and say where: each task's score, OP and BWT over the rounds, the matrix as a table."""
    import wandb

    from hft.runs.tracking import finish, open_run

    group = f"{Path(plan.common['model_name_or_path']).name} sft"  # that of its runs
    run, where = open_run(name=plan.name, group=group, job_type="sequence", config=plan.keys)
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
