"""Gives up what a generated program must not have, and runs it; `hft.evaluation.sandbox` starts this file."""

import _posixsubprocess
import ctypes
import os
import resource
import signal
import sys

# Audit events of what changes files, beside `open`.
CHANGES = {"os.chflags", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.removexattr", "os.rename"}
CHANGES |= {"os.rmdir", "os.setxattr", "os.symlink", "os.truncate", "os.utime"}
# Other processes, the network, C functions, and SQL, which names files of its own.
REFUSED = (
    *("os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.system", "signal.pthread_kill", "subprocess."),
    *("ctypes.", "resource.", "socket.", "sqlite3.", "syslog."),
)
# What acts without an audit event: modules that write, and functions.
REFUSED_MODULES = {"_dbm", "_gdbm", "readline"}
UNAUDITED = [(os, "mkfifo"), (os, "mknod"), (os, "setpriority"), (signal, "pidfd_send_signal")]
UNAUDITED += [(_posixsubprocess, "fork_exec")]  # multiprocessing's
MEMORY = 2**30  # bytes of address space
WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC


def isolate(folder: str) -> None:
    """Where Linux lets users make namespaces, leave no network and no place to write but the folder."""
    libc = ctypes.CDLL(None)
    new_mounts, new_user, new_network, bind = 0x20000, 0x10000000, 0x40000000, 0x1000
    if libc.unshare(new_mounts | new_user | new_network) != 0:
        return
    mount_setattr, here, recursive, read_only = 442, -100, 0x8000, 1  # a system call, since glibc has it from 2.36 on
    path = os.fsencode(folder)
    libc.mount(path, path, None, bind, None)
    for where, flags, attributes in ((b"/", recursive, (read_only, 0, 0, 0)), (path, 0, (0, read_only, 0, 0))):
        libc.syscall(mount_setattr, here, where, flags, (ctypes.c_uint64 * 4)(*attributes), 32)
    os.chdir(folder)


def make_hook(folder: str):
    """The audit hook that refuses what reaches beyond the folder.

    Nothing outside can be opened to write, linked to, or opened as a folder. So all that a path inside leads to is
    inside, also from an open folder, which the events do not tell, if the path does not lead up.
    """

    def is_inside(path) -> bool:
        path = os.fsdecode(path)
        return ".." not in path.split("/") and (os.path.realpath(path) + os.sep).startswith(folder + os.sep)

    def may_open(path, mode, flags) -> bool:
        if isinstance(path, int) or os.fsdecode(path) == os.devnull:
            return True
        writes = flags & WRITING or set(mode or "") & set("wax+")
        return is_inside(path) or not (writes or (mode is None and os.path.isdir(path)))

    def may_change(first, *others) -> bool:
        paths = [first, *(other for other in others if isinstance(other, str | bytes | os.PathLike))]
        return not isinstance(first, int) and all(map(is_inside, paths))

    checks = {"open": may_open, **dict.fromkeys(CHANGES, may_change)}

    def hook(event, arguments):
        if event == "import" and arguments[0] in REFUSED_MODULES:
            raise ImportError(f"{arguments[0]} is refused")
        if event.startswith(REFUSED) or (event in checks and not checks[event](*arguments)):
            raise PermissionError(f"{event} is refused")

    return hook


def refuse(*_, **__):
    raise PermissionError("this is refused")


def run(seconds: int) -> None:
    """Run the program on stdin after the line with a token; write the token to stdout if it runs to its end."""
    token, _, program = sys.stdin.buffer.read().partition(b"\n")
    report, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    folder = os.path.realpath(os.getcwd())
    if sys.platform == "linux":
        isolate(folder)
    for limit, value in (("AS", MEMORY), ("CPU", seconds), ("FSIZE", 2**20), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
    for module, name in UNAUDITED:
        if hasattr(module, name):
            setattr(module, name, refuse)
    sys.addaudithook(make_hook(folder))  # cannot be removed again
    exec(compile(program, "program", "exec"), {})  # as HumanEval's own: __name__ is not "__main__"
    os.write(report, token)
    os._exit(0)  # whatever threads still run


if __name__ == "__main__":
    run(int(sys.argv.pop()))
