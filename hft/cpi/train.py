"""Stage 4, train: the groups train one after the other, and what earlier groups need stays as it is.

Group k trains on a sample of its tasks' rows with the mask M_k, which is 0 on every element of the cores of groups
1..k-1 and 1 elsewhere. Each run is a `hft sft` whose `core` policy has this mask: frozen elements keep their bits under
weight decay and warm moments, and verify compares them with the start of the run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hft.cpi.config import CPIPlan
from hft.cpi.group import load_groups, run_names
from hft.cpi.probe import core_folders, start_of
from hft.cpi.runs import train_sft
from hft.cpi.tasks import write_sample
from hft.errors import HFTError
from hft.machine import say
from hft.model.weights import weight_files
from hft.selection.masks import MASKS_NAME


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
        return {"policy": "core", "cores": core_folders(plan, groups[index]), "train_core": True}
    earlier = [task for tasks in groups[:index] for task in tasks]
    if freeze == "nothing" or not earlier:
        return {"policy": "all"}
    return {"policy": "core", "cores": core_folders(plan, earlier, random=freeze == "random-cores")}
