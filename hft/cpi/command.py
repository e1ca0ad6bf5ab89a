"""`hft cpi`: a command line in, an exit status out."""

from __future__ import annotations

from collections.abc import Sequence

from hft.config import to_yaml
from hft.cpi.config import STAGES, Plan, parse_config
from hft.errors import HFTError
from hft.machine import indented, leave_process_group, say, world_size
from hft.record.manifest import write_text
from hft.runs.result import CONFIG_NAME


def main(arguments: Sequence[str]) -> int:
    """Run one stage, or all of them and the scores.

    Args:
        arguments: `[probe|group|fuse|train|score] --config RECIPE.yaml [ARM.yaml] [--key value ...]`.

    Returns:
        The exit status, 0.

    Raises:
        HFTError: a stage cannot be run as asked.
    """
    chosen = arguments[0] if arguments and arguments[0] in STAGES else None
    plan = parse_config(arguments[1:] if chosen else arguments)
    from hft.cpi.planning import describe

    words, misfit = describe(plan)
    say("resolved config", indented(to_yaml(plan.values)), words, "")
    if plan.values.get("dry_run"):
        say(*([f"it does not fit here: {misfit}"] if misfit else []))
        say(f"stopped here: no weights were loaded, nothing was written to {plan.out}")
        return 0
    if misfit and chosen in (None, "probe", "fuse", "train"):
        raise HFTError(misfit)
    run_stages(plan, (chosen,) if chosen else STAGES, alone=chosen is not None)
    say("", f"{plan.out}/", f"  one stage again: hft cpi STAGE --config {plan.out / CONFIG_NAME}")
    leave_process_group()
    return 0


def run_stages(plan: Plan, stages: Sequence[str], *, alone: bool = False) -> None:
    """Run some stages in order, each from what those before it have left on disk.

    Args:
        plan: of the stages.
        stages: among `STAGES`.
        alone: whether a stage was asked for by name; else those that the plan has no use for are left out.
    """
    from hft.cpi.fuse import fuse
    from hft.cpi.group import group
    from hft.cpi.probe import probe
    from hft.cpi.runs import in_main_process, join_processes
    from hft.cpi.tasks import write_tasks
    from hft.cpi.train import train

    join_processes(plan.values)
    in_main_process(lambda: save_config(plan))
    if "probe" in stages:
        if alone or plan.config.needs_cores:
            probe(plan)
        else:
            in_main_process(lambda: write_tasks(plan))
    if "group" in stages:
        in_main_process(lambda: group(plan))
    if "fuse" in stages and (alone or plan.config.fusion):
        fuse(plan)
    if "train" in stages:
        runs = train(plan)
        say(f"the final model is {runs[-1]}", "")
    if "score" in stages:
        if world_size() > 1:
            say(f"now in one process: hft cpi score --config {plan.out / CONFIG_NAME}")
            return
        from hft.cpi.scores import score

        score(plan)


def save_config(plan: Plan) -> None:
    """Write the resolved config, with the folder of stage 1, so that a stage can be repeated from it.

    Raises:
        HFTError: the folder cannot be made.
    """
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HFTError(f"cannot write to output_dir {plan.out}: {error.strerror}") from error
    values = plan.values | {"probe_dir": str(plan.probes)}
    write_text(plan.out / CONFIG_NAME, to_yaml({key: value for key, value in values.items() if key != "dry_run"}))
