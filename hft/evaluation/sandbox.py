"""Run a generated program in a separate process, with limits on time and memory and without a network."""

import functools
import secrets
import shutil
import subprocess
import sys
import tempfile

SECONDS = 10
MEMORY = 2**30  # bytes
# Runs in the child before the program. The limits come first, then the hook, which cannot be removed again.
GUARD = """
import resource, sys
seconds, memory, token = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
program = sys.stdin.read()
for limit, value in (("AS", memory), ("CPU", seconds), ("FSIZE", 2**20), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
def hook(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "ctypes.")):
        raise PermissionError(event)
del sys.argv[1:]
sys.addaudithook(hook)
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
print(token)
"""


def passes(program: str, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Whether a program, its tests included, runs to its end without an error; `sys.exit` and `os._exit` do not.

    It may take `seconds` of processor time, about as many of wall time, and `memory` bytes of address space. Where
    Linux lets users make namespaces, the process has no network interface; everywhere Python's audit hooks refuse
    sockets and further processes. That stops what models write, not an attacker: run code that may be hostile in a
    container.
    """
    token = secrets.token_hex()
    command = [*_no_network(), sys.executable, "-I", "-c", GUARD, str(seconds), str(memory), token]
    with tempfile.TemporaryDirectory() as folder:
        try:
            limits = {"timeout": seconds + 2, "cwd": folder, "env": {}}
            done = subprocess.run(command, input=program.encode(), capture_output=True, check=False, **limits)
        except subprocess.TimeoutExpired:
            return False
    return done.stdout.decode(errors="replace").rstrip("\n").endswith(token)


@functools.cache
def _no_network() -> tuple[str, ...]:
    """The prefix that takes a command's network away; empty where that is not possible."""
    command = (shutil.which("unshare"), "--map-root-user", "--net")
    works = command[0] and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return command if works else ()
