"""Stages 2 and 4: tasks whose cores overlap form a group, and the groups train one after the other.

The similarity of two cores is Jaccard's, S_ij = |C_i and C_j| / |C_i or C_j|. Tasks with S_ij >= tau are joined, and
the groups are the connected components. Of two random cores of a fraction p it is p / (2 - p): 0.50% at 1%.

Group k trains on a sample of its tasks' rows with the mask M_k, which is 0 on every element of the cores of groups
1..k-1 and 1 elsewhere. Each run is a `hft sft` whose `core` policy has this mask: frozen elements keep their bits under
weight decay and warm moments, and verify compares them with the start of the run.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hft.cpi.config import CPIPlan
from hft.cpi.probe import start_of
from hft.cpi.runs import in_main_process, train_sft, write_sample
from hft.errors import HFTError
from hft.machine import indented, say
from hft.merging.checkpoint import Checkpoint
from hft.model.anatomy import anatomy_of, meta_model
from hft.model.weights import weight_files
from hft.record.manifest import write_json
from hft.selection.masks import MASKS_NAME, Masks
from hft.selection.policies import sample_names
from hft.text import aligned

GROUPS_NAME, CORES_PICTURE = "groups.json", "cores.png"
RANDOM_GROUPS = 3  # the K of Table 1


@in_main_process
def group_tasks(plan: CPIPlan) -> list[list[str]]:
    """Compare the cores, and make the groups, each sorted by name, in the order in which they train."""
    tasks, config = sorted(plan.tasks), plan.config
    plan.out.mkdir(parents=True, exist_ok=True)
    similarity, found = compare_cores(plan, tasks) if config.needs_cores else (None, {})
    groups = groups_of(plan, tasks, similarity)
    if config.order is not None:
        groups.sort(key=lambda names: min(map(config.order.index, names)))
    else:
        by_name = {"+".join(names): names for names in groups}
        groups = [by_name[name] for name in sample_names(by_name, len(groups), "order of groups", config.draw_seed)]
    about = {"tasks": tasks, "grouping": config.grouping, "tau": config.tau}
    write_json(plan.out / GROUPS_NAME, about | found | {"groups": groups})
    lines = [f"{number}. {', '.join(names)}" for number, names in enumerate(groups, 1)]
    rule = f"by similarity >= {config.tau:g}" if config.grouping == "similarity" else config.grouping
    say(f"groups, {rule}, in the order in which they train", indented("\n".join(lines)), "")
    return groups


def load_groups(plan: CPIPlan) -> list[list[str]]:
    path = plan.out / GROUPS_NAME
    if not path.exists():
        raise HFTError(f"{path} not found: run `hft cpi group` first")
    groups = json.loads(path.read_text())["groups"]
    if sorted(name for names in groups for name in names) != sorted(plan.tasks):
        raise HFTError(f"{path} was made for other tasks; run `hft cpi group` again")
    return groups


def run_names(groups: Sequence[Sequence[str]]) -> list[str]:
    return [f"{number}-{'+'.join(names)}" for number, names in enumerate(groups, 1)]


def compare_cores(plan: CPIPlan, tasks: Sequence[str]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Print and draw the cores' similarity; returns it, and what `groups.json` holds of them."""
    from hft.reporting.figures import heatmap

    percent = plan.config.percent
    counts, by_parameter = overlaps([Masks(folder) for folder in plan.cores(tasks)])
    similarity = jaccard(counts)
    anatomy = anatomy_of(meta_model(Checkpoint.open(plan.base, plan.revision).config))
    inside = sum(by_parameter[name] for name in anatomy.shapes)
    outside = (1 - inside / counts.diagonal().clamp(min=1)).tolist()
    rows = ([task, *(f"{100 * s:.2f}" for s in row)] for task, row in zip(tasks, similarity, strict=True))
    parts = ", ".join(f"{task} {share:.1%}" for task, share in zip(tasks, outside, strict=True))
    random = f"Jaccard, %; of two random cores of {percent:g}%: {100 * chance(percent):.2f}"
    table = aligned([["", *tasks], *rows, random, f"in embeddings, head and final norm: {parts}"])
    say("similarity of cores", indented(table), "")
    figure = heatmap({"tasks": tasks, "rounds": tasks, "scores": (100 * similarity).tolist()})
    figure.axes[0].set_ylabel("")
    figure.savefig(plan.out / CORES_PICTURE)
    found = {"percent": percent, "chance": chance(percent), "similarity": similarity.tolist(), "outside": outside}
    return similarity, found


