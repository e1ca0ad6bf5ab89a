"""Stage 1, probe: a short full fine-tuning on each task alone, and its core, the elements that moved furthest in it.

The core of task i is argtopk over all elements j of the model of |theta_i,j - theta_0,j|, with k = floor(p D / 100):
elementwise, and global over the model, embeddings, head and norms included (CPI-FT's first stage).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch

from hft.cpi.config import CORE_NAME, CPIPlan
from hft.cpi.runs import TRAIN, in_main_process, is_current, replaced_folder, train_sft, write_record
from hft.errors import HFTError
from hft.freezing import HALF_PRECISION
from hft.machine import say
from hft.merging.checkpoint import Checkpoint, check_alike, write_model
from hft.merging.operators import MagnitudePruner, TensorOf, generator_of, magnitude_bits
from hft.model.weights import weight_files
from hft.record.manifest import MANIFEST_NAME, Manifest, absolute_or_hub_id
from hft.selection.masks import Mask, save_masks


@dataclass(frozen=True)
class Core:
    """What is known of a core besides its elements, which are the masks in `hft_masks.safetensors` beside it."""

    task: str
    percent: float  # p
    elements: int  # in the core: exactly floor(p D / 100)
    total: int  # D, elements of the model; a tied head counts once
    smallest: float  # the smallest |theta_i - theta_0| in the core
    unmoved: int  # elements of the core that did not move at all, since too few others did
    probe: str  # the model that was fine-tuned on the task
    base: str  # the model that the probe started from
    random_seed: int | None = None  # of a core of random elements, which no probe was asked for
    inputs: tuple[str, ...] = ()  # SHA-256 of the files that it was made from

    @classmethod
    def load(cls, folder: Path) -> Core:
        return cls(**json.loads((folder / CORE_NAME).read_text()))


def probe_tasks(plan: CPIPlan) -> None:
    base = start_of(plan)
    for task in plan.tasks:
        if not plan.tasks[task].probe:
            say(f"probe {task}")
            data = plan.data_of(task)
            values = {"model_name_or_path": str(base), "dataset_name": str(data), "method": "fft", "policy": "all"}
            values = plan.sft | plan.config.probe | values
            train_sft(plan.probe_of(task), values, data / TRAIN, *weight_files(base))
        find_core(plan, task, base)


@in_main_process
def start_of(plan: CPIPlan) -> Path:
    """The folder that every run starts from: the base, or its copy in fp32 where it is stored in half precision.

    Runs save in their base's dtypes. In bf16 most of a step at 2e-5 is rounded away, the more the larger the weight.
    """
    base, out = Checkpoint.open(plan.base, plan.revision), plan.probes / "base"
    record, made = plan.probes / "base.json", {"base": absolute_or_hub_id(plan.base)}
    if record.exists() and not is_current(record, made, *weight_files(base.folder)):
        raise HFTError(f"{plan.probes} holds probes of another base; give another --probe_dir, or remove it")
    in_half = any(spec.dtype in HALF_PRECISION for spec in base.specs.values())
    if in_half and not (record.exists() and out.exists()):
        say(f"writing {plan.base} in fp32 to {out}, so that no run rounds what it has learned", "")
        specs = {name: spec.float() if spec.dtype in HALF_PRECISION else spec for name, spec in base.specs.items()}
        with replaced_folder(out, "config.json") as folder:
            write_model(folder, base, base.fp32, specs=specs)
            base.config.dtype = torch.float32
            base.config.save_pretrained(folder)
    write_record(record, made, *weight_files(base.folder))
    return out if in_half else base.folder


@in_main_process
def find_core(plan: CPIPlan, task: str, base: Path) -> None:
    """Write the core of a task, and one of random elements where that is wanted, unless they are there."""
    percent, run, out, seed = plan.config.percent, plan.probe_of(task), plan.core_of(task), plan.config.draw_seed
    inputs = [*weight_files(run), *weight_files(base)]
    if not is_current(out / CORE_NAME, {"percent": percent, "probe": str(run)}, *inputs):
        tuned, start = Checkpoint.open(str(run)), Checkpoint.open(str(base))
        check_probe(tuned, start, plan.base)
        write_core(out, task, tuned, start, percent)
    core = Core.load(out)
    unmoved = f"; {core.unmoved:,} of them DID NOT MOVE, so lower percent" if core.unmoved else ""
    size = f"{core.elements:,} of {core.total:,} elements"
    say(f"{task}: {size}, moved by at least {core.smallest:.3g}{unmoved}", f"  {out}", "")
    if plan.config.freeze == "random-cores":
        out = plan.core_of(task, random=True)
        like = {"percent": percent, "random_seed": seed, "elements": core.elements, "total": core.total}
        if not is_current(out / CORE_NAME, like):
            write_random_core(out, core, Checkpoint.open(str(base)), seed)


def check_probe(probe: Checkpoint, base: Checkpoint, also: str = "") -> None:
    """Refuse a model that does not show which elements a task moves; `also` is another name of the base."""
    if half := [name for name in probe.parameters if probe.specs[name].dtype in HALF_PRECISION]:
        stored = f"{half[0]} in {probe.specs[half[0]].dtype}, and rounding would decide what has moved"
        advice = "give a checkpoint-N of its run, or start the run from a base in fp32"
        raise HFTError(f"probe {probe.name} stores {stored}; {advice}")
    check_alike(probe, base)
    if not (probe.folder / MANIFEST_NAME).exists():
        say(f"NOTE: {probe.name} has no {MANIFEST_NAME}, so nothing says that it was trained from {base.name}")
        return
    manifest = Manifest.load(probe.folder)
    if manifest.base not in {absolute_or_hub_id(name) for name in (base.name, also)}:
        raise HFTError(f"{probe.name} was trained from {manifest.base}, not from {also or base.name}; train it again")
    if manifest.frozen_checksums:
        raise HFTError(f"probe {probe.name} was trained with parts of it frozen; train it with fft")


def write_core(out: Path, task: str, probe: Checkpoint, base: Checkpoint, percent: float) -> None:
    """Write the p% of all elements that a probe of a task, in fp32, moved furthest from its base."""

    def changes(name: str) -> torch.Tensor:
        change = probe.fp32(name) - base.fp32(name)
        if not change.isfinite().all():
            raise HFTError(f"{name} of {probe.name} or {base.name} holds NaN or infinity; has the probe diverged?")
        return change

    with replaced_folder(out, CORE_NAME) as folder:
        cut = write_largest(folder, base, changes, percent)
        smallest = torch.tensor(cut.smallest, dtype=torch.int32).view(torch.float32).item() if cut.wanted else 0.0
        unmoved = cut.ties if cut.wanted and not smallest else 0
        total = sum(base.specs[name].numel() for name in base.parameters)
        core = Core(task, percent, cut.wanted, total, smallest, unmoved, probe.name, base.name)
        write_record(folder / CORE_NAME, asdict(core), *weight_files(probe.folder), *weight_files(base.folder))


def write_random_core(out: Path, like: Core, base: Checkpoint, seed: int) -> None:
    """Write as many random elements as a core has; which ones depends on task and seed alone."""

    def keys(name: str) -> torch.Tensor:
        # Random bits read as a finite fp32 magnitude: magnitudes are ordered as their bits are.
        generator = generator_of(f"core/{seed}/{like.task}/{name}")
        bits = torch.randint(0x7F800000, base.specs[name].shape, generator=generator, dtype=torch.int32)
        return bits.view(torch.float32)

    with replaced_folder(out, CORE_NAME) as folder:
        write_largest(folder, base, keys, like.percent)
        write_record(folder / CORE_NAME, asdict(replace(like, smallest=0.0, unmoved=0, random_seed=seed)))


def write_largest(folder: Path, like: Checkpoint, scores: TensorOf, percent: float) -> MagnitudePruner:
    """Write masks of the p% of all elements of a model whose fp32 scores are largest; the first ones of equal ones."""
    cut = MagnitudePruner(scores, like.parameters, Fraction(str(percent)) / 100)
    ties, masks = cut.ties, {}
    for name in like.parameters:
        bits = magnitude_bits(scores(name))
        mask = bits > cut.smallest
        if ties:
            equal = (bits == cut.smallest).view(-1).nonzero()[:ties]
            mask.view(-1)[equal] = True
            ties -= len(equal)
        masks[name] = Mask.of(mask)
    save_masks(folder, masks)
    return cut
