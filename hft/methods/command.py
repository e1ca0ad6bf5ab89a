"""`hft engine`: a command line in, an exit status out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hft.config import read_yaml
from hft.methods import method_of


def engine(arguments: Sequence[str]) -> int:
    """Print which accelerate config a method runs under on several GPUs: `fsdp2`, or `ddp` if it cannot be sharded."""
    parser = argparse.ArgumentParser(prog="hft engine", description="Print how a method runs on several GPUs.")
    parser.add_argument("files", nargs="+", metavar="METHOD.yaml", help="the method's file")
    parser.add_argument("--strategy", help="that of a sequence of tasks")
    options = parser.parse_args(arguments)
    values = {"strategy": options.strategy}
    for path in options.files:
        values |= read_yaml(path)
    print("fsdp2" if method_of(values).shardable else "ddp")
    return 0
