"""One run: recipe, method and flags in, a verified model out."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from trl import DPOConfig, SFTConfig

from hft import tracking
from hft.anatomy import anatomy_of, meta_model
from hft.config import Parser, RunConfig, fill, resolve, to_yaml
from hft.data import load_data, preference_rows, sft_rows
from hft.errors import HFTError
from hft.folders import (
    CONFIG_NAME,
    FINISHED,
    PICTURE_NAME,
    RESULTS_NAME,
    RUN_KEYS,
    claim_folder,
    prepare_folder,
    verify_folder,
)
from hft.freezing import Verification
from hft.planning import GIB, check_fits, cpu_has_bfloat16, peak_memory, static_memory
from hft.processes import indented, is_main, is_sharded, say, world_size
from hft.selection import ScheduleConfig, SelectionConfig, select
from hft.selection.manifest import NAME as MANIFEST_NAME
from hft.selection.manifest import rounds_so_far
from hft.selection.picture import draw_schedule
from hft.selection.schedules import check_schedule, describe, peak_size
from hft.training import HFTDPOTrainer, HFTSFTTrainer
from hft.training.mixin import HalfFineTuning

# Metrics whose held-out values a run ends with, before and after, where its stage logs them.
HELD_OUT = ("loss", "rewards/accuracies", "rewards/margins")

# What our commands set differently from TRL; a recipe or a flag still wins.
DEFAULTS = {
    "report_to": "wandb",
    "resume_from_checkpoint": "auto",  # a killed run goes on when its command is given again
    "include_num_input_tokens_seen": "non_padding",  # so that Trainer logs tokens per second
}


@dataclass(frozen=True)
class Stage:
    """What is trained on: the pieces in which one stage differs from another.

    Attributes:
        rows: brings a dataset, given with its name, into the form that the stage's trainer takes.
        pairs: whether rows are pairs of answers that are held against a reference model.
    """

    name: str
    config_class: type[TrainingArguments]
    trainer_class: type[HalfFineTuning]
    rows: Callable[[Dataset, str], Dataset]
    pairs: bool


STAGES = {
    "sft": Stage("sft", SFTConfig, HFTSFTTrainer, sft_rows, pairs=False),
    "dpo": Stage("dpo", DPOConfig, HFTDPOTrainer, preference_rows, pairs=True),
}


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
    anatomy = anatomy_of(meta_model(load_model_config(run_config)))
    selection = select(anatomy, fill(SelectionConfig, config))
    schedule = fill(ScheduleConfig, config)
    check_schedule(selection, schedule)
    shards = world_size() if is_sharded() or config.get("fsdp") else 1
    reference = stage.pairs and not config.get("precompute_ref_log_probs")
    peak = peak_size(selection, schedule)
    memory = static_memory(selection, shards=shards, reference=reference, peak=peak) / GIB
    say("selection", indented(f"{selection.summary()}\n{memory:.2f} GiB a device before activations\n"))
    check_fits(selection, cpu_asked_for=bool(config.get("use_cpu")), shards=shards, reference=reference, peak=peak)

    tokenizer = load_tokenizer(run_config, config.get("chat_template_path"))
    machine = for_this_machine(config)
    args = fill(stage.config_class, config | machine | batch_settings(stage, config))
    if args.n_gpu > 1:  # Trainer would wrap the model in DataParallel and multiply the batch
        raise HFTError("several GPUs are visible to one process: use `accelerate launch`, or CUDA_VISIBLE_DEVICES=0")
    with args.main_process_first(desc="loading the data"):
        train, test = load_data(run_config, stage.rows, evaluate=args.eval_strategy != "no")
    say("plan", indented(plan(stage, args, train, test)))
    if schedule.schedule != "none":
        say("schedule", indented(describe(selection, schedule, total_steps(args, train))))
    if run_config.dry_run:
        say(f"dry run: no weights were loaded, nothing was written to {args.output_dir}")
        return 0

    # One process looks and decides for all, since it also writes to the folder the others would look at.
    out = Path(args.output_dir)
    [start] = broadcast_object_list([prepare_folder(out, config, selection) if is_main() else None])
    if start == FINISHED:
        say(f"{out} holds this run, finished; train anew with --resume_from_checkpoint none or another --output_dir")
        return conclude(json.loads((out / RESULTS_NAME).read_text()), out) if is_main() else 0

    trainer = stage.trainer_class(
        run_config.model_name_or_path,
        args,
        selection=selection.config,
        schedule=schedule,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
    )
    say(*row_notes(trainer, train, test), *trainer.notes(), "")
    trainer.check_resumable(start)
    if is_main():
        claim_folder(out, config, selection)
    tracked = is_main() and "wandb" in args.report_to
    if tracked:
        say(tracking.start(args.run_name, config, selection, out / PICTURE_NAME), "")
    trainer.train(resume_from_checkpoint=start)
    trainer.save_model()
    if test is not None and not evaluated_at_the_end(trainer):
        trainer.evaluate()
    PartialState().wait_for_everyone()
    if trainer.schedule is not None and is_main():
        steps = trainer.state.global_step
        draw_schedule(selection, trainer.schedule.history, steps, args.run_name).savefig(out / PICTURE_NAME)
        if tracked:
            tracking.log_picture("schedule", out / PICTURE_NAME)
    return conclude(measured(stage, trainer) | {"machine": machine}, out, tracked=tracked) if is_main() else 0


def leave_process_group() -> None:
    """End torch.distributed, where there is any.

    A worker thread of gloo takes the GIL to let go of its last collective. Were this thread to tear the group down
    first, it would join the worker with the GIL in hand and wait for ever (torch 2.13); asleep, it hands the GIL over.
    """
    if world_size() > 1:
        PartialState().wait_for_everyone()
        time.sleep(0.5)
        PartialState().destroy_process_group()


def with_defaults(stage: Stage, config: dict, flags: dict, files: Sequence[str]) -> dict[str, Any]:
    """A config complete with a name and an output folder.

    The name is that of the output folder if one is given. Else it tells recipe, stage and method, and each flag that
    makes the run another one, so that the same command finds its own folder again and another never writes into it.
    """
    if not config.get("model_name_or_path") or not config.get("dataset_name"):
        raise HFTError("model_name_or_path and dataset_name are needed: give a recipe with --config, or both as flags")
    config = DEFAULTS | config
    if "model_name_or_path" in flags and "architecture" not in flags:
        config.pop("architecture", None)  # the recipe's is that of the recipe's model
    if rounds := rounds_so_far(config["model_name_or_path"]):
        config = {"round": rounds[-1]["selection"]["round"] + 1} | config
    if "output_dir" in flags and "run_name" not in flags:
        config["run_name"] = Path(flags["output_dir"]).name
    elif "run_name" not in config:
        source = Path(files[0]).resolve().parent.name if files else Path(config["model_name_or_path"]).name
        name = "-".join([source, stage.name, config.get("method") or "hft"])
        told = {key: _short(value) for key, value in flags.items() if key not in RUN_KEYS}
        name += "".join(f"-from-{v}" if k == "model_name_or_path" else f"-{k}={v}" for k, v in told.items())
        if len(name) > 120:  # most file systems stop at 255 bytes
            name = name[:110] + "-" + hashlib.sha256(name.encode()).hexdigest()[:9]
        config["run_name"] = name
    return {"output_dir": f"runs/{config['run_name']}", **config}


def load_model_config(run_config: RunConfig) -> PretrainedConfig:
    """The base's config, from the recipe's `architecture` folder where it has one.

    Raises:
        HFTError: it cannot be had, or the model is quantised.
    """
    source = run_config.model_name_or_path
    if run_config.architecture and not Path(source).is_dir():
        source = run_config.architecture
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        hint = f"; `hft fetch {Path(source).name}` makes it" if source.startswith("models/") else ""
        reason = str(error).strip().partition("\n")[0]
        raise HFTError(f"cannot read the config of {source}: {reason}{hint}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise HFTError(f"{source} is quantised; half fine-tuning trains the weights themselves, give the original")
    return config


def load_tokenizer(run_config: RunConfig, chat_template_path: str | None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, padding with the recipe's token.

    Raises:
        HFTError: it cannot be had; neither it nor the recipe has a chat template; or the recipe's padding token is not
            in the vocabulary, where adding one would resize the embeddings.
    """
    base = run_config.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise HFTError(f"cannot load the tokenizer of {base}: {str(error).strip().partition(chr(10))[0]}") from error
    if not tokenizer.chat_template and not chat_template_path:
        raise HFTError(
            f"{base} has no chat template: DPO takes the one that SFT saved, so start from an SFT run; SFT takes "
            "--chat_template_path"
        )
    if token := run_config.tokenizer_pad_token:
        if token not in tokenizer.get_vocab():
            raise HFTError(f"tokenizer_pad_token {token!r} is not in the vocabulary of {base}")
        tokenizer.pad_token = token
    return tokenizer


