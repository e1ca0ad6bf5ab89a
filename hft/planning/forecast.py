"""What a run would cost, on this machine or on others: memory, FLOPs, GPU-hours, beside other ways of training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ByteSize, Field, PositiveFloat, PositiveInt
from tqdm import tqdm

from hft.config import option, to_yaml
from hft.errors import DoesNotFit, HFTError
from hft.machine import device_bytes, indented, say
from hft.objectives import OBJECTIVES
from hft.planning.fit import SPARE, Candidate
from hft.planning.memory import GIB, LABELS, MOMENTS, Engine, Memory, engine_of, micro_batch
from hft.runs.arguments import machine_settings, training_arguments
from hft.runs.config import Config, load_config, read_command_line, resolve_config
from hft.runs.plan import Batches, describe, load_model_config, load_rows, make_plan, plan_selection
from hft.runs.result import CONFIG_NAME, RunResult
from hft.text import aligned

Rows = list[list[str] | str]  # a title is a string


@dataclass
class Machine:
    """The GPUs that a forecast is made for; by default this machine. The fields are keys of `hft plan`."""

    gpus: PositiveInt | None = option("Number of GPUs to plan for.")
    gpu_memory: Annotated[ByteSize, Field(ge=2**20)] | None = option(
        "Memory per GPU, such as 80GiB or 24GB; by default that of this machine's GPUs."
    )
    mfu: Annotated[float, Field(gt=0, le=1)] = option("Fraction of the GPU's peak that the run reaches.", 0.4)
    gpu_tflops: PositiveFloat = option("The GPU's peak in TFLOP/s, in dense bf16: A100 312, H100 989.", 312.0)

    def available(self, engine: Engine) -> float | None:
        """Bytes of a device that a run may take; None for GPUs that are not here and whose memory was not given."""
        if self.gpu_memory is None and self.gpus and not torch.cuda.is_available():
            return None
        return (self.gpu_memory or device_bytes(use_cpu=not engine.on_gpu)) * (1 - SPARE)


@dataclass(frozen=True)
class Forecast:
    """What a run would take."""

    run: Candidate
    machine: Machine  # that it is made for
    batches: Batches
    data: Any  # the rows, if they are here
    candidates: list[Candidate]  # that it is compared with, in order; empty if FLOPs and activations are not known
    notes: list[str]  # what is worth knowing, one sentence each

    @property
    def memory(self) -> Memory:
        """Bytes per device, with activations where they are known."""
        return self.run.memory if self.candidates else self.run.state

    def report(self) -> str:
        """The forecast as text: selection, batch, costs, schedule, notes."""
        run, known = self.run, bool(self.candidates)
        costs = {"memory": "" if known else self.memory.table(), "cost": self.compare() if known else self.fits()}
        return describe(run.config, run.selection, self.batches, run.settings, self.data, self.notes, **costs)

    def compare(self) -> str:
        """Memory, FLOPs and GPU-hours in columns, and whether the run fits."""
        candidates, run, machine, engine = self.candidates, self.candidates[-2], self.machine, self.run.engine
        available, (batch, _) = machine.available(engine), micro_batch(run.config, run.args)
        rows, conclusion = [*memory_rows(candidates), *flops_rows(candidates)], []
        if available:
            rows += fitting_rows(candidates, available)
            remedy = run.remedy(available)
            conclusion = [f"{run.name} {f'does not fit: {remedy}' if remedy else 'fits'}"]
        if (tokens := self.batches.tokens) and engine.on_gpu:
            rows += hours_rows(candidates, tokens, machine.gpu_tflops, machine.mfu)
        return "\n".join(
            [
                f"{engine}; {batch['rows']} x {batch['length']:,} tokens per device; {len(run.checkpointed)} of "
                f"{run.layers} layers checkpointed",
                aligned(rows),
                f"the peak of {run.name} is {max(run.step.peaks, key=run.step.peaks.get)}",
                f"{candidates[-1].name}: embeddings and head are frozen too; the cheapest half without activation "
                "checkpointing",
                *conclusion,
            ]
        )

    def fits(self) -> str:
        """Whether a device holds the state of a run whose activations are not known."""
        available, state = self.machine.available(self.run.engine), self.memory.state
        unused = "activations and FLOPs are not known, so mfu and gpu_tflops have no effect"
        if available is None:
            return unused
        fits = "does not fit: the state alone takes" if state > available else "the state takes"
        return f"{fits} {state / GIB:.1f} of the {available / GIB:.1f} GiB that a device can give\n{unused}"


def memory_rows(candidates: list[Candidate]) -> Rows:
    parts = [{LABELS.get(name, name): size for name, size in vars(each.memory).items()} for each in candidates]
    unit, size = ("GiB", GIB) if max(each.memory.total for each in candidates) >= GIB else ("MiB", 2**20)
    rows = _summed(parts, "peak, at most", size)
    return [[f"{unit} per device:", *(each.name for each in candidates)], *rows]


def flops_rows(candidates: list[Candidate]) -> Rows:
    names, steps = ("forward", "backward", "recompute", "reference", "strategy"), [each.step for each in candidates]
    parts = [{name: getattr(step, name) / step.tokens for name in names} for step in steps]
    unit, size = ("GFLOPs", 1e9) if max(step.flops / step.tokens for step in steps) >= 1e8 else ("MFLOPs", 1e6)
    return [f"{unit} per token:", *_summed(parts, "sum", size)]


def _summed(parts: list[dict[str, float]], total: str, size: float) -> Rows:
    totals = [sum(part.values()) for part in parts]
    rows = {name: [part[name] for part in parts] for name in parts[0]} | {total: totals}
    return [
        *([f"  {name}", *(f"{value / size:.2f}" for value in values)] for name, values in rows.items() if any(values)),
        ["  relative to fft", *(f"{value / totals[0]:.3f}" for value in totals)],
    ]


def fitting_rows(candidates: list[Candidate], available: float) -> Rows:
    """Whether each fits as the recipe has it, the fewest layers that must be checkpointed, and its FLOPs with these."""
    fewest, first = [each.fewest(available) for each in candidates], candidates[0].step.flops
    best = [None if n is None else each.costs(range(n)).flops for each, n in zip(candidates, fewest, strict=True)]
    return [
        f"of {available / (1 - SPARE) / GIB:.3g} GiB, {SPARE:.0%} reserved:",
        ["  fits", *("yes" if each.memory.total <= available else "no" for each in candidates)],
        ["  fewest checkpointed layers", *("none fits" if n is None else str(n) for n in fewest)],
        ["  FLOPs with these, vs. fft", *("-" if flops is None else f"{flops / first:.3f}" for flops in best)],
    ]


def hours_rows(candidates: list[Candidate], tokens: int, tflops: float, mfu: float) -> Rows:
    """GPU-hours for so many tokens at a fraction `mfu` of a GPU's peak."""
    rate = tflops * 1e12 * mfu
    hours = [each.step.flops / each.step.tokens * tokens / rate / 3600 for each in candidates]
    count = tqdm.format_sizeof(tokens).replace("G", "B")
    cells = [f"{h:,.0f}" if h >= 100 else f"{h:.2g}" for h in hours]
    return [f"{count} tokens at {mfu:.0%} of {tflops:g} TFLOP/s:", ["  GPU-hours", *cells]]


