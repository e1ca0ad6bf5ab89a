"""TRL's trainers with one of PEFT's adapters on a base that is frozen whole."""

from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

from hft.freezing import upcast
from hft.machine import is_main
from hft.methods.adapter import Adapter, freeze_ranknum
from hft.model.load import load_base
from hft.model.weights import checksum, local_folder, weights_of
from hft.record.checkpoints import is_checkpoint
from hft.record.manifest import Manifest
from hft.training.base import ManifestMixin
from hft.training.callbacks import CheckpointedLayers, HoldToPlan
from hft.training.reference import has_reference

STATE_NAME = "training_state.safetensors"  # in a checkpoint, beside PEFT's own files: everything that trains


class AdapterTuning(ManifestMixin):
    """Mixin that makes a TRL trainer train an adapter; the model itself is frozen whole.

    `model` is the path or Hub id of the base, loaded in the dtype its weights are stored in, or in 4 bits for QLoRA.
    """

    def __init__(self, model: str, args: TrainingArguments, *, adapter: Adapter, **kwargs):
        self.check(args, adapter)
        self.adapter = adapter
        self._checkpointing_off = args.activation_checkpointing and not adapter.keeps_checkpointing
        if self._checkpointing_off:
            args.gradient_checkpointing = args.activation_checkpointing = False  # transformers is renaming it

        base, _ = load_base(model, args, adapted=True, **adapter.load_kwargs(args))
        for module in base.modules():  # bitsandbytes (0.50) would repack 4-bit weights on a CPU, and round their scales
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        base.requires_grad_(False)
        if adapter.upcasts_base:
            upcast(base, autocast=args.bf16 or args.fp16)
        revision, checksums = (args.model_init_kwargs or {}).get("revision"), {}
        if is_main():  # of the tensors as the base's files have them, whatever they become in memory
            names = [name for name, _ in base.named_parameters()]
            weights = weights_of(local_folder(model, revision), names)
            checksums = {name: checksum(weights[name]) for name in tqdm(names, desc="hashing the base", leave=False)}
        self.manifest = Manifest.of(adapter.footprint(base.config), model, checksums, revision=revision)

        super().__init__(model=base, args=args, peft_config=adapter.peft_config(), **kwargs)
        freeze_ranknum(self.model)
        upcast(self.model, autocast=args.bf16 or args.fp16)  # TRL gives QLoRA's adapters bf16
        config = self.model.peft_config[self.model.active_adapter]
        config.base_model_name_or_path, config.revision = self.manifest.base, revision
        self._before = self._checksums()
        hold = HoldToPlan(self, None, {}, acts=adapter.acts_around_step)
        for callback in [hold, *adapter.callbacks(self.model), RestoreAdapter(self), CheckpointedLayers()]:
            self.add_callback(callback)

    def notes(self) -> list[str]:
        notes = ["reference: the base itself, its adapter switched off"] if has_reference(self.args) else []
        if self._checkpointing_off:
            notes.append("activation checkpointing is off: it would drop the prefix, which reaches layers as a cache")
        return notes

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, and in training what the adapter adds to it."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        extra = self.adapter.extra_loss(self.model) if self.model.training else None
        if extra is not None:
            # Where the loss is a mean over the tokens of the whole step, Trainer leaves the micro-batches to us.
            loss = loss + extra / (self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a standard PEFT folder with its manifest; in a checkpoint also what an exact resume needs."""
        folder = Path(output_dir or self.args.output_dir)
        checkpoint = is_checkpoint(folder, self.args.output_dir)
        with self.adapter.saving_checkpoint(self.model) if checkpoint else nullcontext():
            super().save_model(str(folder), _internal_call)
        if not self.args.should_save:
            return
        if checkpoint:
            trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
            state = [*trained, *self.adapter.state(self.model)]
            save_file({name: tensor.detach().contiguous() for name, tensor in state}, folder / STATE_NAME)
        self.manifest.moved = [name for name, now in self._checksums().items() if now != self._before[name]]
        self.manifest.save(folder)
        self.write_card(folder, self._tag_names)  # instead of PEFT's, which names the base by its path

    def _checksums(self) -> dict[str, str]:
        parameters = list(self.model.named_parameters()) if is_main() else []
        return {name: checksum(p) for name, p in tqdm(parameters, desc="hashing the model in memory", leave=False)}


class RestoreAdapter(TrainerCallback):
    """Restores what trained before the first step, bit for bit; PEFT's own files do not hold AdaLoRA's scores."""

    def __init__(self, trainer: AdapterTuning):
        self.trainer = trainer

    @torch.no_grad()
    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.resumed_from:
            saved = load_file(Path(trainer.resumed_from) / STATE_NAME)
            parameters = dict(trainer.model.named_parameters())
            for name in saved.keys() & parameters.keys():
                parameters[name].copy_(saved.pop(name))
            trainer.adapter.restore(trainer.model, saved)
