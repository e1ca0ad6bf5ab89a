"""What the stages will take, known before anything is loaded."""

from dataclasses import replace
from typing import Any

from hft.cpi.config import CPIPlan
from hft.cpi.group import chance
from hft.machine import indented
from hft.planning.fit import why_state_does_not_fit
from hft.planning.forecast import candidate_of
from hft.runs.config import load_config

READ_RATE = 1e9  # bytes per second; results/cpi-core.md has what was measured


def describe_stages(plan: CPIPlan) -> tuple[str, str | None]:
    """Tasks, cores, disk, memory and minutes of the stages; and a sentence if this machine cannot hold one of them."""
    runs, misfits = [], []
    config, tasks, size = plan.config, len(plan.tasks), 0
    own = {"model_name_or_path": plan.base, "dataset_name": next(iter(plan.tasks.values())).dataset_name}
    for stage, keys in runs_of(plan).items():
        run, _ = candidate_of(load_config("sft", **plan.sft | own | keys | {"output_dir": str(plan.out)}))
        run = replace(run, engine=replace(run.engine, frozen_bytes=4))  # each starts from fp32
        runs.append(f"a run of stage {stage}:\n{indented(run.state.table())}")
        misfits += [f"a run of stage {stage}: {misfit}"] if (misfit := why_state_does_not_fit(run)) else []
        size = run.selection.anatomy.numel
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
