"""Stage 3, fuse: the probes' cores are transplanted into one model, and everything else is interpolated.

For each task n = 1..N in group order the model so far is interpolated with its probe, tensor by tensor:
f_n = SLERP(f_{n-1}, theta_n, w_n), or the straight line where the angle is small. With w_n = 1 / (n + 1) the backbone
f_0 and all probes count alike on the line, whatever their order. Then the elements of each core take the values of its
probe, of several their mean. What is known of the paper has a pairwise formula, without w and without the angle: these
choices are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hft.cpi.config import CPIPlan
from hft.cpi.group import load_groups
from hft.cpi.probe import start_of
from hft.cpi.runs import in_main_process, is_current, replaced_folder
from hft.cpi.train import core_folders, train_groups
from hft.errors import HFTError
from hft.machine import say
from hft.merging.checkpoint import Checkpoint, check_alike, write_model
from hft.merging.operators import COLINEAR_COS, arc_factors, blocks, weighted_sum
from hft.model.weights import weight_files
from hft.record.manifest import write_json
from hft.selection.masks import MASKS_NAME, Masks

FUSED_NAME = "fuse.json"


@dataclass(frozen=True)
class Fusion:
    """What is fused.

    Attributes:
        probes: models that were fine-tuned on one task each, in the order in which they are folded in.
        cores: folders of their cores.
        backbone: the model that they are folded into; None for their mean.
        base: the model that the probes started from.
    """

    probes: list[str]
    cores: list[str]
    backbone: str | None
    base: str


def fuse_probes(plan: CPIPlan) -> Path:
    """Make the backbone, and fuse the probes and their cores into it; returns the fused model's folder."""
    config = plan.config
    if not config.fusion:
        raise HFTError("fusion is false, so there is nothing to fuse; `hft cpi train` starts from the base")
    groups, base = load_groups(plan), start_of(plan)
    backbone = {"base": base, "mean": None}.get(config.backbone)
    if config.backbone == "multi-stage":
        say("backbone: the groups train without fusion", "")
        backbone = train_groups(plan, groups, base, plan.out / "backbone")[-1]
    tasks = [task for names in groups for task in names]
    cores = core_folders(plan, tasks, random=config.freeze == "random-cores")
    probes = [str(plan.probe_of(task)) for task in tasks]
    fusion = Fusion(probes, cores, backbone and str(backbone), str(base))
    models = [model for model in (*probes, fusion.base, fusion.backbone) if model]
    inputs = [path for model in models for path in weight_files(Path(model))]
    inputs += [Path(core) / MASKS_NAME for core in cores]
    out = plan.out / "fused"

    def write() -> None:
        if not is_current(out / FUSED_NAME, asdict(fusion), *inputs):
            say(write_fused(out, fusion), f"  {out}", "")

    in_main_process(write)
    return out


def write_fused(out: Path, fusion: Fusion) -> str:
    """Write the fused model in fp32; two passes read each tensor of the probes and the backbone. Returns a summary."""
    base, probes = Checkpoint.open(fusion.base), [Checkpoint.open(name) for name in fusion.probes]
    models = probes if fusion.backbone is None else [Checkpoint.open(fusion.backbone), *probes]
    check_alike(base, *(model for model in models if model.folder.resolve() != base.folder.resolve()))
    cores, shapes = (
        [Masks(core) for core in fusion.cores],
        {key: tuple(base.specs[key].shape) for key in base.parameters},
    )
    if wrong := [folder for folder, core in zip(fusion.cores, cores, strict=True) if core.shapes != shapes]:
        raise HFTError(f"{wrong[0]} is not a core of {base.name}; run `hft cpi probe` again")
    branches, claims = Counter(), torch.zeros(len(cores) + 1, dtype=torch.int64)

    def fused(name: str) -> torch.Tensor:
        factors, branch = interpolation(models, len(probes), name)
        branches[branch] += 1
        tensors, made = [model.fp32(name) for model in models], []
        for values in blocks(*tensors, *(core[name].tensor() for core in cores)):
            tuned, inside = values[: len(models)], torch.stack(values[len(models) :])
            claims.add_(torch.bincount(inside.sum(0), minlength=len(claims)))
            claimed = transplant(tuned[-len(probes) :], inside)
            made.append(torch.where(inside.any(0), claimed, weighted_sum(tuned, factors)))
        return torch.cat(made).view_as(tensors[0])

    with replaced_folder(out, FUSED_NAME) as folder:
        write_model(folder, base, fused)
        elements = claims.tolist()
        found = {"branches": branches, "elements_in_cores": {str(n): c for n, c in enumerate(elements) if c}}
        write_json(folder / FUSED_NAME, asdict(fusion) | found)
    return (
        f"fused {len(probes)} probes: {branches['arc']} tensors along the arc, {branches['line']} along the line "
        f"(|cos| > {COLINEAR_COS}); {elements[1]:,} elements in one core, {sum(elements[2:]):,} in several"
    )


def interpolation(models: Sequence[Checkpoint], probes: int, name: str) -> tuple[list[float], str]:
    """The factor of each model in the interpolation of one tensor, and `arc` if any step went along one, else `line`.

    The last `probes` models are folded in; without another one before them their mean is taken first. Every step of the
    fold is a sum of two vectors, so all its angles follow from the dot products of the models, which one pass over the
    tensor finds.
    """
    count = len(models)
    products = torch.zeros(count, count, dtype=torch.float64)
    for values in blocks(*(model.fp32(name) for model in models)):
        stacked = torch.stack(values).double()
        products += stacked @ stacked.T
    factors = torch.zeros(count, dtype=torch.float64)
    factors[:1] = 1.0
    if count == probes:
        factors[:] = 1 / count
    taken = set()
    for step, index in enumerate(range(count - probes, count), 1):
        with_probe = products @ factors
        norms = (factors @ with_probe).item(), products[index, index].item()
        of_model, of_probe, branch = arc_factors(with_probe[index].item(), *norms, 1 / (step + 1))
        factors *= of_model
        factors[index] += of_probe
        taken.add(branch)
    return factors.tolist(), "arc" if "arc" in taken else "line"


def transplant(values: Sequence[torch.Tensor], inside: torch.Tensor) -> torch.Tensor:
    """The values that the cores claim: exactly the probe's in one core, the mean of the probes in several.

    Args:
        values: of the probes, each of shape (n,); the result has it too, and is meaningless where no core claims one.
        inside: which elements are in which core, (probes, n).
    """
    stacked = torch.stack(list(values))
    mean = torch.where(inside, stacked, 0).sum(0, dtype=torch.float64) / inside.sum(0)
    first = stacked.gather(0, inside.int().argmax(0)[None])[0]
    return torch.where(inside.sum(0) > 1, mean.to(stacked.dtype), first)  # the sum would lose the sign of -0
