"""What each run of a sequence will take, known before the first one starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hft.continual.config import SequencePlan, SequenceRun
from hft.continual.data import SequenceData
from hft.errors import HFTError
from hft.planning.fit import why_state_does_not_fit
from hft.planning.forecast import Machine, candidate_of
from hft.planning.memory import GIB
from hft.runs.config import Config
from hft.runs.plan import Batches
from hft.text import aligned


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
