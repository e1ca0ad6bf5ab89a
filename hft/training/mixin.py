"""What half fine-tuning adds to a TRL trainer: freeze, hold masters, write manifests, refuse a wrong resume."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hft.anatomy import anatomy_of
from hft.errors import HFTError
from hft.folders import last_checkpoint
from hft.freezing import freeze, upcast
from hft.planning import peak_memory
from hft.selection import Manifest, SelectionConfig, select
from hft.weights import Weights, cast_weights, checksum, local_folder


class HalfFineTuning:
    """Mixin that makes a TRL trainer train one selection of the model's units and leave the rest as it was.

    To be listed before the trainer class. Everything else of the trainer stays TRL's: with nothing frozen, it takes
    the same steps.

    Args:
        model: path or Hub id of the base, loaded in the dtype its weights are stored in, or a loaded model.
        args: the trainer's own config.
        selection: which units train; by default the paper's HFT.
        kwargs: whatever else the trainer takes.

    Raises:
        HFTError: `peft_config` or a ready-made optimizer is given, since both would escape the selection, or the
            model is quantised, of an unknown family, or sharded in a way that cannot hold a half-frozen layer.
    """

    def __init__(self, model, args, *, selection: SelectionConfig | None = None, **kwargs):
        if kwargs.get("peft_config") is not None:
            raise HFTError("peft_config and half fine-tuning exclude each other: adapters freeze the whole base")
        if (kwargs.get("optimizers") or (None, None))[0] is not None:
            raise HFTError("give optimizer settings, not a built optimizer: it must be built after the freezing")

        stored = None
        if isinstance(model, str):
            init_kwargs = dict(args.model_init_kwargs or {})
            weights = Weights(local_folder(model, init_kwargs.get("revision")))
            stored = weights.dtypes()
            init_kwargs.setdefault("dtype", str(weights.widest_dtype()).removeprefix("torch."))
            args.model_init_kwargs = init_kwargs
        super().__init__(model=model, args=args, **kwargs)

        if getattr(self.model.config, "quantization_config", None) is not None:
            raise HFTError("the model is quantised; half fine-tuning trains the weights themselves, give the original")
        if self.is_deepspeed_enabled:
            raise HFTError("DeepSpeed is not supported; shard with FSDP2 (recipes/accelerate/fsdp2.yaml)")
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise HFTError("FSDP1 cannot mix frozen and trained parameters in a layer; set fsdp_version: 2")

        self.selection = select(anatomy_of(self.model), selection or SelectionConfig())
        self._stored_dtypes = stored or {name: p.dtype for name, p in self.model.named_parameters()}
        self._config_dtype = self.model.dtype
        freeze(self.model, self.selection)
        self.manifest = Manifest.of(self.selection, self._base_name(model), self._frozen_checksums())
        if not self.is_fsdp_enabled:  # accelerate upcasts the trained parameters of an FSDP2 model itself
            upcast(self.model, autocast=args.bf16 or args.fp16)
        if self.selection.config.freeze_embeddings and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            # Reentrant checkpointing finds no gradient to pass on when nothing before the first layer has one.
            self.model.enable_input_require_grads()

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train, from a checkpoint if one is given; `True` takes the last whole one of the output folder.

        Raises:
            HFTError: the checkpoint was trained with another selection or base.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint and self.is_world_process_zero():
            self.manifest.check_resumable(Manifest.load(resume_from_checkpoint), resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with its manifest.

        A `checkpoint-N` folder keeps the fp32 masters of the trained half, so that a resumed run goes on exactly;
        anywhere else the model is written in the dtypes of the base, its frozen tensors bit for bit.
        """
        folder = Path(output_dir or self.args.output_dir)
        super().save_model(str(folder), _internal_call)
        if not self.args.should_save:
            return
        if not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            cast_weights(folder, self._stored_dtypes)
        config = copy.deepcopy(self.model.config)
        config.dtype = self._config_dtype
        config.save_pretrained(folder)
        self.manifest.save(folder)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the peak memory so far."""
        logs["peak_memory_gb"] = round(peak_memory() / 1e9, 2)
        super().log(logs, start_time)

    def _base_name(self, model) -> str:
        return model if isinstance(model, str) else model.config._name_or_path

    def _frozen_checksums(self) -> dict[str, str]:
        if not self.is_world_process_zero():
            return {}
        parameters = dict(self.model.named_parameters())
        dtypes = self._stored_dtypes
        return {
            name: checksum(parameters[name].detach().to(dtypes.get(name, parameters[name].dtype)))
            for name in self.selection.frozen_parameters
        }
