"""`hft cpi`: a command line in, an exit status out."""

from collections.abc import Sequence

from hft.config import to_yaml
from hft.cpi.config import STAGES, CPIPlan, parse_stages
from hft.errors import HFTError
from hft.machine import indented, is_main, leave_process_group, say, world_size
from hft.record.manifest import write_text
from hft.runs.result import CONFIG_NAME


def main(arguments: Sequence[str]) -> int:
    """Run one stage, or all that are needed: `[STAGE] --config RECIPE.yaml [ARM.yaml] [--key value ...]`."""
    chosen = arguments[0] if arguments and arguments[0] in STAGES else None
    plan = parse_stages(arguments[1:] if chosen else arguments)
    from hft.cpi.planning import describe_stages

    text, misfit = describe_stages(plan)
    say("resolved config", indented(to_yaml(plan.values)), text, "")
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


def run_stages(plan: CPIPlan, stages: Sequence[str]) -> None:
    """Run some stages in order, each from what those before it have left on disk."""
    from hft.cpi.fuse import fuse_probes
    from hft.cpi.group import group_tasks
    from hft.cpi.probe import probe_tasks
    from hft.cpi.runs import join_processes
    from hft.cpi.scores import score_models
    from hft.cpi.tasks import write_task_rows
    from hft.cpi.train import train_from_fused
    from hft.runs.train import cannot_write_to

    join_processes(plan.values)
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
