"""The machine a run is on: which process this is, how the model is spread, bf16 support, peak memory."""

from __future__ import annotations

import os
import resource
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments


def is_main() -> bool:
    """Whether this is the first process of the run. Known before torch.distributed is set up."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_sharded(args: TrainingArguments | None = None) -> bool:
    """Whether the run shards the model with FSDP or ZeRO-3, by accelerate's launcher or by the trainer's config."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or bool(args and args.fsdp) or is_zero3(args)


def is_zero3(args: TrainingArguments | None = None) -> bool:
    """Whether the run shards the model with DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or bool(args and args.deepspeed)


def say(*lines: object) -> None:
    """Print from the main process only."""
    if is_main():
        print(*lines, sep="\n", flush=True)


def indented(text: str) -> str:
    return textwrap.indent(text, "  ")


def broadcast(value: Any) -> Any:
    """The first process's value, in every process."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def leave_process_group() -> None:
    """End torch.distributed. A thread of gloo needs the GIL to finish (torch 2.13), which sleeping hands over."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        time.sleep(0.5)
        PartialState().destroy_process_group()


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware; elsewhere bf16 autocast is slower than fp32."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def on_gpu() -> bool:
    """Whether this process has used a GPU; one that is there may be passed over."""
    import torch

    return torch.cuda.is_initialized() and torch.cuda.max_memory_allocated() > 0


def peak_memory() -> int:
    """Peak bytes so far: allocated on the GPU, or resident in this process."""
    import torch

    if on_gpu():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def device_bytes(*, use_cpu: bool = False) -> int:
    """Memory of the GPU here, or of the machine if it has none or is to compute on its CPU."""
    import psutil
    import torch

    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total


def reset_peak_memory() -> None:
    """Empty the GPU's cache and reset its peak; the peak of a process on a CPU cannot be reset."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
