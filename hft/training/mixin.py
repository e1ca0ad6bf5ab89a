"""What half fine-tuning adds to a TRL trainer: freeze, hold masters, write manifests, refuse a wrong resume."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, TrainerCallback, TrainingArguments

from hft.errors import HFTError
from hft.freezing import PartFreezer, freeze, upcast
from hft.machine import is_main, is_sharded
from hft.methods.callback import Schedule, prepare
from hft.methods.schedule import ScheduleConfig, check_schedule
from hft.methods.updates import UpdateConfig, callbacks_of, starting_weights
from hft.model.anatomy import anatomy_of, architecture_of, meta_model
from hft.model.weights import Weights, cast_weights, checksum, local_folder, widest
from hft.record.manifest import Manifest
from hft.runs.folder import CHECKPOINT
from hft.selection import Selection, SelectionConfig, select
from hft.selection.masks import save_masks
from hft.training.recorded import Recorded


class HalfFineTuning(Recorded):
    """Mixin that makes a TRL trainer train one selection of the model's units and leave the rest as it was.

    To be listed before the trainer class. Everything else of the trainer stays TRL's: with nothing frozen, it takes
    the same steps.

    Args:
        model: path or Hub id of the base, loaded in the dtype its weights are stored in, or a loaded model.
        args: the trainer's own config.
        selection: which units train, or the config to make it from; by default the paper's HFT.
        update: how the trained weights move; by default as the optimizer says.
        schedule: how that changes while the run goes on; by default it does not.
        kwargs: whatever else the trainer takes.

    Raises:
        HFTError: `peft_config` or a ready-made optimizer is given, since both would escape the selection, or the
            model is quantized, of an unknown family, or sharded in a way that cannot hold a half-frozen layer.
    """

    def __init__(
        self,
        model,
        args,
        *,
        selection: Selection | SelectionConfig | None = None,
        update: UpdateConfig | None = None,
        schedule: ScheduleConfig | None = None,
        **kwargs,
    ):
        check_arguments(kwargs)
        schedule = schedule or ScheduleConfig()
        if schedule.schedule != "none":
            prepare(args)

        update = update or UpdateConfig()
        update.check(args)

        if isinstance(model, str):
            model, stored = load_base(model, args)
        else:
            stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
        if getattr(model.config, "quantization_config", None) is not None:
            raise HFTError("the model is quantized; half fine-tuning trains the weights themselves, give the original")

        if not isinstance(selection, Selection):
            selection = select(anatomy_of(model), selection or SelectionConfig())
        check_schedule(selection, schedule)
        self.selection = selection
        freeze(model, selection)
        revision = (getattr(args, "model_init_kwargs", None) or {}).get("revision")
        checksums = self._checksums(model, stored, [*selection.frozen_parameters, *selection.frozen_masks])
        self.manifest = Manifest.of(
            selection,
            model.config._name_or_path,
            checksums,
            revision=revision,
            update=update.record(),
            schedule=schedule,
        )
        self.schedule = Schedule(selection, schedule) if schedule.schedule != "none" else None
        if self.schedule is not None:
            # What the schedule never gets to is bit-identical to the base at the end, and can be proved to be.
            self._base_checksums = self._checksums(model, stored, selection.trained_parameters)
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), self.schedule]
        self._stored_dtypes = stored
        self._config_dtype = model.dtype
        start = starting_weights(model, self.selection.anatomy, update)
        super().__init__(model=model, args=args, **self.with_masters(model, args, kwargs))
        for callback in callbacks_of(update, start):
            self.add_callback(callback)
        if self.selection.frozen_masks:  # last, since it puts back what any other has moved
            self.add_callback(PartFreezing(self.selection, stored))

        if self.is_deepspeed_enabled:
            raise HFTError("DeepSpeed is not supported; shard with FSDP2 (recipes/accelerate/fsdp2.yaml)")
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise HFTError("FSDP1 cannot mix frozen and trained parameters in a layer; set fsdp_version: 2")
        if self.selection.config.freeze_embeddings and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            # Reentrant checkpointing finds no gradient to pass on when nothing before the first layer has one.
            self.model.enable_input_require_grads()

    def with_masters(self, model: PreTrainedModel, args: TrainingArguments, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Give the trained half its fp32 masters, just before TRL's own constructor sees the model.

        Returns:
            The remaining arguments of TRL's constructor.
        """
        if not is_sharded(args):  # accelerate upcasts the trained parameters of an FSDP2 model itself
            upcast(model, autocast=args.bf16 or args.fp16)
        return kwargs

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with its manifest, the frozen tensors bit for bit those of the base.

        A `checkpoint-N` folder keeps the fp32 masters of the trained half, so that a resumed run goes on exactly;
        anywhere else the trained half too is written in the dtypes of the base.
        """
        folder = Path(output_dir or self.args.output_dir)
        super().save_model(str(folder), _internal_call)
        if not self.args.should_save:
            return
        manifest, dtypes = self.manifest_so_far(), self._stored_dtypes
        others = (self._config_dtype, self.model.state_dict().keys())
        if folder.parent == Path(self.args.output_dir) and CHECKPOINT.fullmatch(folder.name):
            whole = self.manifest.frozen_checksums.keys() - self.manifest.masks.keys()
            dtypes, others = {name: dtypes[name] for name in whole if name in dtypes}, None
        elif self.schedule is not None:
            manifest = self.finished_manifest(manifest)
        cast_weights(folder, dtypes, others)
        config = copy.deepcopy(self.model.config)
        config.dtype = self._config_dtype  # not that of the masters
        config.save_pretrained(folder)
        manifest.save(folder)
        save_masks(folder, self.selection.frozen_masks)

    def manifest_so_far(self) -> Manifest:
        """The manifest, with what the schedule has done so far."""
        if self.schedule is None:
            return self.manifest
        return replace(self.manifest, schedule=self.manifest.schedule | self.schedule.record(self.state.global_step))

    def finished_manifest(self, manifest: Manifest) -> Manifest:
        """A manifest that counts what the schedule never trained as frozen, with the checksums of the base."""
        trained, units = self.schedule.ever_trained(), self.selection.anatomy.units
        touched = {name for unit in units if unit.name in trained for name in unit.parameters} | trained
        never = [name for name in manifest.trained_parameters if name not in touched]
        names = [unit.name for unit in units]
        return replace(
            manifest,
            trained_units=[name for name in names if name in trained],
            frozen_units=[name for name in names if name not in trained],
            trained_parameters=[name for name in manifest.trained_parameters if name in touched],
            frozen_checksums=manifest.frozen_checksums | {name: self._base_checksums[name] for name in never},
        )

    def _checksums(self, model: PreTrainedModel, stored: dict[str, torch.dtype], names: list[str]) -> dict[str, str]:
        if not is_main():
            return {}
        parameters = dict(model.named_parameters())
        values = {name: parameters[name] for name in names}
        for name, mask in self.selection.frozen_masks.items():
            if name in values:
                values[name] = values[name][mask.tensor().expand(values[name].shape)]
        return {name: checksum(value.to(stored.get(name, model.dtype))) for name, value in values.items()}


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Refuse arguments of a trainer that would escape the selection.

    Raises:
        HFTError: an adapter's config, or an optimizer that is built already.
    """
    if kwargs.get("peft_config") is not None:
        raise HFTError("peft_config and half fine-tuning exclude each other: adapters freeze the whole base")
    if (kwargs.get("optimizers") or (None, None))[0] is not None:
        raise HFTError("give optimizer settings, not a built optimizer: it must be built after the freezing")


