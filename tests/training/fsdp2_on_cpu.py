"""Runs that follow each other in each of several processes, also under accelerate's FSDP2 on CPUs.

accelerate shards on a CPU as on a GPU and only declines to choose FSDP2 there, so this chooses it. Everything else is
what `accelerate launch` with hft/accelerate/fsdp2.yaml sets up. torchrun fsdp2_on_cpu.py WORDS OF hft is one command.

Runs are a file, a JSON list of {"objective", "files", "flags"}, of {"copy": [checkpoint, into]}, and at its end of
{"words"} of hft. A run with a "fault", which an engine has, is to be refused.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

ROOT = Path(__file__).parents[2]


def set_environment() -> None:
    """What `accelerate launch` makes of the config that `make` uses, and of a precision in the environment."""
    config = yaml.safe_load((ROOT / "hft/accelerate/fsdp2.yaml").read_text())
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", config["mixed_precision"])
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ |= {key.upper(): str(value).lower() for key, value in config["fsdp_config"].items()}
    for key in ("fsdp_auto_wrap_policy", "fsdp_state_dict_type"):
        os.environ[key.upper()] = config["fsdp_config"][key]


def choose_fsdp() -> None:
    """Let accelerate's state be FSDP's where it would be plain data parallelism on CPUs."""
    init = AcceleratorState.__init__

    def patched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and "fsdp_plugin" not in self.__dict__:
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
        if self.__dict__.get("fsdp_plugin") is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def halve_masters(patch: pytest.MonkeyPatch) -> None:
    """Leave all weights in bf16, as accelerate 1.13 does under FSDP2."""
    prepare = Accelerator.prepare

    def halved(self, *args, **kwargs):
        prepared = prepare(self, *args, **kwargs)
        for model in prepared if isinstance(prepared, list | tuple) else (prepared,):
            if isinstance(model, torch.nn.Module):
                model.bfloat16()
        return prepared

    patch.setattr(Accelerator, "prepare", halved)


def split_batches(patch: pytest.MonkeyPatch) -> None:
    """Divide a batch among the processes, where each should take one."""
    patch.setattr(Accelerator, "split_batches", True)


FAULTS = {
    "halves masters": (halve_masters, "should be held in torch.float32"),
    "splits batches": (split_batches, "a step takes 4 rows"),
}


def follow(words: list[str]) -> int:
    """Take the runs of a file."""
    import hft
    from hft.cli import main
    from hft.errors import HFTError
    from hft.machine import is_main, leave_process_group

    for run in json.loads(Path(words[0]).read_text()):
        if "words" in run:  # the last one, since a command ends torch.distributed
            return main(run["words"])
        if "copy" in run:
            checkpoint, into = map(Path, run["copy"])
            if is_main():
                shutil.copytree(checkpoint, into / checkpoint.name)
            torch.distributed.barrier()
            continue
        config = hft.load_config(run["objective"], *run["files"], **run["flags"])
        if "fault" in run:
            make, refused = FAULTS[run["fault"]]
            with pytest.MonkeyPatch.context() as patch:
                make(patch)
                with pytest.raises(HFTError, match=refused):
                    hft.train(hft.make_plan(config))
            continue
        plan = hft.make_plan(config)
        assert hft.train(plan).ok, run
        assert AcceleratorState().mixed_precision == ("bf16" if plan.args.bf16 else "no")  # whatever the launcher says
    leave_process_group()
    return 0


def follow_sharded(words: list[str]) -> int:
    """Take the runs of a file under FSDP2."""
    set_environment()
    choose_fsdp()
    return follow(words)


def command_sharded(words: list[str]) -> int:
    """A command of hft under FSDP2."""
    from hft.cli import main

    set_environment()
    choose_fsdp()
    return main(words)


if __name__ == "__main__":
    sys.exit(command_sharded(sys.argv[1:]))
