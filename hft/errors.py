"""The exceptions that a command ends with in one sentence, and what their sentences are made of."""

import difflib
import errno
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# What torch.save says of a write that failed, whatever the reason.
TORCH_WRITE = re.compile("PytorchStreamWriter failed writing|unexpected pos")


class HFTError(ValueError):
    """A mistake in a config, dataset, model or folder, in one sentence that says what to do.

    The command line prints the sentence and exits with status 2; a library caller catches it as a `ValueError`.
    """

    status = 2


class DoesNotFit(HFTError):
    """A run that this machine cannot hold."""


class Stopped(HFTError):
    """A run that was asked to stop and has saved what it needs to go on; the status is a shell's for SIGTERM."""

    status = 143


class Interrupted(Stopped):
    """The same after Ctrl-C."""

    status = 130


def reason(error: BaseException) -> str:
    """Another library's exception as one sentence, whole: its message on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a sentence about a word that is not known: the nearest one that is, if any is near."""
    near = difflib.get_close_matches(word, [*known], n=1)
    return f", did you mean {near[0]!r}?" if near else otherwise


def neighbor(path: Path) -> str:
    """The same about a path, if it does not exist: the nearest name in its folder."""
    return "" if path.exists() else did_you_mean(path.name, sorted(one.name for one in path.parent.glob("*")))


def read_text(path: str | Path) -> str:
    """The text of a user's file, with or without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise HFTError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise HFTError(f"{path} is not UTF-8; save it as UTF-8") from error


def cannot_write(error: BaseException) -> str | None:
    """A sentence about an exception that says that a file cannot be written; None for any other one."""
    cause: BaseException | None = error
    while cause is not None:
        number, where = getattr(cause, "errno", None), getattr(cause, "filename", None)
        if found := re.search(r"\(os error (\d+)\)", str(cause)):  # safetensors
            number = int(found[1])
        elif isinstance(cause, RuntimeError) and TORCH_WRITE.search(str(cause)):
            number = errno.ENOSPC
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (
                f"no room on the disk to write {where or 'a file'}; free some and run the same command again: it "
                "resumes from what was complete before"
            )
        if where and number in (errno.EROFS, errno.EACCES, errno.EPERM):
            return f"cannot write {where}: {cause.strerror}; choose a folder that you may write to"
        if where and number in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
            return f"{where}: {cause.strerror}; give another path"
        cause = cause.__cause__ or cause.__context__
    return None


def shorten(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
