"""One run: recipe, method and flags in, a verified model out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import TrainingArguments

from hft.config import RunConfig, fill, resolve, to_yaml
from hft.data import load_data
from hft.errors import HFTError
from hft.machine import indented, is_main, say, world_size
from hft.methods.schedule import describe
from hft.runs import tracking
from hft.runs.folder import FINISHED, PICTURE_NAME, RESULTS_NAME, claim_folder, prepare_folder
from hft.runs.method import check_memory, chosen, method_of
from hft.runs.result import conclude, evaluated_at_the_end, measured
from hft.runs.settings import (
    batch_settings,
    for_this_machine,
    load_model_config,
    load_tokenizer,
    parser_of,
    rate_settings,
    with_defaults,
)
from hft.runs.stages import Stage
from hft.selection.picture import draw_schedule
from hft.training.recorded import Recorded


def run(stage: Stage, arguments: Sequence[str]) -> int:
    """Plan, train, save and verify one run.

    Args:
        stage: what to train on.
        arguments: `--config RECIPE.yaml [METHOD.yaml ...] [--key value ...]`.

    Returns:
        The exit status: 0, or 1 if a frozen tensor is not what it was.

    Raises:
        HFTError: the run cannot be made as asked.
    """
    status = _run(stage, arguments)
    leave_process_group()
    return status


def _run(stage: Stage, arguments: Sequence[str]) -> int:
    config = with_defaults(stage, *resolve(parser_of(stage), arguments))
    say("resolved config", indented(to_yaml(config)))

    run_config = fill(RunConfig, config)
    method = method_of(load_model_config(run_config), config)
    say("selection", indented(method.selection.summary()))
    say(indented(check_memory(method, config, pairs=stage.pairs)), "")

    tokenizer = load_tokenizer(run_config, config.get("chat_template_path"))
    machine = for_this_machine(config)
    derived = batch_settings(stage, config) | rate_settings(stage, config)
    args = fill(stage.config_class, config | machine | derived)
    if args.n_gpu > 1:  # Trainer would wrap the model in DataParallel and multiply the batch
        raise HFTError("several GPUs are visible to one process: use `accelerate launch`, or CUDA_VISIBLE_DEVICES=0")
    method.check(args, pairs=stage.pairs)
    with args.main_process_first(desc="loading the data"):
        train, test = load_data(run_config, stage.rows, evaluate=args.eval_strategy != "no")
    say("plan", indented(plan(stage, args, train, test)))
    if method.schedule.schedule != "none":
        say("schedule", indented(describe(method.selection, method.schedule, total_steps(args, train))))
    if run_config.dry_run:
        say(f"dry run: no weights were loaded, nothing was written to {args.output_dir}")
        return 0

    # One process looks and decides for all, since it also writes to the folder the others would look at.
    out = Path(args.output_dir)
    [start] = broadcast_object_list([prepare_folder(out, config, method) if is_main() else None])
    if start == FINISHED:
        say(f"{out} holds this run, finished; train anew with --resume_from_checkpoint none or another --output_dir")
        return conclude(json.loads((out / RESULTS_NAME).read_text()), out) if is_main() else 0

    if method.is_deferred:
        method = replace(method, selection=chosen(method.selection, run_config, args, tokenizer, start))
    trainer = (stage.adapter_class if method.adapter else stage.trainer_class)(
        run_config.model_name_or_path,
        args,
        **method.for_trainer(),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
    )
    say(*row_notes(trainer, train, test), *trainer.notes(), "")
    trainer.check_resumable(start)
    tracked = is_main() and "wandb" in args.report_to
    if is_main():
        claim_folder(out, config, method.selection)
    if tracked:
        picture = None if method.adapter else out / PICTURE_NAME
        say(tracking.start(args.run_name, config, method.selection, picture), "")
    trainer.train(resume_from_checkpoint=start)
    trainer.save_model()
    if test is not None and not evaluated_at_the_end(trainer):
        trainer.evaluate()
    PartialState().wait_for_everyone()
    if not is_main():
        return 0
    if trainer.schedule is not None:
        steps = trainer.state.global_step
        draw_schedule(method.selection, trainer.schedule.history, steps, args.run_name).savefig(out / PICTURE_NAME)
        if tracked:
            tracking.log_picture("schedule", out / PICTURE_NAME)
    return conclude(measured(stage, trainer) | {"machine": machine}, out, tracked=tracked)


def leave_process_group() -> None:
    """End torch.distributed, where there is any.

    A worker thread of gloo takes the GIL to let go of its last collective. Were this thread to tear the group down
    first, it would join the worker with the GIL in hand and wait for ever (torch 2.13); asleep, it hands the GIL over.
    """
    if world_size() > 1:
        PartialState().wait_for_everyone()
        time.sleep(0.5)
        PartialState().destroy_process_group()


def row_notes(trainer: Recorded, train: Dataset, test: Dataset | None) -> list[str]:
    """How many rows TRL dropped, since `max_length` left nothing of their answers.

    Raises:
        HFTError: no row is left to train on or to evaluate on.
    """
    notes = []
    for kind, before, after in (("training", train, trainer.train_dataset), ("held-out", test, trainer.eval_dataset)):
        if before is None or len(after) == len(before):
            continue
        if len(after) == 0:
            raise HFTError(f"in every {kind} row the prompt alone fills max_length {trainer.args.max_length}; raise it")
        dropped = len(before) - len(after)
        notes.append(f"dropped {dropped:,} {kind} rows whose prompt alone fills max_length {trainer.args.max_length}")
    return notes


def global_batch(args: TrainingArguments) -> int:
    """Rows a step, over all processes."""
    return args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps


def total_steps(args: TrainingArguments, train: Dataset) -> int:
    """Steps of the whole run."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * math.ceil(len(train) / global_batch(args)))


def plan(stage: Stage, args: TrainingArguments, train: Dataset, test: Dataset | None) -> str:
    """Batch, steps and tokens in words."""
    accumulation, processes = args.gradient_accumulation_steps, args.world_size
    batch, steps = global_batch(args), total_steps(args, train)
    tokens = steps * batch * (args.max_length or 0) * (2 if stage.pairs else 1)
    rows = "pairs" if stage.pairs else "rows"
    return (
        f"global batch {batch} = {args.per_device_train_batch_size} {rows} x {processes} processes x {accumulation} "
        f"accumulation steps\n{len(train):,} training {rows}, {steps:,} steps, at most "
        f"{tokens:,} tokens; {len(test) if test else 0} {rows} to evaluate on\n"
    )
