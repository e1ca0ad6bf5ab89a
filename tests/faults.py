"""The command line in a process of its own that is killed, or finds the disk full, at a named moment.

A moment is what a run does to its folder or its weights: `step 2`, `optimizer 2` and `moved 2` (before and after the
optimizer's step), `evaluate 2`, `verify F`, and of files `write F`, `wrote F`, `rename F`, `remove F`, `mkdir F`. Those
of the second process start with `1: `. Who is killed at `write F` leaves half of F.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.processes import start

SIGKILL = -signal.SIGKILL


def run(
    words: Sequence[str], out: Path, *, at: str = "", does: str = "kill", trace: bool = False, processes: int = 1
) -> list[int]:
    """Run `hft WORDS`, in one process or in several over gloo.

    Args:
        words: of the command line.
        out: folder whose files make moments; the printed lines are in `OUT.log`.
        at: the moment at which something happens to a process.
        does: what happens. `kill`: it gets SIGKILL, and the others with it; `terminate` and `interrupt`: it gets
            SIGTERM or SIGINT; `fill`: from now on it cannot write files of more than 1 MB.
        trace: whether the first process's moments are written to `OUT.moments`.
        processes: how many.

    Returns:
        The exit status of each process; of a signal, minus its number.
    """
    event = (at, does) if at else ("", "")
    started = start(processes, _main, [str(word) for word in words], str(out), event, trace)
    wait([process.sentinel for process in started])
    if at and does == "kill":  # as a launcher does once one process has died
        for process in started:
            process.join(0.2)
            process.kill()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def killed_at(moments: Sequence[str], words: Sequence[str], out: Path, processes: int = 1) -> None:
    """Kill a command at each moment in turn, starting it again every time, and let the last one end."""
    for moment in moments:
        found = run(words, out, at=moment, processes=processes)
        assert SIGKILL in found, f"{printed(out)[-2000:]}\n{moment}: {found}"
    assert not any(run(words, out, processes=processes)), printed(out)[-2000:]


def moments(out: Path) -> list[str]:
    """The moments of a run that was traced, in order, without repetitions."""
    return list(dict.fromkeys(json.loads(line) for line in Path(f"{out}.moments").read_text().splitlines()))


def printed(out: Path) -> str:
    """What the last run of a folder printed, stderr included."""
    return Path(f"{out}.log").read_text()


def _main(words: list[str], out: str, event: tuple[str, str], trace: bool) -> int:
    rank = os.environ.get("RANK", "0")
    log = os.open(f"{out}.log" if rank == "0" else f"{out}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    Moments(Path(out), event, trace and rank == "0").watch()
    from hft.cli import main

    return main(words)


class Moments:
    """Announces the moments of this process, and lets happen what should happen at one of them."""

    def __init__(self, out: Path, event: tuple[str, str], trace: bool):
        self.out, self.event, self.step, self.is_busy = out, event, 0, False
        self.log = os.open(f"{out}.moments", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if trace else None
        self.prefix = "" if (rank := os.environ.get("RANK", "0")) == "0" else f"{rank}: "

    def at(self, moment: str, path: str | None = None) -> None:
        """A moment; `path` is that of a file which whoever is killed leaves half written."""
        self.is_busy = True
        if self.log is not None:
            os.write(self.log, f"{json.dumps(moment)}\n".encode())
        if self.prefix + moment == self.event[0]:
            self.happen(self.event[1], path)
        self.is_busy = False

    def happen(self, what: str, path: str | None) -> None:
        if what in ("terminate", "interrupt"):
            os.kill(os.getpid(), signal.SIGTERM if what == "terminate" else signal.SIGINT)
        elif what == "fill":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        else:
            if path is not None:
                content = Path(path).read_bytes() if Path(path).exists() else b"{"
                Path(path).write_bytes(content[: max(1, len(content) // 2)])
            os.kill(os.getpid(), signal.SIGKILL)

    def name_of(self, path: Any) -> str | None:
        """The name of a file in the folder; None for any other one."""
        if not isinstance(path, str | os.PathLike):
            return None
        path = Path(path).absolute()
        return str(path.relative_to(self.out)) if path.is_relative_to(self.out) else None

    def audit(self, what: str, args: tuple[Any, ...]) -> None:
        """A hook of Python's own files; torch and safetensors open theirs without it."""
        if self.is_busy or what not in ("open", "os.rename", "os.remove", "os.mkdir"):
            return
        if (name := self.name_of(args[0])) is None:
            return
        if what != "open":
            self.at(f"{what.removeprefix('os.')} {name}")
        elif args[2] & (os.O_WRONLY | os.O_RDWR):
            self.at(f"write {name}", args[0])

    def writes(self, function: Callable) -> Callable:
        """A function that writes the file which is its second argument."""

        def write(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            function(content, path, *args, **kwargs)
            if name := self.name_of(path):
                self.at(f"write {name}", path)
                self.at(f"wrote {name}")

        return write

    def before(self, function: Callable, name: Callable[..., str]) -> Callable:
        """A function whose every call is a moment."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.at(name(*args))
            return function(*args, **kwargs)

        return call

    def step_of(self, trainer: Any, *_: Any) -> str:
        self.step = trainer.state.global_step
        return f"step {self.step}"

    def watch(self) -> None:
        """From now on announce them."""
        import safetensors.torch
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
        from transformers import Trainer

        from hft.record import verification

        sys.addaudithook(self.audit)
        torch.save = self.writes(torch.save)
        safetensors.torch.serialize_file = self.writes(safetensors.torch.serialize_file)
        Trainer.training_step = self.before(Trainer.training_step, self.step_of)
        Trainer.evaluate = self.before(Trainer.evaluate, lambda trainer, *_: f"evaluate {trainer.state.global_step}")
        verified = verification.verify_folder
        verification.verify_folder = self.before(verified, lambda folder: f"verify {self.name_of(folder)}")
        register_optimizer_step_pre_hook(lambda *_: self.at(f"optimizer {self.step}"))
        register_optimizer_step_post_hook(lambda *_: self.at(f"moved {self.step}"))
