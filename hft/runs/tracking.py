"""What a run tells wandb beyond what Trainer's own callback logs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import wandb

from hft.selection import Selection

PROJECT = "hft"


def start(name: str, config: dict[str, Any], selection: Selection, picture: Path | None) -> str:
    """Begin a wandb run with the resolved config and the selection; offline where no API key is found.

    Trainer's `WandbCallback` takes up the run that is already there.

    Returns:
        A sentence on where the run is to be found.
    """
    mode, why = os.environ.get("WANDB_MODE"), "WANDB_MODE is set"
    if mode is None:
        has_key = wandb.login(prompt=False, verify=False)
        mode, why = ("online", "") if has_key else ("offline", "no API key")
    settings = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "name": name, "config": config}
    try:
        run = wandb.init(**settings, mode=mode, settings=wandb.Settings(quiet=True))
    except wandb.Error as error:
        why = f"it cannot be reached: {' '.join(str(error).split())}"
        run = wandb.init(**settings, mode="offline", settings=wandb.Settings(quiet=True))
    shares = {"layers": selection.fraction_of_layers, "model": selection.fraction_of_model}
    counts = {block: f"{trained}/{total}" for block, (trained, total) in selection.counts().items()}
    run.config.update({"trainable_fraction": shares, "trained_units": counts})
    if picture:
        run.log({"selection": wandb.Image(str(picture))})
    if run.offline:
        return f"wandb is offline ({why}); upload later with `wandb sync {Path(run.dir).parent}`"
    return f"wandb: {run.url}"


def log_picture(name: str, picture: Path) -> None:
    """Log a picture under a name."""
    wandb.run.log({name: wandb.Image(str(picture))})


def finish(manifest: Path, results: dict[str, Any]) -> None:
    """Add the manifest as an artifact and the results, verify's among them, to the summary, and end the run."""
    artifact = wandb.Artifact(f"manifest-{wandb.run.id}", type="manifest")
    artifact.add_file(str(manifest))
    wandb.run.log_artifact(artifact)
    wandb.run.summary.update({"results": results})
    wandb.finish()
    wandb.teardown()  # its service has written all by then; and another run in this process reads the settings anew
