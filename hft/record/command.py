"""`hft verify`: a command line in, an exit status out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hft.record.verification import verify_folder


def main(arguments: Sequence[str]) -> int:
    """Compare an output folder with its base; 1 if something differs that should not."""
    parser = argparse.ArgumentParser(prog="hft verify", description="Compare a model's frozen half with its base.")
    parser.add_argument("out", metavar="OUT", help="folder of a run, a checkpoint or a reset")
    parser.add_argument("--base", help="the base, if it is not where the manifest says: a folder or a Hub id")
    options = parser.parse_args(arguments)
    found = verify_folder(options.out, options.base)
    print(found.report())
    return 0 if found.ok else 1
