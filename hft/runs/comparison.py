"""A plan's costs in words: of the run alone, or beside full fine-tuning and the cheapest rival."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hft.machine import device_bytes
from hft.planning.exact import count
from hft.planning.memory import GIB
from hft.planning.outlook import fitting_rows, flops_rows, hours_row, in_columns, memory_rows, what_to_change
from hft.runs.costs import micro_batch

if TYPE_CHECKING:
    from hft.runs.plan import RunPlan


def describe_flops(plan: RunPlan) -> str:
    """FLOPs per token of a run, and relative to full fine-tuning."""
    fft, own = plan.candidates[0].step, plan.own.step
    parts = {name: getattr(own, name) for name in ("forward", "backward", "recompute", "reference")}
    said = ", ".join(f"{name} {flops / own.tokens / 1e9:.3g}" for name, flops in parts.items() if flops)
    return (
        f"{own.flops / own.tokens / 1e9:.3g} GFLOPs per token at {plan.args.max_length:,} tokens: {said}; "
        f"{own.flops / fft.flops:.3f} of full fine-tuning's"
    )


def compare(plan: RunPlan) -> str:
    """Memory, FLOPs and GPU-hours in columns, and whether the run fits."""
    outlook, candidates = plan.outlook, plan.candidates
    available = outlook.bytes_of_gpu() or device_bytes()
    heads = [candidate.name for candidate in candidates]
    blocks = [("GiB per device", memory_rows(candidates)), ("GFLOPs per token", flops_rows(candidates))]
    if available:
        blocks.append((f"in {available / GIB:.0f} GiB", fitting_rows(candidates, available)))
    if plan.tokens:
        at = f"at {outlook.mfu:.0%} of {outlook.gpu_tflops:g} TFLOP/s"
        blocks.append((f"{plan.tokens / 1e9:,.3g}B tokens {at}", [hours_row(candidates, plan.tokens, outlook)]))
    lines = [_setting(plan), in_columns(heads, blocks), *([_fit(plan, available)] if available else [])]
    return "\n".join([*lines, *([exactly(plan)] if outlook.exact else [])])


def _setting(plan: RunPlan) -> str:
    engine, own = plan.engine, plan.own
    how = f"FSDP2 over {engine.shards}" if engine.shards > 1 else f"DDP on {engine.processes}"
    where = how if engine.processes > 1 else "one device"
    how = micro_batch(plan.config, plan.args)
    return (
        f"{where}; {how['rows']} x {how['length']:,} tokens per device; {len(own.checkpointed)} of {own.layers} layers "
        "checkpointed"
    )


def _fit(plan: RunPlan, available: float) -> str:
    own = plan.own
    change = what_to_change(
        own,
        available,
        rows=plan.args.per_device_train_batch_size,
        shards=plan.engine.shards,
        shardable=plan.config.method.shardable,
    )
    return f"{own.name} {'does not fit: ' + change if change else 'fits'}"


def exactly(plan: RunPlan) -> str:
    """The run's micro-batch as a pass on fake tensors counts it, beside the closed form.

    Raises:
        HFTError: torch cannot run the model on fake tensors.
    """
    how = micro_batch(plan.config, plan.args)
    del how["reference"], how["padded"]  # on fake tensors attention always has a mask
    own = plan.own
    counted = count(
        plan.model_config, plan.selection, **how, precision=plan.engine.precision, checkpointed=own.checkpointed
    )
    closed = own.step
    return (
        f"counted on fake tensors: {counted.forward:,} FLOPs forward, {counted.backward:,} backward, "
        f"{counted.saved / GIB:.3f} GiB held\n"
        f"closed form:             {closed.forward:,} FLOPs forward, {closed.backward + closed.recompute:,} backward, "
        f"{(closed.saved + closed.saved_copies) / GIB:.3f} GiB held"
    )
