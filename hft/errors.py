"""The one exception for mistakes that the user can correct, and what its sentences are made of."""

from collections.abc import Sequence


class HFTError(ValueError):
    """A mistake in a config, dataset, model or folder, in one sentence that says what to do.

    The command line prints the sentence and exits with status 2; a library caller catches it as a `ValueError`.
    """


def reason(error: BaseException) -> str:
    """Another library's exception as one sentence, whole: its message on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shorten(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
