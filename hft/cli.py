"""The `hft` command: one table of commands, each imported when it is called."""

import contextlib
import functools
import gc
import logging
import os
import pkgutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from hft import __version__
from hft.errors import HFTError, Interrupted, Stopped, cannot_write, did_you_mean
from hft.machine import world_size
from hft.objectives import OBJECTIVES, find_objective

# Command, the function that takes the rest of the words and returns an exit status, and what it does.
OBJECTIVE_COMMANDS = {
    objective.name: ("hft.runs.train:main", objective.description)
    for objective in sorted(map(find_objective, OBJECTIVES), key=lambda objective: objective.order)
}
COMMANDS = OBJECTIVE_COMMANDS | {
    "continual": ("hft.continual.command:main", "continual fine-tuning: task after task, all scored after each"),
    "plan": ("hft.planning.forecast:main", "forecast memory, FLOPs and GPU-hours of a run, here or on other GPUs"),
    "importance": ("hft.runs.scoring:main", "score what is important to a base, for runs that freeze it"),
    "verify": ("hft.record.verification:main", "compare a model's frozen half with its base, bit by bit"),
    "reset": ("hft.merging.reset:main", "Half-Reset: reset the half that HFT would freeze to the base"),
    "merge": ("hft.merging.merge:main", "merge models, or an adapter into its base"),
    "keep": ("hft.keep:main", "move a tuned model back toward the base, within a budget for forgetting"),
    "diff": ("hft.merging.diff:main", "how far models have moved from where they started, by layer and block"),
    "eval": ("hft.evaluation.command:main", "score models with lm-evaluation-harness"),
    "generate": ("hft.evaluation.generate:main", "answers of runs and their bases to the same prompts, side by side"),
    "compare": ("hft.reporting.compare:main", "how scored models differ on the same rows, with 95% intervals"),
    "paper": ("hft.reporting.paper:paper", "print the paper's tables, their commands, and your scores"),
    "report": ("hft.reporting.sections:report", "compare runs: one HTML page, and Markdown with figures"),
    "push": ("hft.runs.push:main", "upload a finished run to the Hub once verify has passed"),
    "recipes": ("hft.catalog:main", "list the recipes and methods that come with hft, or copy one"),
    "schema": ("hft.schema:main", "print a JSON schema of recipes, for editors"),
    "completion": ("hft.completion:main", "print a completion script for bash, zsh or tcsh"),
    "fetch": ("hft.demo.command:fetch", "make smollm2-135m or tiny, by default in models/MODEL"),
    "demo": ("hft.demo.command:demo", "write the demo data, by default to data/"),
    "cpi": ("hft.cpi.command:main", "CPI-FT: freeze what earlier tasks need: [STAGE] --config RECIPE [ARM]"),
}
WAITING = (signal.SIGINT, signal.SIGTERM)
# Those that run on several processes: on the visible GPUs, or as --num_processes and --engine say.
LAUNCHED = (*OBJECTIVES, "continual", "eval", "cpi")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status.

    0; 1 if verify found a difference; 2 for a mistake that the user can correct; 143 or 130 after SIGTERM or Ctrl-C.
    """
    # TRL pings a server whenever a trainer is made; huggingface_hub reads this when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():  # progress bars are for terminals; tqdm reads this when it is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    # On many processors it warns of a kernel that it lacks, whether or not anything is quantized.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # TRL's own default uses this key, which transformers is renaming.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)

    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if threading.current_thread() is threading.main_thread():  # a run that trains answers SIGTERM and Ctrl-C itself
        signal.signal(signal.SIGTERM, functools.partial(_interrupt, os.getpid()))
    try:
        command, *rest = words
        if command == "--version":
            print(f"hft {__version__}")
            return 0
        if command in ("-h", "--help"):
            print("usage: hft COMMAND ...\n\nHalf fine-tuning on TRL.\n\ncommands:")
            print(*(f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()), sep="\n")
            print("\nhft COMMAND --help lists what a command takes.")
            return 0
        if command not in COMMANDS:
            raise HFTError(f"no command {command!r}{did_you_mean(command, COMMANDS, '; hft --help lists them')}")
        run = functools.partial(_run, command)
        return _imported("hft.launch:run")(command, run, rest) if command in LAUNCHED else run(rest)
    except HFTError as error:
        failed = type(error)(*error.args)  # its frames keep progress bars open
    except KeyboardInterrupt as stopped:
        name, kind = ("SIGTERM", Stopped) if stopped.args else ("SIGINT", Interrupted)
        resumed = "; run the same command again to continue from what is complete" if command in LAUNCHED else ""
        failed = kind(f"stopped by {name}{resumed}")
    except BrokenPipeError:  # whoever read the output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # a shell's for SIGPIPE
    except SystemExit as done:  # argparse, after --help or a mistake
        return int(done.code or 0)
    except Exception as error:
        if not (sentence := cannot_write(error)):
            if world_size() == 1:
                raise
            traceback.print_exc()
            return _end_at_once(1)
        failed = HFTError(sentence)
    print_error(failed)
    return failed.status if world_size() == 1 else _end_at_once(failed.status)


def _run(command: str, words: Sequence[str]) -> int:
    """Run a command in this process; whoever launches others imports none of it."""
    function = _imported(COMMANDS[command][0])
    return function(command, words) if command in OBJECTIVES else function(words)


def _imported(target: str) -> Callable[..., int]:
    """The function that `module:function` names, imported without looking for garbage among what stays anyway.

    Signals wait until then: some packages hide an interrupted import, or cannot be imported again after it.
    """
    if target.partition(":")[0] not in sys.modules:
        gc.disable()
        signal.pthread_sigmask(signal.SIG_BLOCK, WAITING)
        try:
            pkgutil.resolve_name(target)
        finally:
            gc.freeze()
            gc.enable()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, WAITING)
    return pkgutil.resolve_name(target)


def _interrupt(process: int, number: int, frame: object) -> None:
    """SIGTERM ends a command as Ctrl-C does, but a worker that its process has forked at once."""
    if os.getpid() != process:
        os._exit(128 + number)
    raise KeyboardInterrupt(number)


def _end_at_once(status: int) -> NoReturn:
    """End one of several processes past Python's own end, where a thread of gloo would abort it (torch 2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def print_error(error: HFTError | str) -> None:
    """Print an error, once per run: where all processes fail alike, the first one speaks."""
    if os.environ.get("RANK", "0") != "0":
        if isinstance(error, Stopped):  # as the first process, which says so
            return
        time.sleep(3)  # until the launcher ends this process, unless only this one has failed
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()  # the error comes last in a log of both
    print(f"hft: {error}", file=sys.stderr, flush=True)
