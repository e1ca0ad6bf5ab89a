"""A plan's costs in words: of the run alone, or beside full fine-tuning and the cheapest rival."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hft.planning.exact import count
from hft.planning.memory import GIB
from hft.planning.outlook import (
    fitting_block,
    flops_block,
    hours_block,
    in_columns,
    memory_block,
    usable_bytes,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hft.planning.memory import Memory
    from hft.planning.outlook import Candidate, Outlook
    from hft.runs.costs import Engine
    from hft.selection import Selection


def describe_flops(candidates: list[Candidate], length: int) -> str:
    """FLOPs per token of a run on rows of a length, and relative to full fine-tuning."""
    fft, own = candidates[0].step, candidates[-2].step
    parts = {name: getattr(own, name) for name in ("forward", "backward", "recompute", "reference")}
    said = ", ".join(f"{name} {flops / own.tokens / 1e9:.3g}" for name, flops in parts.items() if flops)
    return (
        f"{own.flops / own.tokens / 1e9:.3g} GFLOPs per token at {length:,} tokens: {said}; "
        f"{own.flops / fft.flops:.3f} of full fine-tuning's"
    )


def compare(
    candidates: list[Candidate],
    outlook: Outlook,
    engine: Engine,
    how: dict[str, Any],
    *,
    tokens: int | None,
    available: float | None,
    change: str | None,
) -> str:
    """Memory, FLOPs and GPU-hours in columns, and whether the run fits.

    Args:
        candidates: full fine-tuning, the run unless it is that, and its cheapest rival.
        outlook: the machine.
        engine: where the run computes.
        how: its micro-batch.
        tokens: of the whole run, if its steps are known.
        available: bytes of a device that it may take, if they are known.
        change: what makes it fit, if it does not.
    """
    own, conclusion = candidates[-2], []
    blocks = [memory_block(candidates), flops_block(candidates)]
    if available:
        blocks.append(fitting_block(candidates, available))
        conclusion = [f"{own.name} {'does not fit: ' + change if change else 'fits'}"]
    if tokens and engine.on_gpu:
        blocks.append(hours_block(candidates, tokens, outlook))
    spread = f"FSDP2 over {engine.shards}" if engine.shards > 1 else f"DDP on {engine.processes}"
    return "\n".join(
        [
            f"{spread if engine.processes > 1 else 'one device'}; {how['rows']} x {how['length']:,} tokens per device; "
            f"{len(own.checkpointed)} of {own.layers} layers checkpointed",
            in_columns([candidate.name for candidate in candidates], blocks),
            f"the peak of {own.name} is {own.step.peak_at}",
            f"{candidates[-1].name}: embeddings and head are frozen too; the cheapest half without activation "
            "checkpointing",
            *conclusion,
        ]
    )


def describe_state(memory: Memory, outlook: Outlook, engine: Engine) -> str:
    """Whether a device holds the state of a run whose activations are not known."""
    available, state = usable_bytes(outlook, use_cpu=not engine.on_gpu), memory.state / GIB
    said = "activations and FLOPs are not known, so mfu, gpu_tflops and exact have no effect"
    if available is None:
        return said
    room = f"{state:.1f} of the {available / GIB:.1f} GiB that a device can give"
    if memory.state > available:
        return f"does not fit: the state alone takes {room}\n{said}"
    return f"the state takes {room}\n{said}"


def exactly(
    model_config: PretrainedConfig, selection: Selection, own: Candidate, engine: Engine, how: dict[str, Any]
) -> str:
    """A run's micro-batch as a pass on fake tensors counts it, beside the closed form.

    Raises:
        HFTError: torch cannot run the model on fake tensors.
    """
    if how["padded"] and how["rows"] == 1:
        return "packed rows cannot be counted on fake tensors, since masks depend on where they begin"
    closed, checkpointed = own.step, own.checkpointed
    how = {name: how[name] for name in ("rows", "length", "attention")}
    if (how["attention"] or "").startswith("flash"):  # which need not be here; sdpa keeps the same tensors
        how["attention"] = "sdpa"
    counted = count(model_config, selection, **how, precision=engine.precision, checkpointed=checkpointed)
    return (
        f"counted on fake tensors: {counted.forward:,} FLOPs forward, {counted.backward:,} backward, "
        f"{counted.saved / GIB:.3f} GiB held\n"
        f"closed form:             {closed.forward:,} FLOPs forward, {closed.backward + closed.recompute:,} backward, "
        f"{(closed.saved + closed.saved_copies) / GIB:.3f} GiB held"
    )
