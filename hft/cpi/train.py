"""Stage 4, train: the groups train one after the other, and what earlier groups need stays as it is.

Group k trains on a sample of its tasks' rows with the mask M_k, which is 0 on every element of the cores of groups
1..k-1 and 1 elsewhere. Each run is a `hft sft` whose `core` policy has this mask: frozen elements keep their bits under
weight decay and warm moments, and verify compares them with the start of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hft.cpi.config import Plan
from hft.cpi.group import load_groups, run_names
from hft.cpi.probe import CORE_NAME, start_of
from hft.cpi.runs import in_main_process, is_current, train_sft
from hft.cpi.tasks import TRAIN, write_sample
from hft.errors import HFTError
from hft.machine import say
from hft.model.weights import weight_files
from hft.record.manifest import write_json
from hft.selection.masks import MASKS_NAME


def train(plan: Plan) -> list[Path]:
    """Train the groups, from the fused model, or from the base without fusion.

    Returns:
        The folders of their runs; the last one holds the final model.

    Raises:
        HFTError: a stage before this one is missing, or a run cannot be made.
    """
    groups, base = load_groups(plan), start_of(plan)
    start = plan.out / "fused" if plan.config.fusion else base
    if not start.exists():
        raise HFTError(f"{start} not found: run `hft cpi fuse` first")
    return train_groups(plan, groups, start, plan.out / "groups")


def train_groups(plan: Plan, groups: Sequence[Sequence[str]], start: Path, out: Path) -> list[Path]:
    """Train the groups one after the other, each from where the one before ended.

    Args:
        plan: of the stages.
        groups: tasks of each group, in order.
        start: the model that the first one starts from.
        out: the folder of their runs' folders.

    Returns:
        The runs' folders, in order.
    """
    runs = []
    for index, (name, names) in enumerate(zip(run_names(groups), groups, strict=True)):
        data = plan.out / "data" / name
        in_main_process(lambda names=names, data=data: sample(plan, names, data))
        say(f"group {index + 1} of {len(groups)}: {', '.join(names)}")
        selection = selection_of(plan, groups, index)
        values = {"model_name_or_path": str(start), "dataset_name": str(data), "method": "cpi", **selection}
        cores = [Path(core) / MASKS_NAME for core in selection.get("cores", ())]
        train_sft(out / name, plan.sft | plan.config.train | values, *weight_files(start), *cores)
        start = out / name
        runs.append(start)
    return runs


def selection_of(plan: Plan, groups: Sequence[Sequence[str]], index: int) -> dict[str, Any]:
    """What trains while a group trains, as keys of `hft sft`."""
    how = plan.config.freeze
    if how == "half":
        return {"policy": "category", "fraction": 0.5}
    if how == "all-but-own-cores":
        return {"policy": "core", "cores": core_folders(plan, groups[index]), "train_core": True}
    earlier = [task for names in groups[:index] for task in names]
    if how == "nothing" or not earlier:
        return {"policy": "all"}
    return {"policy": "core", "cores": core_folders(plan, earlier, random=how == "random-cores")}


def core_folders(plan: Plan, tasks: Sequence[str], *, random: bool = False) -> list[str]:
    """The folders of the tasks' cores.

    Raises:
        HFTError: one is missing.
    """
    folders = [plan.core_of(task, random=random) for task in tasks]
    if missing := [folder for folder in folders if not (folder / CORE_NAME).exists()]:
        raise HFTError(f"core {missing[0]} not found: run `hft cpi probe` first")
    return [str(folder) for folder in folders]


def sample(plan: Plan, names: Sequence[str], data: Path) -> None:
    """Write the rows of a group, unless they are there."""
    made = {"tasks": list(names), "sample_rows": plan.config.sample_rows, "draw_seed": plan.config.draw_seed}
    record = data.with_name(f"{data.name}.json")  # beside the folder, since everything in it is data
    if not is_current(record, made, *(plan.data_of(task) / TRAIN for task in names)):
        write_sample(plan, names, data)
        write_json(record, made)
