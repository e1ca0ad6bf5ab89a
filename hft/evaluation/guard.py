"""Gives up what a generated program must not have, and runs it; `hft.evaluation.sandbox` starts this file."""

import _posixsubprocess
import ctypes
import os
import resource
import signal
import sys

# Audit events of what changes files: where their arguments hold a path, and the open folder it starts from.
CHANGES = {
    "os.chflags": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.removexattr": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.setxattr": ((0, None),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
}
NAMES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"}  # the others follow a link at the end
# Other processes, the network, C functions, and SQL, which names files of its own.
REFUSED = (
    *("os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.system", "signal.pthread_kill", "subprocess."),
    *("ctypes.", "resource.", "socket.", "sqlite3.", "syslog."),
)
# What acts without an audit event: modules that write, and functions.
REFUSED_MODULES = {"_dbm", "_gdbm", "readline"}
UNAUDITED = [(os, "mkfifo"), (os, "mknod"), (os, "setpriority"), (signal, "pidfd_send_signal")]
UNAUDITED += [(_posixsubprocess, "fork_exec")]  # multiprocessing's
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
    """The audit hook that refuses what reaches beyond the folder."""

    def is_inside(path, start=None, follow=True) -> bool:
        if isinstance(path, int):
            path = f"/proc/self/fd/{path}"
        elif start not in (None, -1):
            path = os.path.join(os.path.realpath(f"/proc/self/fd/{start}"), os.fsdecode(path))
        parent, name = os.path.split(os.fsdecode(path))
        place = os.path.realpath(os.fsdecode(path)) if follow else os.path.join(os.path.realpath(parent), name)
        return (place + os.sep).startswith(folder + os.sep)

    def may_open(path, mode, flags) -> bool:
        if not isinstance(path, str | bytes | os.PathLike) or is_inside(path):
            # os.open does not tell its audit event which folder a relative path starts from
            return mode is not None or not flags & WRITING or b".." not in os.fsencode(path).split(b"/")
        writes = flags & WRITING or (mode and set(mode) & set("wax+"))
        return os.fsdecode(path) == os.devnull if writes else mode is not None or not os.path.isdir(path)

    def hook(event, arguments):
        if event == "import" and arguments[0] in REFUSED_MODULES:
            raise ImportError(f"{arguments[0]} is refused")
        allowed = not event.startswith(REFUSED)
        if event == "open":
            allowed = may_open(*arguments)
        elif event in CHANGES:
            places = ((arguments[path], start and arguments[start]) for path, start in CHANGES[event])
            allowed = all(is_inside(path, start, event not in NAMES) for path, start in places)
        if not allowed:
            raise PermissionError(f"{event} is refused")

    return hook


def refuse(*_, **__):
    raise PermissionError("this is refused")


def run(seconds: int, memory: int) -> None:
    """Run the program on stdin after the line with a token; write the token to stdout if it runs to its end."""
    token, _, program = sys.stdin.buffer.read().partition(b"\n")
    report, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    folder = os.path.realpath(os.getcwd())
    if sys.platform == "linux":
        isolate(folder)
    for limit, value in (("AS", memory), ("CPU", seconds), ("FSIZE", 2**20), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
    for module, name in UNAUDITED:
        if hasattr(module, name):
            setattr(module, name, refuse)
    sys.addaudithook(make_hook(folder))  # cannot be removed again
    exec(compile(program, "program", "exec"), {})  # as HumanEval's own: __name__ is not "__main__"
    os.write(report, token)
    os._exit(0)  # whatever threads still run


if __name__ == "__main__":
    arguments = [int(word) for word in sys.argv[1:]]
    del sys.argv[1:]
    run(*arguments)
