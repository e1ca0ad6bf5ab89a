"""Which of the launched processes this one is, and printing from the first only."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments


def is_main() -> bool:
    """Whether this is the first process of the run. Known before torch.distributed is set up."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_sharded(args: TrainingArguments | None = None) -> bool:
    """Whether the run shards the model with FSDP, by accelerate's launcher or by the trainer's config."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or bool(args and args.fsdp)


def say(*lines: object) -> None:
    """Print from the main process only."""
    if is_main():
        print(*lines, sep="\n", flush=True)


def indented(text: str) -> str:
    """A text set off below a heading."""
    return "\n".join(f"  {line}" if line else "" for line in text.split("\n"))