def for_this_machine(config: dict[str, Any]) -> dict[str, Any]:
    """Settings that the machine decides where the config does not: CPU or not, bf16 or not."""
    settings: dict[str, Any] = {}
    on_cpu = config.get("use_cpu") or not torch.accelerator.is_available()
    if on_cpu:
        settings = {"use_cpu": True, "bf16": cpu_has_bfloat16()}
    settings = {key: value for key, value in settings.items() if config.get(key) is None}
    if settings:
        say("on this machine", indented(to_yaml(settings)))
    return settings


def batch_settings(stage: Stage, config: dict[str, Any]) -> dict[str, int]:
    """Gradient accumulation that makes the global batch what the recipe says.

    Raises:
        HFTError: rows a step do not divide by rows a device times devices.
    """
    total = config.get("global_batch_size")
    if total is None:
        return {}
    if "gradient_accumulation_steps" in config:
        raise HFTError("gradient_accumulation_steps is derived from global_batch_size; give only one of them")
    per_device = config.get("per_device_train_batch_size") or stage.config_class.per_device_train_batch_size
    accumulation, left_over = divmod(total, per_device * world_size())
    if left_over or not accumulation:
        raise HFTError(
            f"global_batch_size {total} is not a multiple of {per_device} rows a device x {world_size()} processes; "
            "change --per_device_train_batch_size"
        )
    return {"gradient_accumulation_steps": accumulation}


