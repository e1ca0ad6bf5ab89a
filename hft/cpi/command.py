"""`hft cpi`: print what the stages will take, and run them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hft.config import to_yaml
from hft.cpi.config import STAGES, CPIPlan, parse_stages
from hft.cpi.fuse import fuse_probes
from hft.cpi.group import chance, group_tasks, train_from_fused
from hft.cpi.probe import probe_tasks
from hft.cpi.runs import write_task_rows
from hft.cpi.scores import score_models
from hft.errors import HFTError
from hft.machine import indented, is_main, leave_process_group, say, world_size
from hft.planning.fit import why_state_does_not_fit
from hft.planning.forecast import candidate_of
from hft.record.manifest import write_text
from hft.runs.config import load_config
from hft.runs.result import CONFIG_NAME
from hft.runs.train import cannot_write_to

READ_RATE = 1e9  # bytes per second; results/cpi-core.md has what was measured


def main(arguments: Sequence[str]) -> int:
    """Run one stage, or all that are needed: `[STAGE] --config RECIPE.yaml [ARM.yaml] [--key value ...]`."""
    chosen = arguments[0] if arguments and arguments[0] in STAGES else None
    plan = parse_stages(arguments[1:] if chosen else arguments)
    text, misfit = describe_stages(plan)
    say("resolved config", indented(to_yaml(plan.values)), "plan", indented(text), "")
    if plan.values.get("dry_run"):
        say(*([f"it does not fit in memory on this machine: {misfit}"] if misfit else []))
        say(f"stopped here: no weights were loaded, nothing was written to {plan.out}")
        return 0
    if misfit and chosen not in ("group", "score"):
        raise HFTError(misfit)
    run_stages(plan, (chosen,) if chosen else plan.stages)
    say("", f"{plan.out}/", f"  one stage again: hft cpi STAGE --config {plan.out / CONFIG_NAME}")
    leave_process_group()
    return 0


def describe_stages(plan: CPIPlan) -> tuple[str, str | None]:
    """Tasks, cores, disk, memory and minutes of the stages; and a sentence if this machine cannot hold one of them."""
    runs, misfit, size = [], None, 0
    config, tasks = plan.config, len(plan.tasks)
    own = {"model_name_or_path": plan.base, "dataset_name": next(iter(plan.tasks.values())).dataset_name}
    for stage, keys in largest_runs(plan).items():
        run, _ = candidate_of(load_config("sft", **plan.sft | own | keys | {"output_dir": str(plan.out)}))
        run = replace(run, engine=replace(run.engine, frozen_bytes=4))  # each starts from fp32
        runs.append(f"a run of stage {stage}:\n{indented(run.state.table())}")
        if (why := why_state_does_not_fit(run)) and not misfit:
            misfit = f"a run of stage {stage}: {why}"
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
    return "\n".join(lines), misfit


def largest_runs(plan: CPIPlan) -> dict[str, dict[str, Any]]:
    """The keys of the largest run of each stage that trains; a core is planned as that many random elements."""
    config, share = plan.config, plan.config.percent / 100
    most = max(0.0, 1 - (len(plan.tasks) - 1) * share)  # of the last of groups of one task each
    elements = {"policy": "random-element", "fraction": share if config.freeze == "all-but-own-cores" else most}
    others = {"half": {"policy": "category", "fraction": 0.5}, "nothing": {"policy": "all"}}
    probes = {"probe": config.probe | {"policy": "all"}} if "probe" in plan.stages else {}
    return probes | {"train": config.train | others.get(config.freeze, elements)}


def run_stages(plan: CPIPlan, stages: Sequence[str]) -> None:
    """Run some stages in order, each from what those before it have left on disk."""
    if is_main():  # with the folder of stage 1, so that a stage can be repeated from it
        try:
            plan.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write_to(plan.out, error) from error
        values = plan.values | {"probe_dir": str(plan.probes)}
        write_text(plan.out / CONFIG_NAME, to_yaml({key: value for key, value in values.items() if key != "dry_run"}))
    write_task_rows(plan)
    functions = dict(zip(STAGES, (probe_tasks, group_tasks, fuse_probes, train_from_fused, score_models), strict=True))
    for stage in stages:
        if stage == "score" and world_size() > 1:
            say(f"now in one process: hft cpi score --config {plan.out / CONFIG_NAME}")
            return
        functions[stage](plan)
