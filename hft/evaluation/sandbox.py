"""Run a generated program in a separate process that can change nothing but a folder that is then deleted."""

import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")


def passes(program: str, seconds: int = 10) -> bool:
    """Whether a program, its tests included, runs to its end without an error; `sys.exit` and `os._exit` do not.

    It may take `seconds` of processor time, and about as many of wall time. docs/evaluation.md says what else it may
    not do. That stops what models write, not an attacker.
    """
    token = secrets.token_hex()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", str(GUARD), str(seconds)]
        # numpy's BLAS takes address space for each of its threads
        environment = {"HOME": folder, "TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1"}
        streams = {"input": f"{token}\n{program}".encode(errors="replace"), "stdout": subprocess.PIPE}
        streams["stderr"] = subprocess.DEVNULL
        try:
            done = subprocess.run(command, cwd=folder, env=environment, timeout=seconds + 2, check=False, **streams)
        except subprocess.TimeoutExpired:
            return False
    return done.stdout == token.encode()
