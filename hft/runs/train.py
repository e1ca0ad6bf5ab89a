"""Carries a plan out: train, save, evaluate, verify."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft.config import to_yaml
from hft.errors import HFTError, reason
from hft.machine import broadcast, indented, is_main, say
from hft.model.weights import MODEL_CONFIG
from hft.record.card import CARD_NAME
from hft.record.manifest import MANIFEST_NAME, write_text
from hft.record.scores import SCORES_FOLDER
from hft.record.verification import verify_folder
from hft.runs.arguments import trainer_class
from hft.runs.config import card_settings
from hft.runs.folder import replaced
from hft.runs.plan import RunPlan
from hft.runs.push import push
from hft.runs.result import CONFIG_NAME, PICTURE_NAME, RESULTS_NAME, WANDB_NAME, RunResult, result_of
from hft.runs.scoring import with_scored_selection
from hft.selection.masks import MASKS_NAME

if TYPE_CHECKING:
    from hft.training.base import ManifestMixin


def train(plan: RunPlan) -> RunResult:
    """Train, save, evaluate and verify a run; a run that is finished is only verified again.

    Nothing is deleted or written before the trainer is built, except OUT/importance, where a run scores its base.
    Several runs can follow each other in one process, also under DDP: the process group stays up.

    Returns:
        The result, the same in every process.

    Raises:
        HFTError: something that only the weights or the prepared rows show, or a loss of NaN or infinity.
        Stopped: SIGTERM or Ctrl-C; a checkpoint is saved.
    """
    if plan.start.is_finished:
        say(
            f"{plan.out} holds this run, finished; train again with --resume_from_checkpoint none or another output_dir"
        )
        return broadcast(conclude(RunResult.load(plan.out), plan.out) if is_main() else None)
    try:
        plan = with_scored_selection(plan)
        trainer = make_trainer(plan)
    except OSError as error:
        if error.filename is None or not plan.out.is_relative_to(error.filename):
            raise
        raise cannot_write_to(plan.out, error) from error  # Trainer makes the folder
    on_wandb = is_main() and "wandb" in plan.args.report_to
    if is_main():
        claim_folder(plan, trainer)

    from hft.runs import tracking
    from hft.runs.stopping import saved_on_signal

    with tracking.tracked(trainer, plan) if on_wandb else nullcontext():
        with saved_on_signal(trainer):
            trainer.train(resume_from_checkpoint=plan.start.resume_from)
        trainer.save_model(_internal_call=True)  # is pushed to the Hub once it is verified
        final = metrics_of_what_was_saved(trainer)
        trainer.accelerator.wait_for_everyone()
        result = None
        if is_main():
            measured = result_of(plan.config.objective, trainer, plan.machine, final)
            measured.wandb = tracking.current() if on_wandb else None
            if trainer.schedule:
                from hft.record.picture import plot_schedule

                phases, steps = trainer.schedule.history, trainer.state.global_step
                figure = plot_schedule(trainer.selection, phases, steps, plan.args.run_name)
                figure.savefig(plan.out / PICTURE_NAME)
            result = conclude(measured, plan.out)
            if on_wandb:
                tracking.log_result(result, plan.out)
        result = broadcast(result)
        if plan.args.push_to_hub and is_main():
            args = plan.args
            push(result, plan.out, args.hub_model_id, private=args.hub_private_repo, revision=args.hub_revision)
    return result


def make_trainer(plan: RunPlan) -> ManifestMixin:
    """The trainer of a plan, its rows prepared and checked, ready to train."""
    from hft.data import check_prepared, refusals, tokens_digest
    from hft.training.checkpointing import CheckpointedLayers

    method = plan.config.method
    if method.adapter:
        trained: dict[str, Any] = {"adapter": method.adapter}
    else:
        trained = {"selection": plan.selection, "update": method.update, "schedule": method.schedule}
        trained["save_only_trained"] = plan.config.run.save_only_trained
    with refusals(plan.data, plan.tokenizer):
        trainer = trainer_class(plan.config)(
            plan.config.run.model_name_or_path,
            plan.args,
            **trained,
            train_dataset=plan.data.train,
            eval_dataset=plan.data.test,
            processing_class=plan.tokenizer,
        )
    trainer.manifest.data = plan.data.fingerprint
    trainer.resolved_config = card_settings(plan.config.values)
    trainer.manifest.strategy = method.strategy.record() if method.strategy else {}
    say(*check_prepared(trainer, plan.data, plan.config.objective.unit), *trainer.notes())
    say(*steps_of_packed(plan, len(trainer.train_dataset)), "")
    trainer.manifest.tokens = tokens_digest(trainer.train_dataset) if is_main() else ""
    if plan.start.resume_from and is_main():  # before the folder is cleared
        trainer.check_resumable(plan.start.resume_from)
    if plan.config.run.activation_checkpointing_layers is not None:
        trainer.add_callback(CheckpointedLayers(len(plan.checkpointed)))
    for callback in method.strategy.callbacks(trainer) if method.strategy else []:
        trainer.add_callback(callback)
    return trainer


def steps_of_packed(plan: RunPlan, rows: int) -> list[str]:
    """What the plan could not say before rows were packed or dropped: steps, and the schedule over them."""
    if plan.args.max_steps > 0 or plan.batches.steps == (steps := plan.batches.steps_over(rows)):
        return []
    schedule = plan.config.method.schedule
    return [f"{rows:,} rows, {steps:,} steps", *([schedule.describe(plan.selection, steps)] if schedule else [])]


def claim_folder(plan: RunPlan, trainer: ManifestMixin) -> None:
    """Remove what an earlier run left in the folder, except what this run resumes from, and write this run's config."""
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        clear(plan.out, plan.start.resume_from)
        write_text(plan.out / CONFIG_NAME, to_yaml(plan.config.values))
        for name in (RESULTS_NAME, *([] if plan.start.resume_from else [WANDB_NAME])):
            (plan.out / name).unlink(missing_ok=True)
        if not plan.config.method.adapter:
            from hft.record.picture import plot_selection

            plot_selection(trainer.selection, plan.args.run_name).savefig(plan.out / PICTURE_NAME)
    except OSError as error:
        raise cannot_write_to(plan.out, error) from error


