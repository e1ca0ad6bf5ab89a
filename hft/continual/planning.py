"""What each run of a sequence will take, known before the first one starts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hft.continual.config import SequencePlan, SequenceRun
from hft.continual.data import SequenceData
from hft.errors import DoesNotFit, HFTError
from hft.planning.fit import why_state_does_not_fit
from hft.planning.forecast import Machine, candidate_of
from hft.planning.memory import GIB
from hft.runs.config import Config
from hft.runs.plan import Batches, RunPlan, make_plan
from hft.text import aligned


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sequence, before it starts."""

    run: SequenceRun
    steps: int | None  # None where rows are packed
    size: float  # bytes per device, with activations where they are known
    flops: float | None  # of the whole run, over all devices; None where they are not known
    misfit: str | None  # a sentence if a device has less than the run takes
    unknown: str | None  # why activations and FLOPs are not known

    def row(self) -> list[str]:
        steps = "-" if self.steps is None else f"{self.steps:,}"
        flops = "-" if self.flops is None else f"{self.flops:.3g}"
        return [self.run.name, f"{len(self.run.rows):,}", steps, f"{self.size / GIB:.2f}", flops]


def plan_sequence(plan: SequencePlan, data: SequenceData, machine: Machine) -> tuple[list[PlannedRun], RunPlan | None]:
    """Plan every run of a sequence as if it started from the base, whose shapes all of them have.

    The first one is also planned as it will be made, unless it is for other machines or does not fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        here = replace(plan, out=Path(folder))
        data.write(here)
        runs = [run for runs in data.rounds(here) for run in runs]
        planned = [plan_run(run, config_on_base(here, run), machine) for run in runs]
        try:
            return planned, None if machine.gpus else make_plan(config_on_base(here, runs[0]))
        except DoesNotFit:
            return planned, None


def config_on_base(plan: SequencePlan, run: SequenceRun) -> Config:
    flags = {key: value for key, value in run.flags.items() if key not in ("model_name_or_path", "previous_run")}
    return plan.config(flags | {"resume_from_checkpoint": "none"})


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
    return PlannedRun(run, steps, size, flops, why and f"{run.name} does not fit: {why}", unknown)


def table(runs: Sequence[PlannedRun]) -> str:
    """The runs in columns, the sum of their FLOPs, and what is not known or does not fit."""
    known, notes = [run.flops for run in runs if run.flops is not None], [run.unknown for run in runs if run.unknown]
    rows = [["run", "rows", "steps", "GiB per device", "FLOPs"], *(run.row() for run in runs)]
    total = [f"{sum(known):.3g} FLOPs in all"] if len(known) == len(runs) else []
    return aligned([*rows, *total, *dict.fromkeys(notes), *(run.misfit for run in runs if run.misfit)])
