"""Carries a plan out: train, save, evaluate, verify."""

import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hft.config import to_yaml
from hft.data.prepared import check_prepared, refusals, tokens_digest
from hft.errors import HFTError, reason
from hft.machine import broadcast, indented, is_main, leave_process_group, say
from hft.model.weights import MODEL_CONFIG
from hft.record.card import CARD_NAME
from hft.record.manifest import MANIFEST_NAME, write_text
from hft.record.picture import plot_schedule, plot_selection
from hft.record.scores import SCORES_FOLDER
from hft.runs import tracking
from hft.runs.arguments import trainer_class
from hft.runs.config import card_settings, parse_config
from hft.runs.folder import replaced
from hft.runs.plan import RunPlan, make_plan
from hft.runs.push import push
from hft.runs.result import CONFIG_NAME, PICTURE_NAME, RESULTS_NAME, WANDB_NAME, RunResult, result_of, summary
from hft.runs.scoring import with_scored_selection
from hft.runs.stopping import saved_on_signal
from hft.selection.masks import MASKS_NAME
from hft.training.base import ManifestMixin
from hft.training.callbacks import CheckpointedLayers

# Of an earlier run's model, beside the weights themselves.
MODEL_FILES = (MASKS_NAME, MANIFEST_NAME, RESULTS_NAME, PICTURE_NAME, CARD_NAME, MODEL_CONFIG)


def main(objective: str, arguments: Sequence[str]) -> int:
    """`hft sft` and the other objectives' commands: plan, print the plan, and train."""
    config = parse_config(objective, arguments)
    say("resolved config", indented(to_yaml(config.values)))
    plan = make_plan(config)
    say(plan.report())
    if config.run.dry_run:
        say(f"stopped here: no weights were loaded, nothing was written to {plan.out}")
        return 0
    result = train(plan)
    say("", summary(result, plan.out))
    leave_process_group()
    return 0 if result.ok else 1


def train(plan: RunPlan) -> RunResult:
    """Train, save, evaluate and verify a run; a run that is finished is only verified again.

    Nothing is deleted or written before the trainer is built, except OUT/importance, where a run scores its base.
    Several runs can follow each other in one process, also under DDP: the process group stays up.

    Returns:
        The result, the same in every process.

    Raises:
        HFTError: a mistake that only the weights or the prepared rows reveal, or a NaN or infinite loss.
        Stopped: SIGTERM or Ctrl-C; a checkpoint is saved.
    """
    out, args = plan.out, plan.args
    if plan.start.is_finished:
        say(f"{out} holds this run, finished; train again with --resume_from_checkpoint none or another output_dir")
        return broadcast(RunResult.load(out).conclude(out) if is_main() else None)
    try:
        plan = with_scored_selection(plan)
        trainer = make_trainer(plan)
        if is_main():
            claim_folder(plan, trainer)
    except OSError as error:
        if error.filename is None or not out.is_relative_to(error.filename):
            raise
        raise cannot_write_to(out, error) from error

    on_wandb = is_main() and "wandb" in args.report_to
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
                phases, steps = trainer.schedule.history, trainer.state.global_step
                plot_schedule(trainer.selection, phases, steps, args.run_name).savefig(out / PICTURE_NAME)
            result = measured.conclude(out)
            if on_wandb:
                tracking.log_result(result, out)
        result = broadcast(result)
        if args.push_to_hub and is_main():
            push(result, out, args.hub_model_id, private=args.hub_private_repo, revision=args.hub_revision)
    return result


def make_trainer(plan: RunPlan) -> ManifestMixin:
    method = plan.config.method
    trained: dict[str, Any] = {"adapter": method.adapter}
    if not method.adapter:
        trained = {"selection": plan.selection, "update": method.update, "schedule": method.schedule}
        trained["save_only_trained"] = plan.config.run.save_only_trained
    # TRL says that it ignores these, and the model is loaded with them.
    log = logging.getLogger(f"trl.trainer.{plan.config.objective.name}_trainer")
    if not log.filters:  # once in a sequence of runs
        log.addFilter(lambda record: "model_init_kwargs" not in str(record.msg))
    with refusals(plan.data, plan.tokenizer):
        trainer = trainer_class(plan.config)(
            plan.config.run.model_name_or_path,
            plan.args,
            **trained,
            train_dataset=plan.data.train,
            eval_dataset=plan.data.test,
            processing_class=plan.tokenizer,
        )
    trainer.resolved_config = card_settings(plan.config.values)
    trainer.manifest.data = plan.data.fingerprint
    trainer.manifest.strategy = method.strategy.record() if method.strategy else {}
    say(*check_prepared(trainer, plan.data, plan.config.objective.unit), *trainer.notes())
    say(*steps_of_packed(plan, len(trainer.train_dataset)), "")
    trainer.manifest.tokens = tokens_digest(trainer.train_dataset) if is_main() else ""
    if plan.start.resume_from and is_main():  # before the folder is cleared
        trainer.check_resumable(plan.start.resume_from)
    if plan.config.run.activation_checkpointing_layers is not None:
        trainer.remove_callback(CheckpointedLayers)  # which keeps those that Trainer chose
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
    out, resumed = plan.out, plan.start.resume_from
    out.mkdir(parents=True, exist_ok=True)
    for checkpoint in replaced(out, resumed):
        say(f"removing {checkpoint} of an earlier run")
        checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint)
    names = [RESULTS_NAME, *([] if resumed else [WANDB_NAME])]
    if (out / MANIFEST_NAME).exists():
        names += [*MODEL_FILES, *out.glob("model*.safetensors*"), *out.glob("adapter_*")]
        shutil.rmtree(out / SCORES_FOLDER, ignore_errors=True)
    for name in names:
        (out / name).unlink(missing_ok=True)
    write_text(out / CONFIG_NAME, to_yaml(plan.config.values))
    if not plan.config.method.adapter:
        plot_selection(trainer.selection, plan.args.run_name).savefig(out / PICTURE_NAME)


def cannot_write_to(out: Path, error: OSError) -> HFTError:
    return HFTError(f"cannot write to output_dir {out}: {error.strerror or reason(error)}")


def metrics_of_what_was_saved(trainer: ManifestMixin) -> dict[str, float]:
    """Held-out metrics of the weights that were saved; empty without rows to evaluate on."""
    if trainer.eval_dataset is None:
        return {}
    last = [row for row in trainer.state.log_history if "eval_loss" in row][-1:]
    # Another evaluation, or one before an earlier checkpoint was loaded, is of other weights.
    if last and last[0]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return last[0]
    return trainer.evaluate()
