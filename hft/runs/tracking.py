"""What a run tells wandb beyond what Trainer's own callback logs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wandb
from transformers.integrations import WandbCallback
from transformers.integrations.integration_utils import WandbLogModel

from hft.errors import reason
from hft.machine import say
from hft.record.manifest import MANIFEST_NAME, write_json
from hft.runs.push import portable_copy
from hft.runs.result import PICTURE_NAME, WANDB_NAME, RunResult

if TYPE_CHECKING:
    from hft.runs.plan import RunPlan
    from hft.training.base import ManifestMixin

FINISH_TIMEOUT = 60  # seconds; wandb itself would wait for its server forever
LOG_MODEL = "WANDB_LOG_MODEL"


class WandbRun(WandbCallback):
    """transformers' callback, which logs nothing that a resumed wandb run has, and uploads what was saved.

    transformers' own saves the model again, which is another one, under a name that wandb refuses if it holds `=`.
    """

    def __init__(self):
        self.logged = wandb.run.summary.get("train/global_step", -1)
        self.uploads = WandbLogModel(os.environ.get(LOG_MODEL, "false"))
        os.environ[LOG_MODEL] = "false"  # to transformers' callback alone, which would upload the model too
        super().__init__()
        os.environ[LOG_MODEL] = self.uploads.value

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.global_step > self.logged or (state.global_step == self.logged and "loss" not in logs):
            super().on_log(args, state, control, logs=logs, **kwargs)

    def on_save(self, args, state, control, **kwargs):
        if self.uploads == WandbLogModel.CHECKPOINT:
            upload(Path(args.output_dir, f"checkpoint-{state.global_step}"), f"step_{state.global_step}")


@contextmanager
def tracked(trainer: ManifestMixin, plan: RunPlan) -> Iterator[None]:
    """A wandb run around a training run, new or resumed; it ends as failed if the training raises.

    By model and objective it has a group, by method a job type; wandb's variables win.
    """
    record, config, checkpoint, known = plan.out / WANDB_NAME, plan.config, plan.start.resume_from, {}
    if checkpoint and record.exists() and Path(checkpoint).resolve().parent == plan.out.resolve():
        known = json.loads(record.read_text()) | {"resume": "allow"}
    tags = [Path(config.run.model_name_or_path).name[:64], config.objective.name, config.run.method or "hft"]
    labels = {"group": " ".join(tags[:2]), "job_type": tags[2], "tags": tags}
    variables = {"group": "WANDB_RUN_GROUP", "job_type": "WANDB_JOB_TYPE", "tags": "WANDB_TAGS"}
    labels = {key: value for key, value in labels.items() if variables[key] not in os.environ}
    run, where = open_run(name=plan.args.run_name, config=config.values, **labels, **known)
    write_json(record, current())
    selection = getattr(trainer, "selection", plan.selection)
    fractions = {"layers": selection.fraction_of_layers, "model": selection.fraction_of_model}
    counts = {block: f"{trained}/{total}" for block, (trained, total) in selection.counts().items()}
    run.config.update({"trainable_fraction": fractions, "trained_units": counts}, allow_val_change=True)
    if not known:
        log_picture("selection", plan.out)
    trainer.remove_callback(WandbCallback)
    trainer.add_callback(WandbRun())
    say(where, "")
    try:
        yield
    except BaseException:
        finish(exit_code=1)
        raise
    finish()


def open_run(**settings: Any) -> tuple[wandb.Run, str]:
    """Start a wandb run, offline if no API key is found; returns it, and a sentence on where to find it."""
    timeout = float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT))
    how = wandb.Settings(quiet=True, finish_timeout=timeout, finish_timeout_raises=True)
    settings = {"project": os.environ.get("WANDB_PROJECT", "hft"), "settings": how} | settings
    mode, why = os.environ.get("WANDB_MODE"), "WANDB_MODE is set"
    try:
        if mode is None and not wandb.login(prompt=False, verify=False):
            mode, why = "offline", "no API key"
        run = wandb.init(**settings, mode=mode)
    except wandb.Error as error:
        why = reason(error)
        run = wandb.init(**settings, mode="offline")
    if run.offline:
        return run, f"wandb is offline ({why}); upload later with `wandb sync {Path(run.dir).parent}`"
    return run, f"wandb: {run.url}"


def finish(exit_code: int = 0) -> None:
    """End the wandb run; where wandb can no longer be reached, say how to upload the rest instead of waiting for it."""
    folder = Path(wandb.run.dir).parent if wandb.run else None
    try:
        wandb.finish(exit_code)
    except TimeoutError:
        say(f"wandb cannot be reached; upload the rest later with `wandb sync {folder}`")
    wandb.teardown()  # another run in this process reads its settings again


def current() -> dict[str, str]:
    found = {"id": wandb.run.id, "project": wandb.run.project, "entity": wandb.run.entity}
    return {key: value for key, value in found.items() if value}


def log_scores(run: dict[str, str], scores: dict[str, float]) -> None:
    """Add scores to the summary of a wandb run that has ended."""
    again, _ = open_run(**run, resume="allow")
    again.summary.update(scores)
    finish()


def log_picture(name: str, out: Path) -> None:
    if (out / PICTURE_NAME).exists():
        wandb.run.log({name: wandb.Image(str(out / PICTURE_NAME))})


def log_result(result: RunResult, out: Path) -> None:
    """Add the result to the summary, the manifest as an artifact, and the model if `WANDB_LOG_MODEL` asks for it."""
    wandb.run.summary.update({"results": asdict(result)})
    if result.schedule_fractions:  # drawn over the selection's
        log_picture("schedule", out)
    upload(out / MANIFEST_NAME, kind="manifest")
    if WandbLogModel(os.environ.get(LOG_MODEL, "false")).is_enabled:
        with portable_copy(result, out) as folder:
            upload(folder, "final_model")


def upload(path: Path, *aliases: str, kind: str = "model") -> None:
    artifact = wandb.Artifact(f"{kind}-{wandb.run.id}", type=kind)
    artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
    try:
        wandb.run.log_artifact(artifact, aliases=list(aliases))
    except wandb.Error as error:  # it asks the server first whether it may
        say(f"wandb has no artifact of {path}: {reason(error)}")