class PartFreezing(TrainerCallback):
    """Holds the frozen scalars of partly frozen parameters in place for as long as a run trains."""

    def __init__(self, selection: Selection, dtypes: dict[str, torch.dtype]):
        self.selection, self.dtypes = selection, dtypes

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.freezer = PartFreezer(model, self.selection.frozen_masks, self.dtypes)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.freezer.restore()

    def on_train_end(self, args, state, control, **kwargs):
        self.freezer.remove()


def load_base(name: str, args: TrainingArguments, **more: Any) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """Load a base in the dtype that its weights are stored in, whatever its config says.

    Args:
        name: path or Hub id.
        args: `model_init_kwargs` go to `from_pretrained`; a `dtype` among them wins.
        more: goes to `from_pretrained` too.

    Returns:
        The model, and the dtype on disk of each of its parameters. Tensors that are none, such as the fp32
        `rotary_emb.inv_freq` in Llama-2's files, have no say in it. Parameters that are stored in another form, such
        as experts one by one, have the widest dtype on disk.
    """
    init_kwargs = (args.model_init_kwargs or {}) | more
    folder = local_folder(name, init_kwargs.get("revision"))
    config = AutoConfig.from_pretrained(folder)
    parameters = dict(meta_model(config).named_parameters())
    on_disk = Weights(folder).dtypes()
    stored = {name: dtype for name, dtype in on_disk.items() if name in parameters}
    other_form = parameters.keys() - stored.keys()
    needed = widest((on_disk if other_form else stored).values())
    stored |= dict.fromkeys(other_form, needed)
    asked = init_kwargs.setdefault("dtype", needed)
    asked = getattr(torch, asked, needed) if isinstance(asked, str) else asked
    if torch.promote_types(asked, needed) != asked:
        raise HFTError(f"dtype {asked} would round the base, which is stored in {needed}; leave it out")
    return architecture_of(config).from_pretrained(name, **init_kwargs), stored
