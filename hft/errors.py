"""The exceptions that a command ends with in one sentence, and what their sentences are made of."""

import errno
import re
from collections.abc import Iterator, Sequence

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


def cannot_write(error: BaseException) -> str | None:
    """A sentence about an exception that says that a file cannot be written; None for any other one.

    torch.save and safetensors raise no `OSError`; safetensors has the number in its message.
    """
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if found := re.search(r"\(os error (\d+)\)", str(cause)):
            number = int(found[1])
        elif isinstance(cause, RuntimeError) and TORCH_WRITE.search(str(cause)):
            number = errno.ENOSPC
        where = getattr(cause, "filename", None) or "a file"
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (
                f"no room on the disk to write {where}; free some and run the same command again: it resumes from what "
                "was complete before"
            )
        if number in (errno.EROFS, errno.EACCES, errno.EPERM) and where != "a file":
            return f"cannot write {where}: {cause.strerror}; choose a folder that you may write to"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def shorten(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
