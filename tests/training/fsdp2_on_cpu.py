"""accelerate's FSDP2 on CPU processes: torchrun fsdp2_on_cpu.py [--ddp] WORDS OF hft, or --runs FILE.

accelerate shards on a CPU as on a GPU and only declines to choose FSDP2 there, so this chooses it. Everything else is
what `accelerate launch` with hft/accelerate/fsdp2.yaml sets up; `--ddp` leaves it at DDP. The runs of a file follow
each other in one process. It is a JSON list of {"objective", "files", "flags"}, of {"copy": [checkpoint, into]}, and at
its end of {"words"} of hft. With "refused", a run is to end with an error that says this, under an engine that leaves
all weights in bf16.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
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


def check_refused(train: Callable[[], object], message: str) -> None:
    """Check that a run is refused under an engine that leaves all weights in bf16."""
    from hft.errors import HFTError

    prepare = Accelerator.prepare

    def halved(self, *args, **kwargs):
        prepared = prepare(self, *args, **kwargs)
        for model in prepared if isinstance(prepared, list | tuple) else (prepared,):
            if isinstance(model, torch.nn.Module):
                model.bfloat16()
        return prepared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "prepare", halved)
        with pytest.raises(HFTError, match=message):
            train()


def main(words: list[str]) -> int:
    import hft
    from hft.cli import main as hft_main
    from hft.machine import is_main, leave_process_group

    if words[0] != "--runs":
        return hft_main(words)
    for run in json.loads(Path(words[1]).read_text()):
        if "words" in run:  # the last one, since a command ends torch.distributed
            return hft_main(run["words"])
        if "copy" in run:
            checkpoint, into = map(Path, run["copy"])
            if is_main():
                shutil.copytree(checkpoint, into / checkpoint.name)
            torch.distributed.barrier()
            continue
        config = hft.load_config(run["objective"], *run["files"], **run["flags"])
        if "refused" in run:
            check_refused(lambda config=config: hft.train(hft.make_plan(config)), run["refused"])
            continue
        assert hft.train(hft.make_plan(config)).ok, run
    leave_process_group()
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "--ddp":
        sys.exit(main(words[1:]))
    set_environment()
    choose_fsdp()
    sys.exit(main(words))
