"""The one exception for what a user can put right."""


class HFTError(ValueError):
    """A mistake in a config, dataset, model or folder, told in one sentence that says what to do.

    The command line prints the sentence and exits with status 2; a library caller catches it as a `ValueError`.
    """
