"""What a run will need, before anything is loaded; and what it did use."""

from __future__ import annotations

import resource
import sys
from typing import Any

import psutil
import torch

from hft.errors import HFTError
from hft.methods.adapter import AdapterSelection
from hft.selection import Selection

GIB = 2**30
# Bytes a trained scalar costs: its fp32 master; and while it trains an fp32 gradient and AdamW's two fp32 moments.
MASTER_BYTES = 4
TRAINED_BYTES = 4 + 8
# Above this many scalars a run on a CPU is a mistake unless it was asked for by name.
CPU_MODEL_SIZE = 1_000_000_000


def static_memory(
    selection: Selection,
    frozen_bytes: int = 2,
    shards: int = 1,
    *,
    reference: bool = False,
    peak: int | None = None,
    more: int = 0,
) -> float:
    """Bytes per device of weights, gradients and AdamW state; activations come on top.

    Args:
        selection: which half trains. Partly frozen tensors have masters, gradients and moments as a whole.
        frozen_bytes: bytes of a frozen scalar; it has neither gradient nor optimizer state.
        shards: devices that the model is sharded over (FSDP2); 1 under DDP and on one device.
        reference: whether there is a reference model: a copy of the trained half, or of all if it is sharded.
        peak: the most scalars that train at once, where a schedule freezes some for a while; masters all have.
        more: bytes that the method itself keeps.
    """
    if isinstance(selection, AdapterSelection):  # a reference is the base itself
        return selection.num_trained * (MASTER_BYTES + TRAINED_BYTES) + selection.base_bytes(frozen_bytes) + more
    held, size = selection.num_with_optimizer_state, selection.anatomy.numel
    copied = (held if shards == 1 else size) if reference else 0
    kept = held - selection.num_trained  # of partly frozen tensors, the frozen values
    trained = held * MASTER_BYTES + (held if peak is None else peak) * TRAINED_BYTES
    return (trained + (size - held + kept + copied) * frozen_bytes) / shards + more


def check_fits(selection: Selection, *, cpu_asked_for: bool, **needs: Any) -> None:
    """Refuse a run that this machine cannot hold.

    Args:
        selection: what trains.
        cpu_asked_for: whether the CPU is meant, however large the model is.
        needs: the other arguments of `static_memory`.

    Raises:
        HFTError: no accelerator and a large model, or less memory than weights, gradients and optimizer state take.
    """
    need = static_memory(selection, **needs)
    size = f"{selection.anatomy.numel / 1e9:.1f}B parameters"
    if torch.accelerator.is_available() and not cpu_asked_for:
        if torch.cuda.is_available() and need > (have := torch.cuda.get_device_properties(0).total_memory):
            raise HFTError(
                f"{size} need {need / GIB:.1f} GiB a device before activations and each has {have / GIB:.1f} GiB; "
                "use more GPUs with recipes/accelerate/fsdp2.yaml"
            )
        return
    if selection.anatomy.numel > CPU_MODEL_SIZE and not cpu_asked_for:
        eight = static_memory(selection, **(needs | {"shards": 8}))
        raise HFTError(
            f"{size} need a GPU and there is none here: {need / GIB:.1f} GiB before activations on one, "
            f"{eight / GIB:.1f} GiB each on 8 (--use_cpu true if you mean the CPU; MODEL=smollm2-135m runs on a laptop)"
        )
    have = psutil.virtual_memory().total
    need = static_memory(selection, frozen_bytes=4, **(needs | {"shards": 1}))
    if need > have:
        raise HFTError(f"{size} need {need / GIB:.1f} GiB before activations; this machine has {have / GIB:.1f} GiB")


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware; elsewhere bf16 autocast is slower than fp32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch we allow
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def peak_memory() -> int:
    """Peak bytes so far: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def reset_peak_memory() -> None:
    """Let a GPU's peak begin anew, with what was freed given back; a process's cannot."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