def candidate_of(config: Config, gpus: int | None = None) -> tuple[Candidate, list[str]]:
    """A run on this machine, or on so many GPUs, and notes about it. Refuses what cannot train anywhere."""
    model_config, name = load_model_config(config), config.values.get("method") or "hft"
    selection, engine = plan_selection(config, model_config), engine_of(config, model_config, gpus)
    here = machine_settings(config.values)
    args, notes = training_arguments(config, here, engine.processes)
    settings = {} if gpus else here
    return Candidate(name, config, model_config, config.method, selection, args, engine, settings), notes


def forecast(config: Config, machine: Machine | None = None) -> Forecast:
    """Forecast a run from shapes alone: no weights, no GPU, and no rows if `max_steps` is given.

    On this machine everything is checked that `make_plan` checks, but that the run fits.
    """
    machine = machine or Machine()
    run, notes = candidate_of(config, machine.gpus)
    args, data = run.args, None
    if config.run.activation_checkpointing_layers == "auto":
        if (available := machine.available(run.engine)) is None:
            raise HFTError("activation_checkpointing_layers auto depends on the GPU's memory; add --gpu_memory")
        fewest = run.fewest(available)
        layers = run.layers if fewest is None else fewest
        run = replace(run, settings=run.settings | {"activation_checkpointing_layers": layers})
        args.activation_checkpointing = layers > 0
    if machine.gpus is None:
        try:
            plan = make_plan(config)
            data, notes = plan.data, plan.notes
        except DoesNotFit as error:
            notes.append(f"does not fit in memory on this machine: {error}")
    elif args.max_steps <= 0:
        try:
            data = load_rows(config, args)
            notes += data.notes
        except HFTError as error:
            notes.append(f"steps and GPU-hours are not known: {error}; or give --max_steps")
    if (optim := config.values.get("optim")) and optim not in MOMENTS:
        notes.append(f"the state of {optim} is not known; planned is that of AdamW, 8 bytes per trained parameter")
    strategy = config.method.strategy
    if strategy and strategy.acts_on_steps and not (strategy.takes_adapter or strategy.extra_rows().per_step):
        notes.append(f"of {strategy.name} no row is counted; hft continual --dry_run true plans every round")
    candidates = []
    try:
        candidates = run.rivals()
        if sampling := run.step.sampling:
            notes.append(f"texts are sampled before the first step, about {sampling:.3g} FLOPs beside the table's")
    except HFTError as error:
        notes.append(str(error))
    batches = Batches(config, args, run.engine.processes, data and len(data.train))
    return Forecast(run, machine, batches, data, candidates, notes)


def flops_to_fft(folder: Path) -> float | None:
    """FLOPs of a finished run relative to full fine-tuning's, from its saved config; None if they are not known."""
    try:
        result = RunResult.load(folder)
        config = load_config(result.objective, folder / CONFIG_NAME, architecture=str(folder))
        run, _ = candidate_of(config)
        candidates = replace(run, settings=result.machine).rivals()
        return candidates[-2].step.flops / candidates[0].step.flops
    except HFTError:
        return None


def main(arguments: Sequence[str]) -> int:
    """`hft plan`: print what a command would do and cost, and stop."""
    if arguments[:1] in (["-h"], ["--help"]):
        arguments = ["sft", "--help"]
    if not arguments or arguments[0] not in OBJECTIVES:
        raise HFTError(f"hft plan takes a command and its flags: hft plan {'|'.join(OBJECTIVES)} --config RECIPE.yaml")
    objective, *words = arguments
    machine, given = read_command_line(objective, words, plan=(Machine,)).take(Machine)
    config = resolve_config(objective, given)
    say("resolved config", indented(to_yaml(config.values)))
    say(forecast(config, machine).report())
    say(f"stopped here: no weights were loaded, nothing was written to {config.out}")
    return 0