def overlaps(cores: Sequence[Masks]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """How many elements each two cores share, (cores, cores), and by parameter how many each core has, (cores,)."""
    if any(core.shapes != cores[0].shapes for core in cores):
        raise HFTError("the cores are of different models; only cores of one model can be compared")
    total, by_parameter = torch.zeros(len(cores), len(cores), dtype=torch.long), {}
    for name in tqdm(cores[0], desc="comparing cores", unit="tensor", leave=False):
        masks = [core[name] for core in cores]
        shared = torch.tensor([[(a & b).count() for b in masks] for a in masks])
        by_parameter[name] = shared.diagonal()
        total += shared
    return total, by_parameter


def jaccard(counts: torch.Tensor) -> torch.Tensor:
    """The Jaccard similarity from the counts of `overlaps`; 1 on the diagonal, 0 between empty cores."""
    sizes = counts.diagonal()
    union = sizes[:, None] + sizes - counts
    return (counts.double() / union.clamp(min=1)).fill_diagonal_(1.0)


def chance(percent: float) -> float:
    """The expected similarity of two independent random cores of p% of the elements."""
    return percent / (200 - percent)


def groups_of(plan: CPIPlan, tasks: Sequence[str], similarity: torch.Tensor | None) -> list[list[str]]:
    """The groups, each sorted by name, in no particular order."""
    config = plan.config
    if config.grouping == "together":
        return [list(tasks)]
    if config.grouping == "given":
        names = dict.fromkeys(plan.tasks[task].group for task in tasks)
        return [[task for task in tasks if plan.tasks[task].group == name] for name in names]
    if config.grouping == "random":
        shuffled = sample_names(tasks, len(tasks), "random groups", config.draw_seed)
        return [sorted(shuffled[start::RANDOM_GROUPS]) for start in range(min(RANDOM_GROUPS, len(tasks)))]
    return connected(tasks, similarity, config.tau)


def connected(tasks: Sequence[str], similarity: torch.Tensor, tau: float) -> list[list[str]]:
    import networkx

    graph = networkx.from_numpy_array((similarity >= tau).numpy())
    return [sorted(tasks[index] for index in component) for component in networkx.connected_components(graph)]


def train_from_fused(plan: CPIPlan) -> None:
    """Train the groups from the fused model, or from the base without fusion."""
    groups, base = load_groups(plan), start_of(plan)
    start = plan.out / "fused" if plan.config.fusion else base
    if not start.exists():
        raise HFTError(f"{start} not found: run `hft cpi fuse` first")
    say(f"the final model is {train_groups(plan, groups, start, plan.out / 'groups')}", "")


def train_groups(plan: CPIPlan, groups: Sequence[Sequence[str]], start: Path, out: Path) -> Path:
    """Train groups in folders below `out`, the first from `start`, each other from the one before; returns the last."""
    for index, (name, tasks) in enumerate(zip(run_names(groups), groups, strict=True)):
        data = plan.out / "data" / name
        rows = write_sample(plan, tasks, data)
        say(f"group {index + 1} of {len(groups)}: {', '.join(tasks)}")
        selection = selection_of(plan, groups, index)
        values = {"model_name_or_path": str(start), "dataset_name": str(data), "method": "cpi", **selection}
        cores = [Path(core) / MASKS_NAME for core in selection.get("cores", ())]
        train_sft(out / name, plan.sft | plan.config.train | values, rows, *weight_files(start), *cores)
        start = out / name
    return start


def selection_of(plan: CPIPlan, groups: Sequence[Sequence[str]], index: int) -> dict[str, Any]:
    """What trains while a group trains, as keys of `hft sft`."""
    freeze = plan.config.freeze
    if freeze == "half":
        return {"policy": "category", "fraction": 0.5}
    if freeze == "all-but-own-cores":
        return {"policy": "core", "cores": plan.cores(groups[index]), "train_core": True}
    earlier = [task for tasks in groups[:index] for task in tasks]
    if freeze == "nothing" or not earlier:
        return {"policy": "all"}
    return {"policy": "core", "cores": plan.cores(earlier, random=freeze == "random-cores")}
