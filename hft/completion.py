"""`hft completion SHELL`: a completion script for hft's commands, flags and values, made by shtab from their help."""

import argparse
import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout

from tqdm.auto import tqdm

from hft.cli import COMMANDS
from hft.cli import main as hft


def main(arguments: Sequence[str]) -> int:
    """Print the script."""
    import shtab

    parser = argparse.ArgumentParser(prog="hft completion", description="Print a completion script for a shell.")
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    shell = parser.parse_args(arguments).shell
    every = argparse.ArgumentParser(prog="hft")
    commands = every.add_subparsers()
    for name in tqdm(COMMANDS, desc="reading the help of each command", unit="command"):
        command = commands.add_parser(name, help=COMMANDS[name][1])
        command.add_argument("words", nargs="*").complete = shtab.FILE
        with redirect_stdout(io.StringIO()) as printed:
            hft([name, "--help"])
        for flag, kind in dict(re.findall(r"^ +--([a-z]\w+)(.*)$", printed.getvalue(), re.MULTILINE)).items():
            values = re.findall(r"'(\w+)'", kind) or ["true", "false"] * ("true or false" in kind)
            given = command.add_argument(f"--{flag}", choices=values or None)
            if not values:
                given.complete = shtab.FILE
    print(shtab.complete(every, shell))
    return 0