def cannot_write_to(out: Path, error: OSError) -> HFTError:
    return HFTError(f"cannot write to output_dir {out}: {error.strerror or reason(error)}")


def clear(out: Path, resumed: str | None) -> None:
    """Remove an earlier run's checkpoints and model, so that they are not mistaken for this run's."""
    for checkpoint in replaced(out, resumed):
        say(f"removing {checkpoint} of an earlier run")
        checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint)
    if (out / MANIFEST_NAME).exists():
        names = (MASKS_NAME, MANIFEST_NAME, RESULTS_NAME, PICTURE_NAME, CARD_NAME, MODEL_CONFIG)
        for path in (*out.glob("model*.safetensors*"), *out.glob("adapter_*"), *(out / name for name in names)):
            path.unlink(missing_ok=True)
        shutil.rmtree(out / SCORES_FOLDER, ignore_errors=True)


def metrics_of_what_was_saved(trainer: ManifestMixin) -> dict[str, float]:
    """Held-out metrics of the weights that were saved; empty without rows to evaluate on."""
    if trainer.eval_dataset is None:
        return {}
    last = [row for row in trainer.state.log_history if "eval_loss" in row][-1:]
    # Another evaluation, or one before an earlier checkpoint was loaded, is of other weights.
    if last and last[0]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return last[0]
    return trainer.evaluate()


def conclude(result: RunResult, out: Path) -> RunResult:
    """Verify a finished run's folder, and save the result and the model card with what was found."""
    found = verify_folder(out)
    result.verify, result.ok = found.counts(), found.ok
    result.save(out)
    say("verify", indented(found.report()))
    result.write_card(out)
    return result
