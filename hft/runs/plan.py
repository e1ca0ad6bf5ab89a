"""What a run will do, known before any weights are loaded and before anything is written."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from hft.catalog import RECIPES
from hft.config import to_yaml
from hft.data import LoadedData, load_data
from hft.errors import HFTError, read_text, reason
from hft.machine import broadcast, indented, is_main, world_size
from hft.model.anatomy import meta_model
from hft.model.load import check_init_kwargs, ids_beyond, read_config
from hft.model.weights import check_is_there
from hft.record.identity import identity_of
from hft.runs import arguments
from hft.runs.config import Config, find_template
from hft.runs.folder import Start, check_output, find_start
from hft.selection import Selection
from hft.selection.importance import planned_selection
from hft.training.engines import check_selection


@dataclass(frozen=True)
class RunPlan:
    """One run, checked and ready to start.

    Attributes:
        config: the resolved config.
        selection: what trains; or an adapter's footprint.
        args: TRL's config.
        machine: settings that this machine decided.
        tokenizer: the base's.
        data: the rows to train and to evaluate on.
        start: where in its folder the run starts.
        notes: what is worth knowing, one sentence each.
    """

    config: Config
    selection: Selection
    args: TrainingArguments
    machine: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    data: LoadedData
    start: Start
    notes: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.config.out

    @property
    def checkpointed(self) -> range:
        """The indices of the layers that compute their activations again in the backward pass."""
        return arguments.checkpointed_of(self.config, self.machine, self.args, self.selection)

    @property
    def batches(self) -> Batches:
        return Batches(self.config, self.args, world_size(), len(self.data.train))

    def report(self) -> str:
        """The plan as text: selection, batch, steps and tokens, schedule, notes."""
        return describe(self.config, self.selection, self.batches, self.machine, self.data, self.notes)


@dataclass(frozen=True)
class Batches:
    """Batches, steps and tokens of a run."""

    config: Config
    args: TrainingArguments
    processes: int
    rows: int | None  # to train on, before they are packed; None if they are not known

    @property
    def global_batch(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.processes

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None without the rows, or if rows are packed and only the packed ones tell."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return None if self.rows is None or getattr(self.args, "packing", False) else self.steps_over(self.rows)

    def steps_over(self, rows: int) -> int:
        args = self.args
        at_once = args.per_device_train_batch_size * self.processes
        batches = rows // at_once if args.dataloader_drop_last else math.ceil(rows / at_once)
        return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole run if all rows are as long as they may be; None if that or its steps are not known."""
        if self.steps is None or self.args.max_length is None:
            return None
        return self.steps * self.global_batch * self.config.objective.sequences * self.args.max_length


def describe(
    config: Config,
    selection: Selection,
    batches: Batches,
    machine: dict[str, Any],
    data: LoadedData | None,
    notes: Sequence[str],
    **costs: str,
) -> str:
    """A run as text, below headings; what is empty is skipped."""
    args, steps, unit, schedule = batches.args, batches.steps, config.objective.unit, config.method.schedule
    length = "steps are known once the rows are packed" if data else "steps are not known without the rows"
    if steps is not None:
        length = f"{steps:,} steps" + (f", at most {batches.tokens:,} tokens" if batches.tokens else "")
    if data:
        length = f"{len(data.train):,} training {unit}, {length}; {len(data.test or ()):,} {unit} to evaluate on"
    checkpointed = len(arguments.checkpointed_of(config, machine, args, selection))
    plan = f"""\
global batch {batches.global_batch} = {args.per_device_train_batch_size} {unit} x {batches.processes} \
process{"es" if batches.processes > 1 else ""} x {args.gradient_accumulation_steps} accumulation steps
{length}
activations of {checkpointed} of {selection.anatomy.num_layers} layers checkpointed"""
    blocks = {
        "selection": selection.summary(),
        "on this machine": to_yaml(machine).rstrip() if machine else "",
        "plan": plan,
        **costs,
        "schedule": schedule.describe(selection, steps) if schedule and steps else "",
        "notes": "\n".join(notes),
    }
    return "\n".join(f"{title}\n{indented(text)}\n" for title, text in blocks.items() if text)


