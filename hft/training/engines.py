"""What FSDP2 and ZeRO-3 ask of a trainer whose model is half frozen."""

from types import MethodType

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from hft.errors import HFTError
from hft.freezing import HALF_PRECISION, upcast
from hft.machine import is_sharded, is_zero3
from hft.record.manifest import Manifest
from hft.selection import Selection

# Optimizers that look at single elements; bitsandbytes has the last two, whose 8-bit ones scale blocks of elements.
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "paged_adamw_32bit", "lion_32bit")


class EngineQuirks:
    """Mixin of a TRL trainer with a `schedule`, if any, and `resumed_from`."""

    def create_accelerator_and_postprocess(self) -> None:
        """Under FSDP2 keep losses and the reduction of gradients in fp32, as under DDP.

        accelerate's own policy is bf16 throughout: at |logp| above 512 sums move in steps of 4.
        """
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            compute = plugin.mixed_precision_policy.param_dtype
            plugin.mixed_precision_policy = MixedPrecisionPolicy(compute, torch.float32, torch.float32)

    def compute_loss_context_manager(self):
        """Evaluate in autocast under ZeRO-3 too, which only DeepSpeed's engine enters: Trainer calls the bare model."""
        contexts = super().compute_loss_context_manager()
        if self.is_deepspeed_enabled and not self.model.training:
            dtype = self.accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"].get("dtype", "bfloat16")
            contexts.enter_context(torch.autocast(self.args.device.type, getattr(torch, dtype)))
        return contexts

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Before FSDP2 loads the optimizer's state, let only what has a state under a schedule require a gradient.

        `ScheduleCallback` takes all parameters up again when the training begins.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.resumed_from and self.schedule and self.is_fsdp_enabled:
            names = self.schedule.have_state(Manifest.load(self.resumed_from).schedule["history"])
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(name in names)
        return scheduler


def upcast_for(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Give the trained half its fp32 master weights; accelerate does so under FSDP2 in half precision."""
    if is_zero3(args):
        upcast(model, autocast=True)
    elif not is_sharded(args) or not (args.bf16 or args.fp16):
        upcast(model, autocast=args.bf16 or args.fp16)


def autocast_decoder(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Let the decoder compute under autocast where TRL's distillation (1.16) calls it past the model's forward."""
    mixed = any(parameter.dtype in HALF_PRECISION for parameter in model.parameters())
    if not mixed or not (args.bf16 or args.fp16) or is_sharded(args):
        return
    decoder, dtype = model.base_model, torch.bfloat16 if args.bf16 else torch.float16
    # A bound method, since a copy of the model binds it to its own decoder.
    decoder.forward = MethodType(torch.autocast(args.device.type, dtype)(decoder.forward.__func__), decoder)


def check_selection(
    args: TrainingArguments, model_config: PretrainedConfig, selection: Selection, *, save_only_trained: bool
) -> None:
    """Refuse what cannot hold parameters that train in part, and what ZeRO-3 cannot save."""
    if save_only_trained and is_zero3(args):
        raise HFTError("save_only_trained works with FSDP2 and DDP, not with ZeRO-3; remove it")
    if not (masks := selection.frozen_masks):
        return
    if is_zero3(args):
        raise HFTError("ZeRO-3 flattens and splits parameters, so it cannot apply elementwise masks; launch with FSDP2")
    if getattr(args, "use_vllm", False):
        raise HFTError("vLLM needs whole weights, and some train in part; remove use_vllm, or select whole tensors")
    if args.optim.value not in ELEMENTWISE:
        others = f"set optim to one of {', '.join(ELEMENTWISE)}, or select whole tensors"
        raise HFTError(f"{min(masks)} trains in part, and {args.optim.value} is not elementwise; {others}")
    tied = model_config.get_text_config().tie_word_embeddings and masks.keys() & selection.anatomy.embeddings
    if tied and is_sharded(args):
        raise HFTError("FSDP2 cannot shard tied embeddings that train in part; launch with --engine ddp")


def check_engine(trainer: Trainer) -> None:
    """Refuse an engine that cannot hold a half-frozen layer, would round it, or could not write the model."""
    engine = trainer.accelerator.state
    if trainer.is_fsdp_enabled:
        plugin = engine.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise HFTError("FSDP1 cannot mix frozen and trained parameters in a layer; set fsdp_version: 2")
        if plugin.activation_checkpointing:
            raise HFTError("hft does not plan FSDP's checkpointing; set the trainer's activation_checkpointing")
        if "FULL" not in str(plugin.state_dict_type):
            raise HFTError("no model would be written; set fsdp_state_dict_type: FULL_STATE_DICT")
    if not trainer.is_deepspeed_enabled:
        return
    config, advice = engine.deepspeed_plugin.deepspeed_config, "launch with hft's own config, --engine zero3"
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise HFTError(f"only ZeRO-3 of DeepSpeed is supported, because it shards the frozen half too; {advice}")
    if any(config.get(key, {}).get("enabled") for key in ("bf16", "fp16")):
        raise HFTError(f"DeepSpeed's bf16 and fp16 would convert the frozen half to another dtype; {advice}")
    if not config.get("torch_autocast", {}).get("enabled"):
        raise HFTError(f"without torch_autocast the dtypes of master weights and frozen half do not match; {advice}")
    if not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise HFTError(f"without stage3_gather_16bit_weights_on_model_save no model would be written; {advice}")
