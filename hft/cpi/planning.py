"""What the stages will take, known before anything is loaded."""

from hft.cpi.config import CPIPlan
from hft.cpi.group import chance
from hft.machine import indented
from hft.planning.engine import engine_of
from hft.planning.fit import why_state_does_not_fit
from hft.planning.memory import memory_of
from hft.runs.config import load_config
from hft.runs.plan import load_model_config, plan_selection

READ_RATE = 1e9  # bytes per second; results/cpi-core.md has what was measured


def describe_stages(plan: CPIPlan) -> tuple[str, str | None]:
    """Tasks, cores, disk, memory and minutes of the stages; and a sentence if this machine cannot hold a run."""
    own = {"model_name_or_path": plan.base, "dataset_name": plan.tasks[next(iter(plan.tasks))].dataset_name}
    run = load_config("sft", **plan.sft | own | {"policy": "all", "output_dir": str(plan.out)})
    model_config = load_model_config(run)
    selection, engine = plan_selection(run, model_config), engine_of(run, model_config)
    memory = memory_of(run.method, selection, engine)
    misfit = why_state_does_not_fit(run, selection, engine)
    config, tasks, size = plan.config, len(plan.tasks), selection.anatomy.numel
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
        f"a run:\n{indented(memory.table())}",
    ]
    return "plan\n" + indented("\n".join(lines)), misfit
