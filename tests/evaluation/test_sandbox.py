"""A generated program passes or not, and leaves everything but its own folder as it was."""

import sys
from pathlib import Path

import pytest

from hft.evaluation.sandbox import passes


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "while True: pass",
        "while True: print('x' * 2**20)",
        "import mmap; mmap.mmap(-1, 2**31)",
        "open('big', 'wb').write(bytes(2**22))",
        "\ud800 is no text",
    ],
)
def test_a_program_that_fails_or_takes_too_much_does_not_pass(program):
    assert not passes(f"try_it = 1\n{program}", seconds=1)


def test_ordinary_programs_pass():
    """What solutions do, several in one process to save time."""
    program = """
import collections, dataclasses, re, os, shutil, sys, tempfile, threading
import numpy

assert __name__ != "__main__"
assert re.findall("a+", "caat") == ["aa"] and collections.Counter("aab")["a"] == 2
assert numpy.linalg.inv(numpy.eye(2)).sum() == 2

@dataclasses.dataclass
class Point:
    x: "int"

threads = [threading.Thread(target=Point, args=(1,)) for _ in range(3)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
with open("a.txt", "w") as file:
    file.write("text")
os.chmod("a.txt", 0o600)
os.rename("a.txt", "b.txt")
os.symlink("b.txt", "link")
with open("link", "a") as file:
    file.truncate(2)
os.makedirs("x/y")
shutil.copy("b.txt", "x/y")
assert open("x/y/b.txt").read() == "te"
shutil.rmtree("x")
os.remove("link")
with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as file:
    file.write(b"text")
    numpy.ones(2).tofile(os.path.join(folder, "array"))
print("shown", flush=True)
with open(os.devnull, "w") as sys.stdout:
    print("hidden")
sys.stdout = None  # and no newline at the end
"""
    assert passes(program)
    assert passes("import threading\nthreading.Thread(target=threading.Event().wait).start()")  # runs still


# Each acts on the file VICTIM or the folder HOME, which stands around it.
REFUSED = {
    "remove": "os.remove(VICTIM)",
    "rmtree": "shutil.rmtree(HOME)",
    "rename": "os.rename(VICTIM, VICTIM + '2')",
    "replace by a file of its own": "open('new', 'w').close(); os.replace('new', VICTIM)",
    "move away": "shutil.move(VICTIM, 'here')",
    "write": "open(VICTIM, 'w')",
    "append": "open(VICTIM, 'a')",
    "update": "open(VICTIM, 'r+b')",
    "create": "open(VICTIM + '2', 'x')",
    "write bytes": "pathlib.Path(VICTIM).write_bytes(b'')",
    "os.open": "os.open(VICTIM, os.O_WRONLY)",
    "os.open to truncate": "os.open(VICTIM, os.O_RDONLY | os.O_TRUNC)",
    "a path with dots": "open(os.path.relpath(VICTIM), 'w')",
    "a working directory": "os.chdir(HOME); open('victim', 'w')",
    "a symbolic link": "os.symlink(VICTIM, 'link'); open('link', 'w')",
    "a hard link": "os.link(VICTIM, 'link'); open('link', 'w')",
    "an open folder": "os.remove('victim', dir_fd=os.open(HOME, os.O_RDONLY))",
    "a file in an open folder": "os.open('victim', os.O_WRONLY, dir_fd=os.open(HOME, os.O_RDONLY))",
    "a folder of its own and dots": "os.mkdir('a'); os.chdir('a'); own = os.open('..', os.O_RDONLY); "
    "os.remove(os.path.relpath(VICTIM, '..'), dir_fd=own)",
    "dots that os.open does not tell": "os.makedirs('a/b'); own = os.open('.', os.O_RDONLY); os.chdir('a'); "
    "os.open('../b', os.O_WRONLY | os.O_CREAT, dir_fd=own)",
    "an open file": "os.chmod(open(VICTIM).fileno(), 0)",
    "truncate": "os.truncate(VICTIM, 0)",
    "chmod": "os.chmod(VICTIM, 0)",
    "chown": "os.chown(VICTIM, 1, 1)",
    "times": "os.utime(VICTIM, (0, 0))",
    "attributes": "os.setxattr(VICTIM, 'user.a', b'')",
    "attributes removed": "os.removexattr(VICTIM, 'user.a')",
    "link there": "os.symlink(VICTIM, VICTIM + '2')",
    "mkdir": "os.mkdir(HOME + '/new')",
    "mkfifo": "os.mkfifo(HOME + '/new')",
    "mknod": "os.mknod(HOME + '/new')",
    "rmdir": "os.rmdir(HOME)",
    "memory": "open(f'/proc/{os.getppid()}/mem', 'wb')",
    "copy": "shutil.copyfile(__import__('sys').executable, VICTIM)",
    "kill": "os.kill(os.getppid(), 15)",
    "kill a group": "os.killpg(os.getpgid(os.getppid()), 15)",
    "pidfd": "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 15)",
    "thread": "signal.pthread_kill(threading.get_ident(), 15)",
    "shell": "os.system('true')",
    "subprocess": "subprocess.run(['true'])",
    "exec": "os.execv('/bin/true', ['true'])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "fork": "os.fork()",
    "pty": "pty.spawn(['true'])",
    "multiprocessing": "multiprocessing.get_context('spawn').Process(target=print).start()",
    "ctypes": "ctypes.CDLL(None).remove(VICTIM.encode())",
    "socket": "socket.create_connection(('127.0.0.1', 9))",
    "sqlite": "sqlite3.connect(VICTIM)",
    "system log": "syslog.syslog('x')",
    "priority": "os.setpriority(os.PRIO_USER, os.getuid(), 19)",
    "history": "__import__('readline')",
    "limits": "resource.setrlimit(resource.RLIMIT_CORE, (1, 1))",
}
MODULES = "ctypes, multiprocessing, os, pathlib, pty, resource, shutil, signal, socket, sqlite3, subprocess, syslog"


