"""What half fine-tuning adds to a TRL trainer: freezing, fp32 master weights, manifests, exact saves."""

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINING_ARGS_NAME
from trl import RewardTrainer

from hft.errors import HFTError
from hft.freezing import autocast_experts, freeze, whole
from hft.machine import is_main, is_sharded, is_zero3
from hft.methods.callback import ScheduleCallback
from hft.methods.schedule import Schedule
from hft.methods.update import Update
from hft.model.anatomy import anatomy_of
from hft.model.load import load_base
from hft.model.weights import MODEL_CONFIG, Weights, checksum
from hft.parts import checkpoint_name, join, joined, split, stored
from hft.record.checkpoints import is_checkpoint
from hft.record.identity import cannot_resume
from hft.record.manifest import Manifest
from hft.selection import Selection, SelectionConfig, select
from hft.selection.masks import frozen_values, save_masks
from hft.training.base import ManifestMixin
from hft.training.callbacks import CheckpointedLayers, HoldToPlan
from hft.training.engines import EngineQuirks, autocast_decoder, check_engine, check_selection, upcast_for
from hft.training.reference import has_reference, reference_bytes, reference_to_share, share_frozen


class HalfFineTuning(EngineQuirks, ManifestMixin):
    """Mixin that makes a TRL trainer train one selection of the model's units and leave the rest as it was.

    `half(TrainerClass)` lists it before the trainer class. Everything else of the trainer stays TRL's: with nothing
    frozen, it takes the same steps. A reference model shares the frozen half with the policy, unless one is given or
    the model is sharded.

    Args:
        model: path or Hub id of the base, loaded in the dtype its weights are stored in, or a loaded model.
        args: the trainer's own config.
        selection: which units train, or the config to make it from; by default the paper's HFT.
        update: changes to the trained weights around the optimizer's step; by default none.
        schedule: which units train when; by default those of the selection in every step.
        save_only_trained: save models and checkpoints without frozen tensors and elements; `hft merge --method delta`
            adds them back from the base.
        kwargs: whatever else the trainer takes, by name.

    Raises:
        HFTError: `peft_config` or a built optimizer is given, since both would escape the selection, or the model is
            quantized, of an unknown family, or sharded in a way that cannot hold a half-frozen layer.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TrainingArguments,
        *,
        selection: Selection | SelectionConfig | None = None,
        update: Update | None = None,
        schedule: Schedule | None = None,
        save_only_trained: bool = False,
        **kwargs: Any,
    ):
        check_arguments(args, kwargs)
        self.check(args, update, schedule)
        if schedule:  # what it freezes at a step is an unused parameter to DDP
            args.ddp_find_unused_parameters = True
        if is_zero3(args):  # transformers would partition, while it loads, what is to be frozen and checked whole
            unset_hf_deepspeed_config()
        model, self._stored_dtypes = loaded(model, args, rewards=isinstance(self, RewardTrainer))
        self._config_dtype = model.dtype
        if not isinstance(selection, Selection):
            selection = select(anatomy_of(model), selection or SelectionConfig())
        self.selection = selection
        check_selection(args, model.config, selection, save_only_trained=save_only_trained)
        freeze(model, selection)
        self._record(model, args, update, schedule)
        if save_only_trained and (selection.frozen_parameters or selection.frozen_masks):
            self.manifest.only_trained = True
            # transformers' own list; on a resume Trainer takes these, and only these, as rightly missing.
            frozen = {id(model.get_parameter(name)) for name in selection.frozen_parameters}  # tied: several keys each
            parameters = model.named_parameters(remove_duplicate=False)
            model._keys_to_ignore_on_save |= {key for key, parameter in parameters if id(parameter) in frozen}

        if schedule:  # now, since Trainer's constructor collects what a checkpoint keeps of callbacks
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), self.schedule]
        autocast, sharded, given = args.bf16 or args.fp16, is_sharded(args), kwargs.get("ref_model")
        takes_reference = "ref_model" in inspect.signature(super().__init__).parameters
        takes_reference &= getattr(args, "kl_to_base", 1) > 0
        if takes_reference and not (sharded or given or getattr(args, "precompute_ref_log_probs", 0)):
            kwargs["ref_model"] = reference_to_share(model, selection.frozen_masks)
        if autocast and not sharded:
            autocast_experts(model)
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        split(model, selection.frozen_masks, whole_states=not sharded)
        if selection.frozen_masks:  # DDP would send their masks before each forward pass
            args.ddp_broadcast_buffers = False
        callbacks = update.callbacks(model, selection.anatomy) if update else []  # before the upcast: the base's values
        upcast_for(model, args)
        super().__init__(model=model, args=args, **kwargs)
        if not (sharded or given) and getattr(self, "ref_model", None) is not None:
            share_frozen(self.ref_model, self.model, dtypes, autocast=autocast)
        autocast_decoder(self.model, args)
        self.act_last = callbacks
        acts = bool(schedule or (update and update.acts_around_step))
        hold = HoldToPlan(self, None if schedule else selection, self._stored_dtypes, acts=acts)
        for callback in [hold, CheckpointedLayers(), *self.act_last]:
            self.add_callback(callback)
        check_engine(self)
        freezes_input = next(iter(selection.anatomy.embeddings)) in selection.frozen_parameters
        if freezes_input and (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            # Reentrant checkpointing finds no gradient to pass on when nothing before the first layer has one.
            self.model.enable_input_require_grads()

    def notes(self) -> list[str]:
        """Which reference the trainer has and what it takes."""
        if not has_reference(self.args):
            return []
        if self.ref_model is None:
            return ["reference: its log-probabilities are computed beforehand, no model is kept"]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return ["reference: a full copy, sharded by TRL"]
        full = sum(parameter.nbytes for parameter in self.ref_model.parameters())
        return [
            f"reference: shares the frozen half with the policy; {reference_bytes(self) / 1e9:.2f} GB "
            f"instead of {full / 1e9:.2f} GB"
        ]

    def _record(self, model, args, update: Update | None, schedule: Schedule | None) -> None:
        selection = self.selection
        if schedule:
            schedule.check(selection)
            self.schedule = ScheduleCallback(selection, schedule)
            # What the schedule never trains is bit-identical to the base at the end, and can be proved to be.
            self._base_checksums = self._checksums(model, selection.trained_parameters)
        self.manifest = Manifest.of(
            selection,
            model.config.name_or_path,
            self._checksums(model, [*selection.frozen_parameters, *selection.frozen_masks]),
            revision=(getattr(args, "model_init_kwargs", None) or {}).get("revision"),
            update=update.record() if update else {"update": "plain"},
            schedule={"config": schedule.record()} if schedule else {},
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save each tensor in the dtype it has on disk; nothing public lies between gathering and writing them.

        Trainer would save experts under the names of the base's files, and find none of them on a resume.
        """
        if not self.args.should_save:
            return
        state = joined(self.model, self.model.state_dict() if state_dict is None else state_dict)
        folder, dtypes = Path(output_dir or self.args.output_dir), self._stored_dtypes
        if resumable := is_checkpoint(folder, self.args.output_dir):  # what trains, also in part, stays fp32 masters
            frozen = self.manifest.frozen_checksums.keys() - self.manifest.masks.keys()
            dtypes = {name: dtype for name, dtype in dtypes.items() if name in frozen}
        if self.manifest.only_trained:
            state |= {name: frozen_values(state[name], ~mask) for name, mask in self.selection.frozen_masks.items()}
        state, like_base = cast(state, self.model, dtypes), not (resumable or self.manifest.only_trained)
        self.model.save_pretrained(folder, state_dict=state, save_original_format=like_base)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with its manifest, the frozen tensors bit for bit those of the base.

        A `checkpoint-N` folder keeps the fp32 masters of the trained half, for an exact resume; anywhere else all is in
        the dtypes of the base. With `save_only_trained` what is frozen is compared in memory, and not written.
        """
        folder = Path(output_dir or self.args.output_dir)
        is_final = not is_checkpoint(folder, self.args.output_dir)
        if self.manifest.only_trained and is_final:
            now = self._checksums(self.model, [*self.selection.frozen_parameters, *self.selection.frozen_masks])
            self.manifest.moved = [name for name in now if now[name] != self.manifest.frozen_checksums[name]]
        super().save_model(str(folder), _internal_call)
        if not self.args.should_save:
            return
        manifest = self.manifest_so_far()
        if is_final and self.schedule is not None:
            trained = self.schedule.ever_trained(self._steps_of_weights())
            manifest = manifest.finished(self.selection.anatomy.units, trained, self._base_checksums)
        config = copy.deepcopy(self.model.config)
        config.dtype = self._config_dtype  # not that of the master weights
        config.save_pretrained(folder)
        if manifest.only_trained:
            (folder / "config.json").replace(folder / MODEL_CONFIG)
        manifest.save(folder)
        save_masks(folder, self.selection.frozen_masks)

    def check_resumable(self, checkpoint: str) -> None:
        super().check_resumable(checkpoint)
        saved = Weights(checkpoint)
        missing = [name for name in self.selection.trained_parameters if name not in saved]
        if missing and not is_sharded(self.args):
            why = f"an earlier version of hft saved {missing[0]} there under another name, which Trainer does not find"
            raise cannot_resume(checkpoint, why)

    def _checksums(self, model: PreTrainedModel, names: list[str]) -> dict[str, str]:
        """Checksums of parameters or of their frozen elements as they are stored, in the first process."""
        parameters, masks, checksums = stored(model), self.selection.frozen_masks, {}
        for name in names:
            value = whole(parameters[name].detach())  # from all processes
            if is_main():
                dtype = self._stored_dtypes.get(name, self._config_dtype)
                checksums[name] = checksum(frozen_values(value, masks.get(name)).to(dtype))
        return checksums


def loaded(
    model: PreTrainedModel | str, args: TrainingArguments, *, rewards: bool
) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """A model, with the head of one that rewards if asked for, and the dtype of each tensor on disk."""
    if isinstance(model, str):
        head = {"auto_class": AutoModelForSequenceClassification, "num_labels": 1} if rewards else {}
        model, stored = load_base(model, args, **head)
    else:
        join(model)  # what an earlier run has split
        stored = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if getattr(model.config, "quantization_config", None) is not None:
        raise HFTError("the model is quantized, but half fine-tuning trains its weights; give the original model")
    return model, stored


def check_arguments(args: TrainingArguments, kwargs: dict[str, Any]) -> None:
    """Refuse arguments of a trainer that would escape the selection."""
    if not isinstance(args, TrainingArguments):
        raise HFTError("give the trainer's config as args, and its other arguments by name")
    if kwargs.get("peft_config") is not None:
        raise HFTError("remove peft_config: adapters freeze the whole base, half fine-tuning trains half of it")
    if (kwargs.get("optimizers") or (None, None))[0] is not None:
        raise HFTError("give optimizer settings, not a built optimizer: it must be built after the freezing")


def cast(
    state: dict[str, torch.Tensor], model: PreTrainedModel, dtypes: dict[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """A state dict whose parameters have the dtypes given by name; tied ones stay one tensor under several keys."""
    names = {id(parameter): checkpoint_name(name) for name, parameter in model.named_parameters()}
    keys = {checkpoint_name(key): names[id(p)] for key, p in model.named_parameters(remove_duplicate=False)}
    made: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        name = keys.get(key, key)
        if name not in made:
            wanted = dtypes.get(name, tensor.dtype)
            made[name] = tensor if tensor.dtype == wanted else tensor.to(wanted).cpu()
    return {key: made[keys.get(key, key)] for key in state}
