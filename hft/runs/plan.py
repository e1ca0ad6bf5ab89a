"""What a run will do, known before any weights are loaded and before anything is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft.config import fill, to_yaml
from hft.errors import HFTError, reason
from hft.machine import broadcast, cpu_has_bfloat16, indented, is_main, is_zero3, world_size
from hft.model.vocabulary import ids_beyond
from hft.planning.checkpointing import check_checkpointing, checkpointed_layers
from hft.planning.memory import MOMENTS, Memory, why_it_does_not_fit
from hft.planning.outlook import Candidate, Outlook, usable_bytes, what_to_change
from hft.record.manifest import identity_of
from hft.runs.comparison import compare, describe_flops, describe_state, exactly
from hft.runs.config import Config, find_template
from hft.runs.costs import Engine, candidates_of, engine_of, has_reference, micro_batch
from hft.runs.folder import check_output, look_into_folder
from hft.runs.objective import config_class, in_pairs, rows_of
from hft.selection import Selection
from hft.selection.policies import DEFERRED, placeholder_selection

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

    from hft.data import LoadedData
    from hft.methods.adapter import AdapterFootprint


@dataclass(frozen=True)
class RunPlan:
    """One run, checked and ready to start.

    Attributes:
        config: the resolved config.
        selection: what trains, or a placeholder of its size if the policy looks at weights; or an adapter's footprint.
        memory: bytes per device, with activations where they are known.
        engine: where it computes.
        model_config: the base's.
        candidates: full fine-tuning, the run, and its cheapest rival, where their costs are known.
        unknown: a sentence on why they are not known, else None.
        outlook: the machine that the plan is made for, if it was asked for.
        misfit: a sentence if this machine cannot hold the run; then nothing below is known.
        args: TRL's config.
        machine: settings that this machine decided.
        tokenizer: the base's.
        data: the rows to train and to evaluate on.
        checkpointed: the indices of the layers that compute their activations again in the backward pass.
        resume_from: the checkpoint that the run resumes from, if there is one.
        is_finished: whether the folder holds this very run, finished.
        notes: what is worth knowing, one sentence each.
    """

    config: Config
    selection: Selection | AdapterFootprint
    memory: Memory
    engine: Engine
    model_config: PretrainedConfig
    candidates: list[Candidate] = field(default_factory=list)
    unknown: str | None = None
    outlook: Outlook | None = None
    misfit: str | None = None
    args: TrainingArguments | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    data: LoadedData | None = None
    checkpointed: range = range(0)
    resume_from: str | None = None
    is_finished: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def own(self) -> Candidate:
        """The run among the candidates."""
        return self.candidates[-2]

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.config.out

    @property
    def rows_per_step(self) -> int:
        """Rows per step of one process."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    @property
    def global_batch(self) -> int:
        """Rows per step, over all processes."""
        return self.rows_per_step * self.engine.processes

    @property
    def planned(self) -> dict[str, float] | None:
        """The run's FLOPs, also relative to full fine-tuning, and bytes per device; None where they are not known."""
        if not self.candidates:
            return None
        fft, own, memory = self.candidates[0].step, self.own.step, self.own.memory
        per_token = {"flops_per_token": own.flops / own.tokens, "flops_to_fft": own.flops / fft.flops}
        return per_token | {"state_bytes": memory.state, "peak_bytes": memory.total}

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None if the data is not here, or rows are packed and only the packed ones tell."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        is_known = self.data and not getattr(self.args, "packing", False)
        return self.steps_over(len(self.data.train)) if is_known else None

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole run if all rows are as long as they may be; None if that or its steps are not known."""
        sequences, length = self.global_batch * (2 if in_pairs(self.config.objective) else 1), self.args.max_length
        return None if self.steps is None or length is None else self.steps * sequences * length

    def steps_over(self, rows: int) -> int:
        """Steps of all epochs over that many rows."""
        args = self.args
        at_once = args.per_device_train_batch_size * self.engine.processes
        batches = rows // at_once if args.dataloader_drop_last else math.ceil(rows / at_once)
        return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))

    @property
    def is_deferred(self) -> bool:
        """Whether the selection is a placeholder until the base is loaded."""
        return isinstance(self.selection, Selection) and self.selection.config.policy in DEFERRED

    @property
    def identity(self) -> dict[str, Any]:
        """What makes another run the same as this one (`hft.record.manifest.identity_of`)."""
        method, data = self.config.method, self.data.fingerprint if self.data else None
        parts = (method.update, method.schedule, method.strategy)
        update, schedule, strategy = (part.record() if part else None for part in parts)
        return identity_of(self.selection.record(), update, schedule, data, strategy)

    def report(self) -> str:
        """The plan in words: selection, memory, batch, steps and tokens, schedule, notes."""
        blocks = [("selection", self.selection.summary())]
        if not (self.outlook and self.candidates):
            blocks.append(("memory", self.memory.table()))
        if self.machine:
            blocks.append(("on this machine", to_yaml(self.machine).rstrip()))
        if self.args and (self.data or self.outlook):
            blocks.append(("plan", describe_steps(self)))
        if self.candidates:
            blocks += self._costs()
        elif self.outlook and self.args:
            blocks.append(("cost", describe_state(self.memory, self.outlook, self.engine)))
        schedule = self.config.method.schedule
        if schedule and self.data and self.steps:
            blocks.append(("schedule", schedule.describe(self.selection, self.steps)))
        if self.notes:
            blocks.append(("notes", "\n".join(self.notes)))
        return "\n".join(f"{title}\n{indented(text)}\n" for title, text in blocks)

    def what_to_change(self, available: float) -> str | None:
        """A sentence about what makes the run fit into so many bytes of a device, or None if it fits."""
        return what_to_change(
            self.own,
            available,
            rows=self.args.per_device_train_batch_size,
            batch=self.rows_per_step,
            shards=self.engine.shards,
            shardable=self.config.method.shardable,
        )

    def _costs(self) -> list[tuple[str, str]]:
        if not self.outlook:
            return [("cost", describe_flops(self.candidates, self.args.max_length))]
        how, candidates, engine = micro_batch(self.config, self.args), self.candidates, self.engine
        available = usable_bytes(self.outlook, use_cpu=not engine.on_gpu)
        change = self.what_to_change(available) if available else None
        text = compare(candidates, self.outlook, engine, how, tokens=self.tokens, available=available, change=change)
        counted = exactly(self.model_config, self.selection, self.own, engine, how) if self.outlook.exact else None
        return [("cost", text), *([("exact", counted)] if counted else [])]


def make_plan(config: Config, outlook: Outlook | None = None) -> RunPlan:
    """Plan a run: selection, memory, costs, data, steps and folder. Loads no weights, writes nothing, prints nothing.

    Args:
        config: of the run.
        outlook: compare it with other ways of training, and on other GPUs where it names some; then neither this
            machine nor the folder is looked at, and the rows only if they are needed and here.

    Raises:
        HFTError: the run cannot be made as asked, whatever the machine.
    """
    method = config.method
    model_config = load_model_config(config)
    selection = plan_selection(config, model_config)
    engine = engine_of(config, model_config, outlook)
    elsewhere, reference = bool(outlook and outlook.gpus), has_reference(config)
    state = engine.memory(method, selection, reference=reference)
    plan = RunPlan(config, selection, state, engine, model_config, outlook=outlook)
    use_cpu, optim = bool(config.values.get("use_cpu")), config.values.get("optim")
    misfit = why_it_does_not_fit(
        method, selection, reference=reference, shards=engine.shards, use_cpu=use_cpu, optim=optim
    )
    if misfit and not elsewhere:
        return replace(plan, misfit=misfit)

    machine = machine_settings(config.values)
    args, notes = training_arguments(config, machine, engine.processes)
    if optim and optim not in MOMENTS:
        notes.append(f"the state of {optim} is not known; planned is that of AdamW, 8 bytes per trained parameter")
    if method.strategy and method.strategy.acts_on_steps and outlook:
        notes.append(f"FLOPs and activations of the gradients that {method.strategy.name} computes are not counted")
    if config.run.save_only_trained and not (selection.frozen_parameters or plan.is_deferred):
        notes.append("save_only_trained saves the whole model: no tensor is frozen as a whole")
    plan = with_costs(with_layers(replace(plan, args=args, machine={} if elsewhere else machine, notes=notes)))
    if config.run.activation_checkpointing_layers == "auto":
        plan = with_fewest_layers(plan)
    if elsewhere:
        return with_rows_if_here(plan)
    tokenizer = load_tokenizer(config)
    check_output(config)
    plan = with_rows(plan)
    notes = [*plan.notes, *ids_beyond(tokenizer.get_vocab(), model_config.get_text_config().vocab_size)]
    plan = replace(plan, tokenizer=tokenizer, notes=notes)
    # One process looks and decides for all, since it also writes to the folder that the others would look at.
    found = broadcast(look_into_folder(config, plan.identity, args) if is_main() else None)
    return replace(plan, **(found | {"notes": [*plan.notes, *found["notes"]]}))


def with_layers(plan: RunPlan) -> RunPlan:
    """A plan with the layers that are checkpointed; for `auto` all of them."""
    first, adapter = plan.config.run.activation_checkpointing_layers, plan.config.method.adapter
    count = plan.selection.anatomy.num_layers
    layers = checkpointed_layers(plan.args, count, count if first == "auto" else first)
    return replace(plan, checkpointed=range(0) if adapter and not adapter.keeps_checkpointing else layers)


def with_fewest_layers(plan: RunPlan) -> RunPlan:
    """A plan that checkpoints as few layers as fit into the GPU, or all of them and what to change if these do not fit.

    Raises:
        HFTError: the run's activations are not known.
    """
    available = usable_bytes(plan.outlook, use_cpu=not plan.engine.on_gpu)
    if not plan.candidates:
        raise HFTError(f"activation_checkpointing_layers auto: {plan.unknown}; give a number of layers")
    if available is None:
        raise HFTError("activation_checkpointing_layers auto depends on the GPU's memory; add --gpu_memory")
    fewest = plan.own.fewest(available)
    if fewest is None:
        return plan if plan.outlook else replace(plan, misfit=plan.what_to_change(available))
    plan.args.activation_checkpointing = plan.args.gradient_checkpointing = fewest > 0  # transformers is renaming it
    return with_costs(replace(plan, checkpointed=range(fewest)))


def with_costs(plan: RunPlan) -> RunPlan:
    """A plan with FLOPs and activations; one that was asked for them says why they are not known."""
    try:
        candidates = candidates_of(
            plan.config, plan.model_config, plan.selection, plan.args, plan.engine, tuple(plan.checkpointed)
        )
    except HFTError as error:
        return replace(plan, unknown=str(error), notes=[*plan.notes, *([str(error)] if plan.outlook else [])])
    plan = replace(plan, candidates=candidates)
    return replace(plan, memory=plan.own.memory)


def with_rows(plan: RunPlan) -> RunPlan:
    """A plan with the rows to train and to evaluate on."""
    with plan.args.main_process_first(desc="loading the data"):
        from hft.data import load_data

        rows, evaluate = rows_of(plan.config.objective), plan.args.eval_strategy != "no"
        data = load_data(plan.config.run, rows, evaluate=evaluate)
    return replace(plan, data=data, notes=[*plan.notes, *data.notes])


def with_rows_if_here(plan: RunPlan) -> RunPlan:
    """A plan for another machine: with its rows if the steps depend on them and they can be had."""
    if plan.args.max_steps > 0:
        return plan
    try:
        return with_rows(plan)
    except HFTError as error:
        return replace(plan, notes=[*plan.notes, f"steps and GPU-hours are not known: {error}; or give --max_steps"])


def plan_selection(config: Config, model_config: PretrainedConfig) -> Selection | AdapterFootprint:
    """What will train, as far as it is known before the base is loaded.

    Raises:
        HFTError: a selection that cannot be made, or a method that does not go with it or with the model.
    """
    from hft.model.anatomy import anatomy_of, meta_model
    from hft.selection.importance import check_linear

    method = config.method
    if method.adapter:
        return method.adapter.footprint(model_config)
    model = meta_model(model_config)
    selection = placeholder_selection(anatomy_of(model), method.selection)
    if method.selection.policy == "importance":
        check_linear(model, selection.anatomy)
        if not (method.selection.importance_data and method.selection.importance_rows):
            raise HFTError(
                "the importance policy scores the base on general text: give --importance_data, --importance_rows"
            )
    if method.schedule:
        method.schedule.check(selection)
    if method.update:
        method.update.check(model, selection)
    return selection


def load_model_config(config: Config) -> PretrainedConfig:
    """The base's config, from the recipe's `architecture` folder if it has one.

    Raises:
        HFTError: it cannot be loaded, or the model is quantized.
    """
    from hft.model.load import read_config

    source = config.run.model_name_or_path
    if config.run.architecture and not Path(source).is_dir():
        source = config.run.architecture
    return read_config(config.run.model_name_or_path, source)


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the recipe's padding token and chat template.

    Raises:
        HFTError: it cannot be loaded; neither it nor the recipe has a chat template; or the recipe's padding token is
            not in the vocabulary, where adding one would resize the embeddings.
    """
    from transformers import AutoTokenizer

    base, template = config.run.model_name_or_path, config.run.chat_template_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise HFTError(f"cannot load the tokenizer of {base}: {reason(error)}") from error
    if template and Path(find_template(template)).is_file():
        tokenizer.chat_template = Path(find_template(template)).read_text(encoding="utf-8")
    elif not tokenizer.chat_template and not template:
        raise HFTError(f"{base} has no chat template: give --chat_template_path, or start from an SFT run")
    if token := config.run.tokenizer_pad_token:
        if token not in tokenizer.get_vocab():
            raise HFTError(f"tokenizer_pad_token {token!r} is not in the vocabulary of {base}")
        tokenizer.pad_token = token
    return tokenizer