@pytest.mark.skipif(sys.platform != "linux", reason="not every function is there")
def test_what_reaches_beyond_its_folder_is_refused(tmp_path):
    """By the audit hook itself: a read-only file system or a network namespace would raise other errors."""
    victim = tmp_path / "home" / "victim"
    victim.parent.mkdir()
    victim.write_text("kept")
    before = victim.stat()
    actions = "".join(f"\ndef f{number}():\n    {action}\n" for number, action in enumerate(REFUSED.values()))
    program = f"""
import {MODULES}, threading
VICTIM, HOME = {str(victim)!r}, {str(victim.parent)!r}
START = os.getcwd()
{actions}
for number, name in enumerate({list(REFUSED)!r}):
    os.chdir(START)
    shutil.rmtree("a", ignore_errors=True)
    for own in os.listdir():
        os.remove(own)
    try:
        globals()[f"f{{number}}"]()
    except (ImportError, PermissionError) as error:
        assert str(error).endswith("refused"), name
    else:
        raise AssertionError(name)
"""
    assert passes(program)
    assert victim.read_text() == "kept"
    assert (victim.stat().st_mode, victim.stat().st_mtime) == (before.st_mode, before.st_mtime)
    assert [path.name for path in tmp_path.rglob("*")] == ["home", "victim"]


def test_where_linux_makes_namespaces_only_its_folder_can_be_written_to_by_whatever_means(tmp_path):
    """`posix.mkfifo` raises no audit event, and the hook leaves this name of it."""
    namespaces = "import os; assert len(open('/proc/self/mountinfo').read().split(os.getcwd())) > 1"
    if sys.platform != "linux" or not passes(namespaces):
        pytest.skip("no namespaces here")
    assert passes("import posix; posix.mkfifo('here')")
    assert not passes(f"import posix; posix.mkfifo({str(tmp_path / 'there')!r})")
    assert list(tmp_path.iterdir()) == []
    network = Path("/proc/self/ns/net")
    assert passes(f"import os; assert os.readlink({str(network)!r}) != {str(network.readlink())!r}")
