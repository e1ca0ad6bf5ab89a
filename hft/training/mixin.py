"""What half fine-tuning adds to a TRL trainer: freezing, fp32 master weights, manifests, refused resumes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import DPOTrainer

from hft.errors import HFTError
from hft.freezing import PartFreezer, check_frozen, freeze, upcast, whole
from hft.machine import is_main, is_sharded, is_zero3
from hft.methods import check_parts
from hft.methods.callback import ScheduleCallback
from hft.model.anatomy import anatomy_of
from hft.model.load import load_base
from hft.model.weights import MODEL_CONFIG, Weights, cast_weights, checksum, local_folder
from hft.record.checkpoints import is_checkpoint
from hft.record.manifest import Manifest
from hft.selection import Selection, SelectionConfig, select
from hft.selection.masks import frozen_values, save_masks
from hft.training.base import ManifestMixin
from hft.training.checkpointing import check_checkpointing
from hft.training.resharding import resharded

if TYPE_CHECKING:
    from hft.methods.schedule import Schedule
    from hft.methods.update import Update


class HalfFineTuning(ManifestMixin):
    """Mixin that makes a TRL trainer train one selection of the model's units and leave the rest as it was.

    List it before the trainer class. Everything else of the trainer stays TRL's: with nothing frozen, it takes the
    same steps.

    Args:
        model: path or Hub id of the base, loaded in the dtype its weights are stored in, or a loaded model.
        args: the trainer's own config.
        selection: which units train, or the config to make it from; by default the paper's HFT.
        update: how the trained weights move; by default as the optimizer says.
        schedule: how that changes during the run; by default it does not.
        save_only_trained: leave the wholly frozen tensors out of what is saved, checkpoints included; `hft merge
            --method delta` takes them from the base.
        kwargs: whatever else the trainer takes.

    Raises:
        HFTError: `peft_config` or a built optimizer is given, since both would escape the selection, or the model is
            quantized, of an unknown family, or sharded in a way that cannot hold a half-frozen layer.
    """

    def __init__(
        self,
        model,
        args,
        *,
        selection: Selection | SelectionConfig | None = None,
        update: Update | None = None,
        schedule: Schedule | None = None,
        save_only_trained: bool = False,
        **kwargs,
    ):
        check_arguments(kwargs)
        check_parts(args, update, schedule)
        check_checkpointing(args, pairs=isinstance(self, DPOTrainer))
        if schedule:  # what it freezes at a step is an unused parameter to DDP
            args.ddp_find_unused_parameters = True
        source = model
        if is_zero3(args):  # else from_pretrained would partition what is to be frozen, upcast and checked whole
            unset_hf_deepspeed_config()
        model, self._stored_dtypes = loaded(model, args)
        self._config_dtype = model.dtype
        if not isinstance(selection, Selection):
            selection = select(anatomy_of(model), selection or SelectionConfig())
        self.selection = selection
        if is_zero3(args):
            check_zero3(selection, save_only_trained=save_only_trained)
        freeze(model, selection)
        self._record(model, args, update, schedule)
        if save_only_trained and selection.frozen_parameters:
            if isinstance(source, str):
                check_stored_as_computed(source, self.manifest.revision, selection.anatomy.parameters)
            self.manifest.only_trained = True
            # transformers' own list; on a resume Trainer takes these, and only these, as rightly missing.
            model._keys_to_ignore_on_save |= keys_of(model, selection.frozen_parameters)

        callbacks = update.callbacks(model, selection.anatomy) if update else []  # before the upcast: the base's values
        if schedule:  # now, since Trainer's constructor collects what a checkpoint keeps of callbacks
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), self.schedule]
        super().__init__(model=model, args=args, **self.prepare_model(model, args, kwargs))
        callbacks += [] if schedule else [FreezeCheck(selection)]
        callbacks += [PartFreezing(selection, self._stored_dtypes)] if selection.frozen_masks else []
        for callback in callbacks:  # parts last: they put back what any other callback has moved
            self.add_callback(callback)
        self._check_engine()

    def _record(self, model, args, update: Update | None, schedule: Schedule | None) -> None:
        """Make the manifest, and the schedule's callback."""
        selection = self.selection
        if schedule:
            schedule.check(selection)
            self.schedule = ScheduleCallback(selection, schedule)
            # What the schedule never trains is bit-identical to the base at the end, and can be proved to be.
            self._base_checksums = self._checksums(model, selection.trained_parameters)
        self.manifest = Manifest.of(
            selection,
            model.config._name_or_path,
            self._checksums(model, [*selection.frozen_parameters, *selection.frozen_masks]),
            revision=(getattr(args, "model_init_kwargs", None) or {}).get("revision"),
            update=update.record() if update else {"update": "plain"},
            schedule={"config": schedule.record()} if schedule else {},
        )

    def _check_engine(self) -> None:
        if self.is_deepspeed_enabled:
            check_deepspeed(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise HFTError("FSDP1 cannot mix frozen and trained parameters in a layer; set fsdp_version: 2")
        reentrant = (self.args.activation_checkpointing_kwargs or {}).get("use_reentrant")
        if self.selection.config.freeze_embeddings and reentrant:
            # Reentrant checkpointing finds no gradient to pass on when nothing before the first layer has one.
            self.model.enable_input_require_grads()

    def create_accelerator_and_postprocess(self) -> None:
        """Under FSDP2 keep log-probabilities, losses and the reduction of gradients in fp32, as under DDP.

        accelerate's own policy is bf16 throughout: at |logp| above 512 sums move in steps of 4. One policy holds for
        every wrapped module, so the last layer hands fp32 on to the head too.
        """
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            compute = plugin.mixed_precision_policy.param_dtype
            plugin.mixed_precision_policy = MixedPrecisionPolicy(compute, torch.float32, torch.float32)

    def prepare_model(self, model: PreTrainedModel, args: TrainingArguments, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Give the trained half its fp32 master weights, just before TRL's own constructor sees the model.

        Returns:
            The remaining arguments of TRL's constructor.
        """
        # accelerate upcasts the trained parameters of an FSDP2 model itself, but only if it computes in half precision.
        if is_zero3(args):
            upcast(model, autocast=True)
        elif not is_sharded(args) or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no":
            upcast(model, autocast=args.bf16 or args.fp16)
        return kwargs

    def compute_loss_context_manager(self):
        """Evaluate in autocast under ZeRO-3 too, which only DeepSpeed's engine enters: Trainer calls the bare model."""
        contexts = super().compute_loss_context_manager()
        if self.is_deepspeed_enabled and not self.model.training:
            dtype = self.accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"].get("dtype", "bfloat16")
            contexts.enter_context(torch.autocast(self.args.device.type, getattr(torch, dtype)))
        return contexts

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Resume under ZeRO-3 on any number of processes.

        Not public in transformers, which makes the engine and loads its checkpoint in one go.
        """
        if not (resume_from_checkpoint and self.is_deepspeed_enabled):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        with resharded(self, resume_from_checkpoint) as checkpoint:
            return super()._prepare_for_training(max_steps, train_dataloader, checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load a schedule's optimizer state under FSDP2, which expects one for whatever requires a gradient.

        Not public in transformers, which has no hook between sharding the model and loading the state.
        """
        if not (checkpoint and self.schedule and self.is_fsdp_enabled):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        names = self.schedule.have_state(Manifest.load(checkpoint).schedule["history"])
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        super()._load_optimizer_and_scheduler(checkpoint)
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with its manifest, the frozen tensors bit for bit those of the base.

        A `checkpoint-N` folder keeps the fp32 master weights of the trained half, so that a resumed run continues
        exactly; anywhere else the trained half too is written in the dtypes of the base. With `save_only_trained` the
        frozen tensors are compared in memory, and left out.
        """
        folder = Path(output_dir or self.args.output_dir)
        checkpoint = is_checkpoint(folder, self.args.output_dir)
        if self.manifest.only_trained and not checkpoint:
            self.manifest.moved = self._moved()
        super().save_model(str(folder), _internal_call)
        if not self.args.should_save:
            return
        manifest, dtypes = self.manifest_so_far(), self._stored_dtypes
        others = (self._config_dtype, self.model.state_dict().keys())
        if checkpoint:
            frozen = manifest.frozen_checksums.keys() - manifest.masks.keys()
            dtypes, others = {name: dtypes[name] for name in frozen if name in dtypes}, None
        elif self.schedule is not None:
            manifest = self.finished_manifest(manifest)
        cast_weights(folder, dtypes, others)
        config = copy.deepcopy(self.model.config)
        config.dtype = self._config_dtype  # not that of the master weights
        config.save_pretrained(folder)
        if manifest.only_trained:
            (folder / "config.json").replace(folder / MODEL_CONFIG)
        manifest.save(folder)
        save_masks(folder, self.selection.frozen_masks)

    def manifest_so_far(self) -> Manifest:
        """The manifest, with what the schedule has done so far."""
        if self.schedule is None:
            return self.manifest
        return replace(self.manifest, schedule=self.manifest.schedule | self.schedule.record(self._steps_of_weights()))

    def _steps_of_weights(self) -> int:
        """Steps that the weights in the model have taken: those of the best checkpoint once it has been loaded."""
        state = self.state
        is_best = self.args.load_best_model_at_end and not self.is_in_train and state.best_model_checkpoint
        return state.best_global_step if is_best else state.global_step

    def finished_manifest(self, manifest: Manifest) -> Manifest:
        """A manifest that counts what the schedule never trained as frozen, with the checksums of the base."""
        trained, units = self.schedule.ever_trained(self._steps_of_weights()), self.selection.anatomy.units
        touched = {name for unit in units if unit.name in trained for name in unit.parameters} | trained
        never = [name for name in manifest.trained_parameters if name not in touched]
        names = [unit.name for unit in units]
        return replace(
            manifest,
            trained_units=[name for name in names if name in trained],
            frozen_units=[name for name in names if name not in trained],
            counts={
                block: [sum(unit.name in trained for unit in units if unit.block == block), total]
                for block, (_, total) in manifest.counts.items()
            },
            trained_parameters=[name for name in manifest.trained_parameters if name in touched],
            frozen_checksums=manifest.frozen_checksums | {name: self._base_checksums[name] for name in never},
        )

    def _moved(self) -> list[str]:
        """The frozen parameters that differ, in memory, from the base; every process takes part under FSDP2."""
        parameters, dtypes, moved = dict(self.model.named_parameters()), self._stored_dtypes, []
        for name in self.selection.frozen_parameters:
            value = whole(parameters[name].detach()).to(dtypes.get(name, self._config_dtype))
            if is_main() and checksum(value) != self.manifest.frozen_checksums[name]:
                moved.append(name)
        return moved

    def _checksums(self, model: PreTrainedModel, names: list[str]) -> dict[str, str]:
        """Checksums of parameters, or of their frozen elements, in the dtypes they are stored in."""
        if not is_main():
            return {}
        parameters, masks, dtypes = dict(model.named_parameters()), self.selection.frozen_masks, self._stored_dtypes
        values = {name: frozen_values(parameters[name], masks.get(name)) for name in names}
        return {name: checksum(value.to(dtypes.get(name, model.dtype))) for name, value in values.items()}


def loaded(model: PreTrainedModel | str, args: TrainingArguments) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """A model that is not quantized, and the dtype in which each of its parameters is stored.

    Raises:
        HFTError: it is quantized, or cannot be loaded.
    """
    if isinstance(model, str):
        model, stored = load_base(model, args)
    else:
        stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if getattr(model.config, "quantization_config", None) is not None:
        raise HFTError("the model is quantized; half fine-tuning trains the weights themselves, give the original")
    return model, stored


def check_zero3(selection: Selection, *, save_only_trained: bool) -> None:
    """Refuse what only the other engines can do.

    Raises:
        HFTError: masks of elements, or `save_only_trained`.
    """
    if selection.frozen_masks:
        raise HFTError(
            "ZeRO-3 holds parameters flat and in parts, where masks of elements do not fit; launch with "
            "recipes/accelerate/fsdp2.yaml"
        )
    if save_only_trained:
        raise HFTError("save_only_trained goes with FSDP2 and DDP, not with ZeRO-3; leave it out")


def check_deepspeed(config: dict[str, Any]) -> None:
    """Refuse a DeepSpeed config that would round the frozen half or could not write the model.

    Raises:
        HFTError: it is another stage than ZeRO-3, or half precision is not left to torch's autocast.
    """
    zero, ours = config.get("zero_optimization", {}), "take recipes/accelerate/zero3.json"
    if zero.get("stage") != 3:
        raise HFTError(f"of DeepSpeed only ZeRO-3 is supported, which shards the frozen half too; {ours}")
    if any(config.get(key, {}).get("enabled") for key in ("bf16", "fp16")):
        raise HFTError(f"DeepSpeed's bf16 and fp16 would convert the frozen half; {ours}, with torch_autocast")
    if not config.get("torch_autocast", {}).get("enabled"):
        raise HFTError(f"without torch_autocast fp32 master weights and the frozen half do not multiply; {ours}")
    if not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise HFTError(f"without stage3_gather_16bit_weights_on_model_save no model would be written; {ours}")


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Refuse arguments of a trainer that would escape the selection.

    Raises:
        HFTError: an adapter's config, or a built optimizer.
    """
    if kwargs.get("peft_config") is not None:
        raise HFTError("peft_config and half fine-tuning exclude each other: adapters freeze the whole base")
    if (kwargs.get("optimizers") or (None, None))[0] is not None:
        raise HFTError("give optimizer settings, not a built optimizer: it must be built after the freezing")


def check_stored_as_computed(base: str, revision: str | None, names: Iterable[str]) -> None:
    """Refuse to save a part of a model whose files name its tensors otherwise than transformers computes with them.

    Raises:
        HFTError: they do, so that what trained could not be put back into the base.
    """
    stored = Weights(local_folder(base, revision))
    if missing := [name for name in names if name not in stored]:
        raise HFTError(
            f"{base} does not store {missing[0]} under that name (as mixtures of experts and GPT-NeoX do not), so what "
            "trained could not be put back into it; leave out save_only_trained"
        )


def keys_of(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """The keys of some parameters in a model's state dict, where tied ones have one each."""
    parameters = dict(model.named_parameters())
    meant = {id(parameters[name]) for name in names}
    return {key for key, p in model.named_parameters(remove_duplicate=False) if id(p) in meant}


class PartFreezing(TrainerCallback):
    """Keeps the frozen elements of partly frozen parameters in place while a run trains."""

    def __init__(self, selection: Selection, dtypes: dict[str, torch.dtype]):
        self.selection, self.dtypes = selection, dtypes

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.freezer = PartFreezer(model, self.selection.frozen_masks, self.dtypes)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.freezer.restore()

    def on_train_end(self, args, state, control, **kwargs):
        self.freezer.remove()


class FreezeCheck(TrainerCallback):
    """Checks, once the engine has prepared the model, that what should be frozen is, and that the rest trains."""

    def __init__(self, selection: Selection):
        self.selection = selection

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        check_frozen(model, self.selection)
