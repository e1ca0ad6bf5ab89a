"""The `hft` command."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

USAGE = """\
usage: hft COMMAND ...

  hft sft --config RECIPE.yaml [METHOD.yaml ...] [--key value ...]
                            fine-tune on demonstrations; later files win, then flags
  hft dpo --config RECIPE.yaml [METHOD.yaml ...] [--key value ...]
                            align with preferences
  hft plan sft|dpo --config ...
                            print what that command would do, with its selection, and stop
  hft verify OUT [--base BASE]
                            hold a model's frozen half against its base, bit by bit
  hft reset --tuned TUNED --base BASE --out OUT [--policy category] [--seed 0] [--key value ...]
                            Half-Reset: put what would be frozen back to the base; --fraction stays tuned
  hft merge --method METHOD --models MODEL ... [--base BASE] --out OUT [--key value ...]
                            merge by average, ties, dare, dare-ties, slerp or wise-ft, or an adapter into its base
  hft diff START MODEL ... [--out FOLDER] [--group LAYERS]
                            how far models have moved from where they started, by layer, block and rounds trained
  hft fetch MODEL [FOLDER]  make smollm2-135m or tiny, by default in models/MODEL
  hft demo [FOLDER]         write the demo data, by default to data/
"""

HELP = ("-h", "--help")
# Commands whose settings are so many that they have a help of their own.
PARSED = ("sft", "dpo", "plan", "reset", "merge")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 1 if verify found a difference; 2 for a mistake the user can put right.
    """
    # TRL pings a server whenever a trainer is made; huggingface_hub reads this when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # TRL's own default uses this key, which transformers is renaming.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    # On many processors it warns of a kernel that it lacks, whether or not anything is quantized.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    from hft.errors import HFTError

    asked = command in HELP or (command not in PARSED and any(word in HELP for word in rest))
    try:
        if asked:
            print(USAGE, end="")
            return 0
        if command in ("sft", "dpo"):
            return _train(command, rest)
        if command == "plan" and rest[:1] in (["sft"], ["dpo"]):
            return _train(rest[0], [*rest[1:], "--dry_run", "true"])
        if command == "verify":
            return _verify(rest)
        if command in ("reset", "merge"):
            return _combine(command, rest)
        if command == "diff":
            return _diff(rest)
        if command == "fetch" and 1 <= len(rest) <= 2:
            return _fetch(*rest)
        if command == "demo" and len(rest) <= 1:
            return _demo(*rest)
        print(USAGE, end="", file=sys.stderr)
        return 2
    except HFTError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"hft: {error}", file=sys.stderr)
        return 2


# Imported where they are needed: torch and TRL take seconds to load.
def _train(stage: str, arguments: Sequence[str]) -> int:
    from hft.runs.run import run
    from hft.runs.stages import STAGES

    return run(STAGES[stage], arguments)


def _verify(arguments: Sequence[str]) -> int:
    from pathlib import Path

    from hft.errors import HFTError
    from hft.runs.folder import verify_folder

    match arguments:
        case [out]:
            result = verify_folder(Path(out))
        case [out, "--base", base]:
            result = verify_folder(Path(out), base)
        case _:
            raise HFTError("usage: hft verify OUT [--base BASE]")
    print(result.report())
    return 0 if result.ok else 1


def _combine(command: str, arguments: Sequence[str]) -> int:
    from hft.merging import merge as combining

    return combining.reset(arguments) if command == "reset" else combining.merge(arguments)


def _diff(arguments: Sequence[str]) -> int:
    from hft.merging.diff import diff

    return diff(arguments)


def _fetch(name: str, folder: str | None = None) -> int:
    from hft.demo.models import fetch

    folder = folder or f"models/{name}"
    fetch(name, folder)
    print(f"{name} is in {folder}")
    return 0


def _demo(folder: str = "data") -> int:
    from hft.demo.data import write_demo_data

    rows = write_demo_data(folder)
    for name, count in rows.items():
        print(f"{folder}/{name}: {count:,} rows")
    return 0
