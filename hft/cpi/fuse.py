"""Stage 3, fuse: the probes' cores are transplanted into one model, and everything else is interpolated.

For each task n = 1..N in group order the model so far is interpolated with its probe, tensor by tensor:
f_n = SLERP(f_{n-1}, theta_n, w_n), or the straight line where the angle is small. With w_n = 1 / (n + 1) the backbone
f_0 and all probes count alike on the line, whatever their order. Then the elements of each core take the values of its
probe, of several their mean. What is known of the paper has a pairwise formula, without w and without the angle: these
choices are ours.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from hft.cpi.config import CPIPlan
from hft.cpi.group import load_groups, train_groups
from hft.cpi.probe import start_of
from hft.cpi.runs import in_main_process, is_current, replaced_folder, write_record
from hft.errors import HFTError
from hft.machine import say
from hft.merging.checkpoint import Checkpoint, check_alike, write_model
from hft.merging.operators import COLINEAR_COS, arc_factors, blocks, weighted_sum
from hft.model.weights import weight_files
from hft.selection.masks import MASKS_NAME, Masks

FUSED_NAME = "fuse.json"


def fuse_probes(plan: CPIPlan) -> None:
    if not plan.config.fusion:
        raise HFTError("fusion is false, so there is nothing to fuse; `hft cpi train` starts from the base")
    groups = load_groups(plan)
    say("backbone: the groups train without fusion", "")
    backbone = train_groups(plan, groups, start_of(plan), plan.out / "backbone")
    tasks = [task for names in groups for task in names]
    cores = plan.cores(tasks, random=plan.config.freeze == "random-cores")
    write_fused(plan.out / "fused", str(backbone), [str(plan.probe_of(task)) for task in tasks], cores)


@in_main_process
def write_fused(out: Path, backbone: str, probes: list[str], cores: list[str]) -> None:
    """Write the fused model in fp32, unless it is there: fold probes, in their order, into a backbone.

    `cores` are the folders of the probes' cores. Two passes read each tensor of the probes and the backbone.
    """
    made = {"backbone": backbone, "probes": probes, "cores": cores}
    inputs = [path for model in (backbone, *probes) for path in weight_files(Path(model))]
    inputs += [Path(core) / MASKS_NAME for core in cores]
    if is_current(out / FUSED_NAME, made, *inputs):
        return
    models, masks = [Checkpoint.open(name) for name in (backbone, *probes)], [Masks(core) for core in cores]
    check_alike(*models)
    first = models[0]
    shapes = {key: tuple(first.specs[key].shape) for key in first.parameters}
    if wrong := [folder for folder, core in zip(cores, masks, strict=True) if core.shapes != shapes]:
        raise HFTError(f"{wrong[0]} is not a core of a model like {first.name}; run `hft cpi probe` again")
    branches, claims = Counter(), torch.zeros(len(cores) + 1, dtype=torch.int64)

    def fused(name: str) -> torch.Tensor:
        factors, branch = interpolation(models, name)
        branches[branch] += 1
        tensors, parts = [model.fp32(name) for model in models], []
        for values in blocks(*tensors, *(mask[name].tensor() for mask in masks)):
            tuned, inside = values[: len(models)], torch.stack(values[len(models) :])
            claims.add_(torch.bincount(inside.sum(0), minlength=len(claims)))
            parts.append(torch.where(inside.any(0), transplant(tuned[1:], inside), weighted_sum(tuned, factors)))
        return torch.cat(parts).view_as(tensors[0])

    with replaced_folder(out, FUSED_NAME) as folder:
        write_model(folder, first, fused)
        elements = claims.tolist()
        found = {"branches": branches, "elements_in_cores": {str(n): c for n, c in enumerate(elements) if c}}
        write_record(folder / FUSED_NAME, made | found, *inputs)
    say(
        f"fused {len(cores)} probes: {branches['arc']} tensors along the arc, {branches['line']} along the line "
        f"(|cos| > {COLINEAR_COS}); {elements[1]:,} elements in one core, {sum(elements[2:]):,} in several",
        f"  {out}",
        "",
    )


def interpolation(models: Sequence[Checkpoint], name: str) -> tuple[list[float], str]:
    """The factor of each model in the interpolation of one tensor, and `arc` if any step went along one, else `line`.

    Each step adds two vectors, so all angles follow from the models' dot products, which one pass finds.
    """
    count = len(models)
    products = torch.zeros(count, count, dtype=torch.float64)
    for values in blocks(*(model.fp32(name) for model in models)):
        stacked = torch.stack(values).double()
        products += stacked @ stacked.T
    factors, taken = torch.zeros(count, dtype=torch.float64), set()
    factors[0] = 1.0
    for probe in range(1, count):
        with_probe = products @ factors
        norms = (factors @ with_probe).item(), products[probe, probe].item()
        of_model, of_probe, branch = arc_factors(with_probe[probe].item(), *norms, 1 / (probe + 1))
        factors *= of_model
        factors[probe] += of_probe
        taken.add(branch)
    return factors.tolist(), "arc" if "arc" in taken else "line"


def transplant(values: Sequence[torch.Tensor], inside: torch.Tensor) -> torch.Tensor:
    """The values that the cores claim, (n,): exactly the probe's in one core, the mean of the probes in several.

    `inside`, (probes, n), says which are in which core.
    """
    stacked = torch.stack(list(values))
    mean = torch.where(inside, stacked, 0).sum(0, dtype=torch.float64) / inside.sum(0)
    first = stacked.gather(0, inside.int().argmax(0)[None])[0]
    return torch.where(inside.sum(0) > 1, mean.to(stacked.dtype), first)  # the sum would lose the sign of -0
