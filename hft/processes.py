"""Which of the launched processes this one is, and printing from the first only."""

import os


def is_main() -> bool:
    """Whether this is the first process of the run. Known before torch.distributed is set up."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(*lines: object) -> None:
    """Print from the main process only."""
    if is_main():
        print(*lines, sep="\n", flush=True)


def indented(text: str) -> str:
    """A text set off below a heading."""
    return "\n".join(f"  {line}" if line else "" for line in text.split("\n"))
