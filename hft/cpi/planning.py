"""What the stages will take, known before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from hft.cpi.config import Plan
from hft.cpi.group import chance
from hft.machine import indented, is_sharded, world_size
from hft.methods import Method
from hft.model.anatomy import anatomy_of, meta_model
from hft.model.load import read_config
from hft.planning.memory import memory_of, why_it_does_not_fit
from hft.selection import SelectionConfig, select

# Bytes per second, to turn bytes into minutes; results/cpi-core.md has what was measured.
READ_RATE = 1e9


def describe(plan: Plan) -> tuple[str, str | None]:
    """The stages in words, and a sentence if this machine cannot hold a run: tasks, cores, disk, memory, minutes."""
    source = plan.base
    if plan.values.get("architecture") and not Path(source).is_dir():
        source = plan.values["architecture"]
    anatomy = anatomy_of(meta_model(read_config(plan.base, source)))
    config, tasks, size = plan.config, len(plan.tasks), anatomy.numel
    selection = select(anatomy, SelectionConfig(policy="all"))
    method, shards = Method(selection), world_size() if is_sharded() else 1
    memory = memory_of(method, selection, shards=shards, processes=world_size())
    use_cpu = bool(plan.values.get("use_cpu"))
    misfit = why_it_does_not_fit(method, selection, reference=False, shards=shards, use_cpu=use_cpu)
    passes = 3 * 2 * 4 * size
    most = 1 + tasks + (config.fusion + tasks) + (tasks if config.fusion and config.backbone == "multi-stage" else 0)
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
