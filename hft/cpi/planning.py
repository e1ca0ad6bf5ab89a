"""What the stages will take, known before anything is loaded."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hft.cpi.config import CPIPlan
from hft.cpi.group import chance
from hft.machine import indented
from hft.planning.engine import engine_of
from hft.planning.fit import why_state_does_not_fit
from hft.planning.memory import memory_of
from hft.runs.arguments import machine_settings, training_arguments
from hft.runs.config import load_config
from hft.runs.plan import load_model_config, plan_selection

READ_RATE = 1e9  # bytes per second; results/cpi-core.md has what was measured


def describe_stages(plan: CPIPlan) -> tuple[str, str | None]:
    """Tasks, cores, disk, memory and minutes of the stages; and a sentence if this machine cannot hold one of them."""
    runs, misfits = [], []
    for stage, keys in runs_of(plan).items():
        table, misfit, size = describe_run(plan, keys)
        runs.append(f"a run of stage {stage}:\n{indented(table)}")
        misfits += [f"a run of stage {stage}: {misfit}"] if misfit else []
    config, tasks = plan.config, len(plan.tasks)
    passes = 3 * 2 * 4 * size
    most = 1 + tasks + (config.fusion + tasks) + (tasks if config.fusion else 0)
    lines = [
        f"{tasks} tasks: {', '.join(plan.tasks)}",
        f"core: {config.percent:g}% of {size:,} elements, embeddings, head and norms included; two random cores have a "
        f"similarity of {chance(config.percent):.2%}, tau is {config.tau:.0%}",
        f"finding a core reads {passes / 1e9:,.1f} GB in chunks ({passes / READ_RATE / 60:,.1f} min at 1 GB/s) and "
        f"writes {size / 8e9:,.2f} GB",
        f"disk: at most {most} models of {4 * size / 1e9:,.1f} GB in fp32, besides the runs' checkpoints",
        f"stage 1 in {plan.probes}, the others in {plan.out}",
        *runs,
    ]
    return "plan\n" + indented("\n".join(lines)), next(iter(misfits), None)


def runs_of(plan: CPIPlan) -> dict[str, dict[str, Any]]:
    """The keys of the largest run of each stage that trains; a core is planned as that many random elements."""
    config = plan.config
    freeze = {
        "half": {"policy": "category", "fraction": 0.5},
        "nothing": {"policy": "all"},
        "all-but-own-cores": {"policy": "random-element", "fraction": config.percent / 100},
    }
    most = max(0.0, 1 - (len(plan.tasks) - 1) * config.percent / 100)  # of the last of groups of one task each
    group = freeze.get(config.freeze, {"policy": "random-element", "fraction": most})
    probes = {"probe": config.probe | {"policy": "all"}} if "probe" in plan.stages else {}
    return probes | {"train": config.train | group}


def describe_run(plan: CPIPlan, keys: Mapping[str, Any]) -> tuple[str, str | None, int]:
    """The memory of a run from a base in fp32, a sentence if it does not fit, and the elements of the model."""
    own = {"model_name_or_path": plan.base, "dataset_name": plan.tasks[next(iter(plan.tasks))].dataset_name}
    run = load_config("sft", **plan.sft | own | keys | {"output_dir": str(plan.out)})
    model_config = load_model_config(run)
    training_arguments(run, machine_settings(run.values))  # refuses what cannot train
    selection, engine = plan_selection(run, model_config), replace(engine_of(run, model_config), frozen_bytes=4)
    memory = memory_of(run.method, selection, engine)
    return memory.table(), why_state_does_not_fit(run, selection, engine), selection.anatomy.numel
