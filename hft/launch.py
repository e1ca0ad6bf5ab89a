"""Starts a command on several processes, as `accelerate launch` does, with the launcher configs in hft/accelerate."""

import argparse
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from hft.config import read_arguments
from hft.errors import HFTError
from hft.methods import classes_of

ENGINES = ("fsdp2", "ddp", "zero3")
CONFIGS = Path(__file__).parent / "accelerate"
GRACE = 600  # seconds for the step and the save of a run that is asked to stop


def run(name: str, command: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """Run a command in this process, or on the processes that the flags ask for: by default one per visible GPU."""
    parser = launcher_flags(name)
    if {"-h", "--help"} & set(words):
        try:
            return command(words)
        finally:
            parser.print_help()
    if "LOCAL_RANK" in os.environ:  # started by torchrun, by `accelerate launch` or by the lines below
        return command(words)
    try:
        options, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise HFTError(str(error)) from error
    gpus, processes = torch.cuda.device_count(), options.num_processes
    if processes is None:
        by_vllm = name == "eval" and any(word.partition("=")[0] == "--backend" for word in rest)  # which starts its own
        alone = by_vllm or (name == "cpi" and rest[:1] in (["group"], ["score"]))  # stages without training
        processes = 1 if alone else max(1, gpus) * options.num_machines
    if processes == 1:
        if gpus > 1 and name != "eval":  # a Trainer that sees several GPUs puts a copy of the model on each
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return command(rest)
    engine = "ddp" if name == "eval" else options.engine or default_engine(rest, gpus)
    check(processes, engine, gpus, options)
    print(f"launching {processes} processes with {engine}; --num_processes and --engine choose others", flush=True)
    status = launch(processes, engine, options, [name, *rest])
    whole = name == "cpi" and " ".join(rest).startswith("--") and "--dry_run" not in rest
    if whole and not status and options.machine_rank == 0:  # its last stage scores, in one process
        return command(["score", *rest])
    return status


def launcher_flags(name: str) -> argparse.ArgumentParser:
    """The flags of the launcher, which are no part of a run's config: they say where it runs, not what it computes."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False, exit_on_error=False)
    group = parser.add_argument_group("several processes")
    add, number = group.add_argument, {"type": int, "metavar": "N"}
    add("--num_processes", "--num-processes", help="over all machines; default: one per visible GPU", **number)
    if name != "eval":
        text = "how they share the model; default: fsdp2, or ddp for a method that cannot be sharded and on CPUs"
        add("--engine", choices=ENGINES, help=text)
    text = "run the same command on each of them (default: 1)"
    add("--num_machines", "--num-machines", default=1, help=text, **number)
    add("--machine_rank", "--machine-rank", default=0, help="number of this machine, from 0", **number)
    add("--main_process_ip", "--main-process-ip", metavar="IP", help="address of machine 0")
    text = "default: 29500, or a free one on a single machine"
    add("--main_process_port", "--main-process-port", help=text, **number)
    return parser


def default_engine(words: Sequence[str], gpus: int) -> str:
    """`fsdp2`, or `ddp` if a part of the method cannot be sharded or there is nothing to shard over."""
    flags = list(itertools.dropwhile(lambda word: not word.startswith("--"), words))
    kinds = {"schedule", "update", "adapter"}  # which a method's file replaces
    values, _ = read_arguments(flags, "hft", "", {}).merge(lambda values: kinds)
    return "fsdp2" if gpus and all(cls.shardable for cls in classes_of(values)) else "ddp"


def check(processes: int, engine: str, gpus: int, options: argparse.Namespace) -> None:
    """Refuse what a launcher would fail at a minute later, or wait for forever."""
    here, left = divmod(processes, options.num_machines)
    if here < 1 or left:
        raise HFTError(f"--num_processes {processes} must be a multiple of --num_machines {options.num_machines}")
    if gpus and here > gpus:
        raise HFTError(f"--num_processes {processes} needs {here} GPUs on this machine, and {gpus} are visible")
    if not gpus and engine != "ddp":
        raise HFTError(f"--engine {engine} shards a model over GPUs, and none is visible; take --engine ddp")
    if engine == "zero3" and find_spec("deepspeed") is None:
        raise HFTError("--engine zero3 needs DeepSpeed: pip install 'half-fine-tuning[deepspeed]'")
    if options.num_machines > 1 and not options.main_process_ip:
        raise HFTError(f"--num_machines {options.num_machines} needs --main_process_ip, the address of machine 0")


def launch(processes: int, engine: str, options: argparse.Namespace, words: Sequence[str]) -> int:
    """Run `hft WORDS` with accelerate's launcher, which passes signals on; return the first failed process's status."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    several, port = options.num_machines > 1, options.main_process_port
    flags = {
        "config_file": CONFIGS / f"{engine}.yaml",
        "deepspeed_config_file": CONFIGS / "zero3.json" if engine == "zero3" else None,
        "num_processes": processes,
        "num_machines": options.num_machines,
        "machine_rank": options.machine_rank,
        "main_process_ip": options.main_process_ip,
        "main_process_port": (29500 if several else 0) if port is None else port,
    }
    given = [word for key, value in flags.items() if value is not None for word in (f"--{key}", str(value))]
    arguments = launch_command_parser().parse_args([*given, "--module", "hft", *words])
    arguments.shutdown_timeout = GRACE  # torchrun's; its default is 30
    logging.disable(logging.ERROR)  # torchrun's account of a failed process, which has said itself what is wrong
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        print(f"hft: process {rank} was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as stopped:
        return 128 + stopped.sigval
    finally:
        logging.disable(logging.NOTSET)
    return 0
