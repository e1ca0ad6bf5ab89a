"""Processes forked from one that has imported everything, since imports take most of a tiny run."""

import faulthandler
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELOADED = ["tests.processes", "hft.runs.train", "hft.training", "hft.record.picture"]


def start(processes: int, function: Callable[..., int], *args: object) -> list[BaseProcess]:
    """Call a function of a module in some processes at the root, and take what it returns as their status.

    They have the environment of this process, and if there are several that of torchrun too, for gloo.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(processes):
        env = group | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        env = dict(os.environ) | {key: str(value) for key, value in env.items()}
        started.append(server.Process(target=_call, args=(env, function, args)))
        started[-1].start()
    return started


def torchrun(processes: int, main: Callable[[list[str]], int], *words: object) -> str:
    """Call `main(words)` in some processes, which end together once one has failed.

    Returns:
        What they printed. If one fails, the error has the last words of each of them.
    """
    with tempfile.TemporaryDirectory() as logs:
        started = start(processes, _logged, logs, main, list(map(str, words)))
        running = started
        while running and not any(process.exitcode for process in started):
            wait([process.sentinel for process in running])
            running = [process for process in running if process.exitcode is None]
        for process in running:
            process.join(5)  # to say what is wrong
            process.kill()
        for process in started:
            process.join()
        out, err = ([Path(logs, f"{rank}.{name}").read_text() for rank in range(processes)] for name in ("out", "err"))
    last = (f"process {rank}, {one.exitcode}:\n{err[rank][-3000:]}" for rank, one in enumerate(started))
    assert not any(process.exitcode for process in started), "\n\n".join(last)
    return "".join(out)


def _call(env: dict[str, str], function: Callable[..., int], args: tuple[object, ...]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.exit(function(*args))


def _logged(logs: str, main: Callable[[list[str]], int], words: list[str]) -> int:
    for number, name in ((1, "out"), (2, "err")):
        path = Path(logs, f"{os.environ.get('RANK', '0')}.{name}")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    faulthandler.enable()
    return main(words)