def parser_of(stage: Stage) -> Parser:
    """The parser of a stage's config, which knows keys of other stages by name."""
    classes = (RunConfig, SelectionConfig, ScheduleConfig, stage.config_class)
    own = {f.name for cls in classes for f in fields(cls)}
    others = {f.name: s.name for s in STAGES.values() for f in fields(s.config_class) if f.name not in own}
    return Parser(*classes, elsewhere=others)


def row_notes(trainer: HalfFineTuning, train: Dataset, test: Dataset | None) -> list[str]:
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


def evaluated_at_the_end(trainer: HalfFineTuning) -> bool:
    """Whether the model as it is has been evaluated."""
    return any("eval_loss" in row and row["step"] == trainer.state.global_step for row in trainer.state.log_history)


def measured(stage: Stage, trainer: HalfFineTuning) -> dict[str, Any]:
    """What a run measured: steps, losses, speed, memory, and of each held-out metric the first and last value."""
    history = trainer.state.log_history

    def logged(key: str) -> list[float]:
        return [row[key] for row in history if key in row]

    losses, speeds = logged("loss"), logged("train_tokens_per_second")
    evals = {name: logged(f"eval_{name}") for name in HELD_OUT}
    return {
        "stage": stage.name,
        "steps": trainer.state.global_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "held_out": {name: values[:1] + values[1:][-1:] for name, values in evals.items() if values},
        "tokens_per_second": speeds[-1] if speeds else None,
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
        "trainable_share": trainer.manifest.shares,
        "versions": trainer.manifest.versions,
        **({"schedule_shares": trainer.manifest_so_far().schedule["shares"]} if trainer.schedule else {}),
    }


def conclude(results: dict[str, Any], out: Path, *, tracked: bool = False) -> int:
    """Verify, write the results, end the wandb run, and say where everything is.

    Returns:
        The exit status.
    """
    found = verify_folder(out)
    results["verify"] = {name: len(value) for name, value in asdict(found).items() if name != "against"}
    (out / RESULTS_NAME).write_text(json.dumps(results, indent=1) + "\n")
    if tracked:
        tracking.finish(out / MANIFEST_NAME, results)
    say("", summary(results, found, out))
    return 0 if found.ok else 1


def summary(results: dict[str, Any], found: Verification, out: Path) -> str:
    """The end of a run in words: what came out, where it is, what to try next."""
    losses = [results["first_loss"], results["last_loss"]]
    metrics = [("training loss", losses)] if None not in losses else []
    metrics += [(f"held-out {name}", values) for name, values in results["held_out"].items()]
    changes = "\n".join(f"  {name:28} {' -> '.join(f'{value:.4f}' for value in values)}" for name, values in metrics)
    hft = sys.argv[0] if Path(sys.argv[0]).name == "hft" else "hft"  # as it was called, to be called again
    again = f"{hft} {results['stage']} --config {out}/{CONFIG_NAME}"
    return f"""\
verify
{indented(found.report())}

result
  {results["steps"]} steps
{changes}
  {results["tokens_per_second"] or 0:,.0f} tokens/s, peak memory {results["peak_memory_gb"]} GB

{out}/
  model.safetensors       the model; loads in plain transformers
  {MANIFEST_NAME}       what was frozen, with checksums
  {PICTURE_NAME}           the selection as a picture
  {CONFIG_NAME}             the resolved config
  {RESULTS_NAME}            the numbers above

try next
  {hft} verify {out}
  {again} --output_dir NEW  # the same run again
  {again} --output_dir NEW --selection_seed 1  # another half
  {again} recipes/methods/fft.yaml --output_dir NEW  # everything trains"""


def _short(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text.rstrip("/").rpartition("/")[2])
