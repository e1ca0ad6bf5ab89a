"""What a run tells wandb beyond what Trainer's own callback logs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft.errors import reason
from hft.machine import say
from hft.record.manifest import MANIFEST_NAME
from hft.runs.result import PICTURE_NAME, RunResult

if TYPE_CHECKING:
    import wandb

    from hft.selection import Selection

PROJECT = "hft"
# Seconds; wandb itself would wait for its server forever. WANDB_FINISH_TIMEOUT changes it.
FINISH_TIMEOUT = 60


@contextmanager
def tracked(on: bool, name: str, config: dict[str, Any], selection: Selection, out: Path) -> Iterator[None]:
    """A wandb run around a training run; it ends as failed if the training raises."""
    if not on:
        yield
        return
    import wandb

    say(start(name, config, selection, out / PICTURE_NAME), "")
    try:
        yield
    except BaseException:
        finish(exit_code=1)
        raise
    finish()
    wandb.teardown()  # another run in this process reads its settings again


def start(name: str, config: dict[str, Any], selection: Selection, picture: Path) -> str:
    """Start a wandb run with the resolved config and the selection; offline if no API key is found.

    Trainer's `WandbCallback` uses the run that is already there.
    """
    import wandb

    run, where = open_run(name=name, config=config)
    fractions = {"layers": selection.fraction_of_layers, "model": selection.fraction_of_model}
    counts = {block: f"{trained}/{total}" for block, (trained, total) in selection.counts().items()}
    run.config.update({"trainable_fraction": fractions, "trained_units": counts})
    if picture.exists():
        run.log({"selection": wandb.Image(str(picture))})
    return where


def open_run(**settings: Any) -> tuple[wandb.Run, str]:
    """Start a wandb run, offline if no API key is found; returns it, and a sentence on where to find it."""
    import wandb

    mode, why = os.environ.get("WANDB_MODE"), "WANDB_MODE is set"
    if mode is None:
        try:
            mode, why = ("online", "") if wandb.login(prompt=False, verify=False) else ("offline", "no API key")
        except wandb.Error as error:
            mode, why = "offline", reason(error)
    timeout = float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT))
    how = wandb.Settings(quiet=True, finish_timeout=timeout, finish_timeout_raises=True)
    settings = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "settings": how} | settings
    try:
        run = wandb.init(**settings, mode=mode)
    except wandb.Error as error:
        why = f"it cannot be reached: {reason(error)}"
        run = wandb.init(**settings, mode="offline")
    if run.offline:
        return run, f"wandb is offline ({why}); upload later with `wandb sync {Path(run.dir).parent}`"
    return run, f"wandb: {run.url}"


def finish(exit_code: int = 0) -> None:
    """End the wandb run; where wandb can no longer be reached, say how to upload the rest instead of waiting for it."""
    import wandb

    folder = Path(wandb.run.dir).parent if wandb.run else None
    try:
        wandb.finish(exit_code)
    except TimeoutError:
        say(f"wandb cannot be reached; upload the rest later with `wandb sync {folder}`")


def current() -> dict[str, str]:
    """What `log_scores` needs to find the wandb run again."""
    import wandb

    found = {"id": wandb.run.id, "project": wandb.run.project, "entity": wandb.run.entity}
    return {key: value for key, value in found.items() if value}


def log_scores(run: dict[str, str], scores: dict[str, float]) -> None:
    """Add scores to the summary of a wandb run that has ended."""
    import wandb

    again, _ = open_run(**run, resume="allow")
    again.summary.update(scores)
    finish()
    wandb.teardown()


def log_picture(name: str, picture: Path) -> None:
    """Log a picture under a name, if there is a wandb run."""
    import wandb

    if wandb.run is not None:
        wandb.run.log({name: wandb.Image(str(picture))})


def log_result(result: RunResult, out: Path) -> None:
    """Add the manifest as an artifact and the result to the summary, if there is a wandb run."""
    import wandb

    if wandb.run is None:
        return
    artifact = wandb.Artifact(f"manifest-{wandb.run.id}", type="manifest")
    artifact.add_file(str(out / MANIFEST_NAME))
    wandb.run.summary.update({"results": asdict(result)})
    try:
        wandb.run.log_artifact(artifact)
    except wandb.Error as error:  # it asks the server first whether it may
        say(f"wandb has no artifact of {out / MANIFEST_NAME}: {reason(error)}")