def make_plan(config: Config) -> RunPlan:
    """Plan a run. Loads no weights, writes nothing, prints nothing.

    Raises:
        DoesNotFit: this machine cannot hold the run.
        HFTError: the run cannot be made as asked.
    """
    method, base = config.method, config.run.model_name_or_path
    arguments.check_packages(config.values)
    model_config = load_model_config(config)
    selection = plan_selection(config, model_config)
    machine = arguments.machine_settings(config.values)
    args, notes = arguments.training_arguments(config, machine)
    arguments.check_arguments(args, model_config)
    if "wandb" in args.report_to:
        check_wandb()
    notes += arguments.check_positions(model_config, args, getattr(method.adapter, "num_virtual_tokens", None) or 0)
    if not method.adapter:
        check_selection(args, model_config, selection, save_only_trained=config.run.save_only_trained)
    if importlib.util.find_spec("hft.planning"):  # a fork may have removed it
        from hft.planning.fit import fit

        if (layers := fit(config, model_config, selection, args)) is not None:
            machine["activation_checkpointing_layers"] = layers
            args.activation_checkpointing = args.gradient_checkpointing = layers > 0  # transformers is renaming it
    arguments.checkpointed_of(config, machine, args, selection)  # refuses a number that the model does not have
    if config.revision and Path(base).is_dir():
        notes.append(f"revision {config.revision} is not used: {base} is a folder")
    if config.run.save_only_trained and not (selection.frozen_parameters or selection.frozen_masks):
        notes.append("save_only_trained saves the whole model: nothing is frozen")
    tokenizer = load_tokenizer(config)
    arguments.check_saving(base, model_config, tokenizer, config.revision)
    check_output(config)
    data = load_rows(config, args)
    if data.is_text and getattr(args, "assistant_only_loss", False):
        args.assistant_only_loss = False
        notes.append("assistant_only_loss is about conversations, and the rows are text: it is off")
    elif not data.is_text:
        check_template(config, tokenizer)
    notes += [*data.notes, *ids_beyond(tokenizer.get_vocab(), model_config.get_text_config().vocab_size)]
    parts = method.update, method.schedule, method.strategy
    update, schedule, strategy = (part.record() if part else None for part in parts)
    identity = identity_of(selection.record(), update, schedule, data.fingerprint, strategy)
    # One process looks and decides for all, since it also writes to the folder that the others would look at.
    start = broadcast(find_start(config, identity, args) if is_main() else None)
    return RunPlan(config, selection, args, machine, tokenizer, data, start, [*notes, *start.notes])


def check_wandb() -> None:
    """Refuse a variable that `wandb.init` would refuse, without its value, which may be a key."""
    import wandb

    for name, value in os.environ.items():
        try:
            wandb.Settings().update_from_env_vars({name: value})
        except (wandb.Error, ValidationError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else reason(error)
            raise HFTError(f"wandb does not take {name}: {why}; correct or unset it") from error


def load_rows(config: Config, args: TrainingArguments) -> LoadedData:
    """The rows; refuses settings of TRL's that are about rows in another form."""
    if (field := getattr(args, "dataset_text_field", "text")) != "text":
        raise HFTError(f"dataset_text_field {field}: text is read from a column named text; rename yours, drop the key")
    if (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
        raise HFTError("skip_prepare_dataset: rows are read as text or messages, not as tokens; remove it")
    with args.main_process_first(desc="loading the data"):
        data = load_data(config.run, config.objective.read_rows, evaluate=args.eval_strategy != "no")
    if getattr(args, "completion_only_loss", False) and "completion" not in data.train.column_names:
        why = f"completion_only_loss is about rows of prompt and completion, and those of {data.name} are others"
        raise HFTError(f"{why}; remove it, and for messages take assistant_only_loss")
    return data


def plan_selection(config: Config, model_config: PretrainedConfig) -> Selection:
    """What will train; refuses a method that does not go with it or with the model."""
    method, base = config.method, config.run.model_name_or_path
    init_kwargs = config.values.get("model_init_kwargs") or {}
    check_init_kwargs(init_kwargs, base, model_config if method.adapter else None)
    if method.adapter:
        return method.adapter.footprint(model_config)
    model = meta_model(model_config)
    selection = planned_selection(model, method.selection, config.base)
    if method.schedule:
        method.schedule.check(selection)
    if method.update:
        method.update.check(model, selection)
    return selection


def load_model_config(config: Config) -> PretrainedConfig:
    """The base's config, from the recipe's `architecture` folder, one on disk or of hft's, if it has one."""
    base, architecture = config.run.model_name_or_path, config.run.architecture
    if architecture and not Path(base).is_dir():
        packaged = RECIPES / architecture.removeprefix("recipes/")
        return read_config(base, architecture if Path(architecture).is_dir() or not packaged.is_dir() else packaged)
    return read_config(base, base, config.revision)


def check_template(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse conversations without a chat template; TRL reads one that is the name of another model."""
    base = config.run.model_name_or_path
    if not tokenizer.chat_template and not config.run.chat_template_path:
        raise HFTError(f"{base} has no chat template: give --chat_template_path, or start from an SFT run")


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the recipe's padding token and chat template."""
    base, template = config.run.model_name_or_path, find_template(config.run.chat_template_path or "")
    check_is_there(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=config.revision or "main", trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise HFTError(f"cannot load the tokenizer of {base}: {reason(error)}") from error
    if Path(template).is_file():
        tokenizer.chat_template = read_text(template)
    if token := config.run.tokenizer_pad_token:
        if token not in tokenizer.get_vocab():
            raise HFTError(f"tokenizer_pad_token {token!r} is not in the vocabulary of {base}")
        tokenizer.pad_token = token
    return tokenizer