def machine_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings that the machine decides where the config does not: CPU or not, bf16 or not."""
    import torch

    on_cpu = values.get("use_cpu") or not torch.accelerator.is_available()
    settings = {"use_cpu": True, "bf16": cpu_has_bfloat16()} if on_cpu else {}
    if is_zero3():  # DeepSpeed itself calls torch's autocast; with bf16 it would convert the frozen half
        settings["bf16"] = False
    return {key: value for key, value in settings.items() if values.get(key) is None}


def training_arguments(
    config: Config, machine: dict[str, Any], processes: int | None = None
) -> tuple[TrainingArguments, list[str]]:
    """TRL's config, with the batch, the learning rate and the template that ours come to; and notes about them.

    Args:
        config: of the run.
        machine: settings that the machine decided.
        processes: of the run; by default those that the launcher started.

    Raises:
        HFTError: TRL refuses a value, or the method cannot work with one.
    """
    cls, values = config_class(config.objective), dict(config.values)
    batch = accumulation_steps(values, cls.per_device_train_batch_size, processes or world_size())
    rate, notes = learning_rate(values, cls.learning_rate)
    if values.get("max_steps", -1) > 0 and "num_train_epochs" in values:
        notes.append(f"max_steps {values['max_steps']} overrides num_train_epochs {values['num_train_epochs']:g}")
    if "chat_template_path" in values:
        values["chat_template_path"] = find_template(values["chat_template_path"])
    if (layers := values.get("activation_checkpointing_layers")) is not None:
        values["activation_checkpointing"] = layers == "auto" or layers > 0
    args = fill(cls, values | machine | batch | rate)
    if args.n_gpu > 1:  # Trainer would wrap the model in DataParallel and multiply the batch
        raise HFTError("several GPUs are visible to one process: use `accelerate launch`, or CUDA_VISIBLE_DEVICES=0")
    if config.method.adapter and config.run.save_only_trained:
        raise HFTError("an adapter's folder holds only what trained anyway; leave out save_only_trained")
    pairs = in_pairs(config.objective)
    config.method.check_args(args, pairs=pairs)
    check_checkpointing(args, pairs=pairs)
    if pairs and not config.method.adapter:
        from hft.training.dpo import check_reference

        check_reference(args)
    return args, notes


def accumulation_steps(values: dict[str, Any], default: int, processes: int | None = None) -> dict[str, int]:
    """Gradient accumulation that makes the global batch what the recipe says; `default` rows per device.

    Raises:
        HFTError: the rows per step are not a multiple of rows per device times processes.
    """
    total = values.get("global_batch_size")
    if total is None:
        return {}
    if "gradient_accumulation_steps" in values:
        raise HFTError("gradient_accumulation_steps is derived from global_batch_size; give only one of them")
    per_device = values.get("per_device_train_batch_size", default)
    if per_device < 1 or total < 1:
        raise HFTError(f"batch sizes must be at least 1, got {per_device} rows per device, {total} in all")
    processes = processes or world_size()
    accumulation, remainder = divmod(total, per_device * processes)
    if remainder or not accumulation:
        raise HFTError(
            f"global_batch_size {total} is not a multiple of {per_device} rows per device x {processes} processes; "
            "change --per_device_train_batch_size"
        )
    return {"gradient_accumulation_steps": accumulation}


def learning_rate(values: dict[str, Any], default: float) -> tuple[dict[str, float], list[str]]:
    """The learning rate of an adapter, whose method file gives it as a multiple of the recipe's; and a note."""
    factor, rate = values.get("learning_rate_factor", 1.0), values.get("learning_rate", default)
    if factor == 1.0:
        return {}, []
    return {"learning_rate": rate * factor}, [
        f"learning rate {rate * factor:g}: {factor:g} times the recipe's {rate:g}"
    ]


def describe_steps(plan: RunPlan) -> str:
    """Batch, steps, tokens and activation checkpointing in words."""
    args, steps, data, processes = plan.args, plan.steps, plan.data, plan.engine.processes
    rows = "pairs" if in_pairs(plan.config.objective) else "rows"
    batch = (
        f"global batch {plan.global_batch} = {args.per_device_train_batch_size} {rows} x {processes} "
        f"process{'es' if processes > 1 else ''} x {args.gradient_accumulation_steps} accumulation steps"
    )
    if steps is None:
        how_long = "steps are known once the rows are packed" if data else "steps are not known without the rows"
    else:
        how_long = f"{steps:,} steps" + (f", at most {plan.tokens:,} tokens" if plan.tokens else "")
    layers = f"activations of {len(plan.checkpointed)} of {plan.selection.anatomy.num_layers} layers checkpointed"
    if data is None:
        return f"{batch}\n{how_long}\n{layers}"
    test = len(data.test) if data.test is not None else 0
    return f"{batch}\n{len(data.train):,} training {rows}, {how_long}; {test:,} {rows} to evaluate on\n{layers}"
