"""Stage 2, group: tasks whose cores overlap are trained together.

The similarity of two cores is Jaccard's, S_ij = |C_i and C_j| / |C_i or C_j|. Tasks with S_ij >= tau are joined, and
the groups are the connected components. Of two random cores of a fraction p it is p / (2 - p): 0.50% at 1%.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from hft.cpi.config import CPIPlan
from hft.cpi.probe import core_folders
from hft.cpi.runs import in_main_process
from hft.errors import HFTError
from hft.machine import indented, say
from hft.record.manifest import write_json
from hft.selection.masks import Masks
from hft.selection.policies import sample_names
from hft.text import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hft.model.anatomy import Anatomy

GROUPS_NAME, CORES_PICTURE = "groups.json", "cores.png"
RANDOM_GROUPS = 3  # the K of Table 1


@in_main_process
def group_tasks(plan: CPIPlan) -> list[list[str]]:
    """Compare the cores, and make the groups, each sorted by name, in the order in which they train."""
    tasks, config = sorted(plan.tasks), plan.config
    plan.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"tasks": tasks, "grouping": config.grouping, "tau": config.tau}
    similarity = None
    if config.needs_cores:
        similarity, outside, shares = compare_cores(plan, tasks)
        record |= {"percent": config.percent, "chance": chance(config.percent), "similarity": similarity.tolist()}
        record |= {"outside": outside.tolist(), "shares": {block: share.tolist() for block, share in shares.items()}}
        say("similarity of cores", indented(similarity_table(tasks, similarity, outside, config.percent)), "")
    groups = in_order(groups_of(plan, tasks, similarity), config.order, config.draw_seed)
    write_json(plan.out / GROUPS_NAME, record | {"groups": groups})
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
        raise HFTError(f"{path} is of other tasks; run `hft cpi group` again")
    return groups


def run_names(groups: Sequence[Sequence[str]]) -> list[str]:
    """The names of the groups' runs: their number, and their tasks."""
    return [f"{number}-{'+'.join(names)}" for number, names in enumerate(groups, 1)]


def compare_cores(plan: CPIPlan, tasks: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Draw `cores.png`; returns the cores' similarity, what of each is outside the layers, and `shares_of` them."""
    from hft.merging.checkpoint import Checkpoint
    from hft.model.anatomy import anatomy_of, meta_model

    masks = [Masks(folder) for folder in core_folders(plan, tasks)]
    counts, by_parameter = overlaps(masks)
    similarity = jaccard(counts)
    anatomy = anatomy_of(meta_model(Checkpoint.open(plan.base, plan.revision).config))
    shares = shares_of(anatomy, masks[0].shapes, by_parameter)
    plot_cores(tasks, similarity, shares).savefig(plan.out / CORES_PICTURE)
    inside = sum(by_parameter[name] for name in anatomy.in_layers)
    return similarity, 1 - inside / counts.diagonal().clamp(min=1), shares


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
    """The connected components of the graph that joins tasks whose similarity is at least tau."""
    import networkx

    graph = networkx.from_numpy_array((similarity >= tau).numpy())
    return [sorted(tasks[index] for index in component) for component in networkx.connected_components(graph)]


def in_order(groups: list[list[str]], order: Sequence[str] | None, seed: int) -> list[list[str]]:
    """The groups in the order in which they train: by where an order of tasks first names one of theirs, or drawn."""
    if order is not None:
        return sorted(groups, key=lambda names: min(map(order.index, names)))
    by_name = {"+".join(names): names for names in groups}
    return [by_name[name] for name in sample_names(by_name, len(groups), "order of groups", seed)]


def shares_of(
    anatomy: Anatomy, shapes: dict[str, tuple[int, ...]], by_parameter: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What fraction of each block of each layer is in each core: by block, of shape (cores, layers)."""
    found, sizes = {}, {}
    for name in anatomy.in_layers:
        unit, counts = anatomy.parts_by_parameter[name][0][0], by_parameter[name]
        found.setdefault(unit.block, torch.zeros(len(counts), anatomy.num_layers))[:, unit.layer] += counts
        sizes.setdefault(unit.block, torch.zeros(anatomy.num_layers))[unit.layer] += math.prod(shapes[name])
    return {block: counts / sizes[block].clamp(min=1) for block, counts in found.items()}


def similarity_table(tasks: Sequence[str], similarity: torch.Tensor, outside: torch.Tensor, percent: float) -> str:
    """The similarity in percent beside that of random cores, and what of each core lies outside the layers."""
    rows = ([task, *(f"{100 * s:.2f}" for s in row)] for task, row in zip(tasks, similarity, strict=True))
    parts = ", ".join(f"{task} {share:.1%}" for task, share in zip(tasks, outside, strict=True))
    random = f"Jaccard, %; of two random cores of {percent:g}%: {100 * chance(percent):.2f}"
    return aligned([["", *tasks], *rows, random, f"in embeddings, head and final norm: {parts}"])


def plot_cores(tasks: Sequence[str], similarity: torch.Tensor, shares: dict[str, torch.Tensor]) -> Figure:
    """The similarity of the cores, and below it which fraction of each block of each layer is in each core."""
    from matplotlib.figure import Figure

    from hft.record.picture import SHADES

    figure = Figure(figsize=(4.2 * (len(shares) + 1), 0.5 * len(tasks) + 2.2), dpi=120, layout="constrained")
    first, *others = figure.subplots(1, len(shares) + 1)
    first.imshow(similarity, cmap=SHADES, vmin=0, vmax=1)
    first.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    first.set_title("similarity of cores", loc="left", fontsize=10)
    for row, column in ((row, column) for row in range(len(tasks)) for column in range(len(tasks))):
        first.text(column, row, f"{similarity[row, column]:.2f}", ha="center", va="center", fontsize=8)
    most = max(float(share.max()) for share in shares.values()) or 1.0
    for axes, (block, share) in zip(others, shares.items(), strict=True):
        drawn = axes.imshow(100 * share, cmap=SHADES, vmin=0, vmax=100 * most, aspect="auto")
        axes.set_title(block, loc="left", fontsize=10)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (first, *others):
        axes.set_yticks(range(len(tasks)), tasks if axes is first else [])
        axes.tick_params(length=0)
    figure.colorbar(drawn, ax=others, label="of the block in the core, %", fraction=0.05)
    return figure
