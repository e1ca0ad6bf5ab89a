"""What FSDP2 and ZeRO-3 ask of a trainer whose model is half frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hft.errors import HFTError, shorten
from hft.freezing import HALF_PRECISION, upcast
from hft.machine import is_sharded, is_zero3
from hft.record.manifest import Manifest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

    from hft.selection import Selection


# Optimizers that look at single elements, or at blocks of them with one scale; bitsandbytes has the last four.
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
ELEMENTWISE += ("paged_adamw_32bit", "lion_32bit", "adamw_bnb_8bit", "paged_adamw_8bit")


class EngineQuirks:
    """Mixin of a TRL trainer with a `schedule`, if any, and `resumed_from`."""

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

    def compute_loss_context_manager(self):
        """Evaluate in autocast under ZeRO-3 too, which only DeepSpeed's engine enters: Trainer calls the bare model."""
        contexts = super().compute_loss_context_manager()
        if self.is_deepspeed_enabled and not self.model.training:
            dtype = self.accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"].get("dtype", "bfloat16")
            contexts.enter_context(torch.autocast(self.args.device.type, getattr(torch, dtype)))
        return contexts

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Before FSDP2 loads the optimizer's state, let require a gradient what a schedule has left a state of.

        It expects a state for whatever requires a gradient. Trainer has just sharded the model, and loads the state
        next; `ScheduleCallback` takes all parameters up again when the training begins.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.resumed_from and self.schedule and self.is_fsdp_enabled:
            names = self.schedule.have_state(Manifest.load(self.resumed_from).schedule["history"])
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(name in names)
        return scheduler


def before_loading(args: TrainingArguments) -> None:
    """Keep ZeRO-3 from partitioning, while it is loaded, what is to be frozen, upcast and checked whole."""
    if is_zero3(args):
        unset_hf_deepspeed_config()


def upcast_for(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Give the trained half its fp32 master weights, unless accelerate does.

    It upcasts the trained parameters of an FSDP2 model itself, but only if it computes in half precision.
    """
    if is_zero3(args):
        upcast(model, autocast=True)
    elif not is_sharded(args) or not (args.bf16 or args.fp16):
        upcast(model, autocast=args.bf16 or args.fp16)


def autocast_decoder(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Let the decoder compute under autocast also where a trainer calls it past the model's own forward.

    accelerate wraps that alone. TRL's distillation (1.16) calls the decoder itself; with fp32 masters throughout that
    computes in fp32, and where a part is frozen in half precision the dtypes would not multiply.
    """
    mixed = any(parameter.dtype in HALF_PRECISION for parameter in model.parameters())
    if not mixed or not (args.bf16 or args.fp16) or is_sharded(args):
        return
    contexts: list[torch.autocast] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        contexts.append(torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16))
        contexts[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        contexts.pop().__exit__(None, None, None)

    model.base_model.register_forward_pre_hook(enter)
    model.base_model.register_forward_hook(leave, always_call=True)


def check_in_part(args: TrainingArguments, model_config: PretrainedConfig, selection: Selection) -> None:
    """Refuse what cannot hold parameters that train in part."""
    if not (masks := selection.frozen_masks):
        return
    if getattr(args, "use_vllm", False):
        raise HFTError("vLLM takes whole weights, and some train in part; leave out use_vllm, or select whole tensors")
    if args.optim.value not in ELEMENTWISE:
        raise HFTError(
            f"{min(masks)} trains in part, and {args.optim.value} looks at whole matrices; set optim to one of "
            f"{shorten(ELEMENTWISE, most=len(ELEMENTWISE))}, or select whole tensors"
        )
    tied = model_config.get_text_config().tie_word_embeddings and masks.keys() & selection.anatomy.embeddings
    if tied and is_sharded(args):
        raise HFTError("FSDP2 cannot shard tied embeddings that train in part; launch with --engine ddp")


def check_zero3(args: TrainingArguments, selection: Selection, *, save_only_trained: bool) -> None:
    """Refuse what only the other engines can do."""
    if is_zero3(args) and selection.frozen_masks:
        raise HFTError(
            "ZeRO-3 holds parameters flat and in parts, where masks of elements do not fit; launch with FSDP2"
        )
    if is_zero3(args) and save_only_trained:
        raise HFTError("save_only_trained goes with FSDP2 and DDP, not with ZeRO-3; leave it out")


def check_engine(trainer: Trainer) -> None:
    """Refuse an engine that cannot hold a half-frozen layer, would round it, or could not write the model."""
    engine = trainer.accelerator.state
    if trainer.is_fsdp_enabled:
        plugin = engine.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise HFTError("FSDP1 cannot mix frozen and trained parameters in a layer; set fsdp_version: 2")
        if plugin.activation_checkpointing:
            raise HFTError("FSDP's activation checkpointing is in no plan; set the trainer's activation_checkpointing")
        if "FULL" not in str(plugin.state_dict_type):
            raise HFTError("no model would be written; set fsdp_state_dict_type: FULL_STATE_DICT")
    if not trainer.is_deepspeed_enabled:
        return
    config, advice = engine.deepspeed_plugin.deepspeed_config, "launch with hft's own config, --engine zero3"
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise HFTError(f"of DeepSpeed only ZeRO-3 is supported, which shards the frozen half too; {advice}")
    if any(config.get(key, {}).get("enabled") for key in ("bf16", "fp16")):
        raise HFTError(f"DeepSpeed's bf16 and fp16 would convert the frozen half to another dtype; {advice}")
    if not config.get("torch_autocast", {}).get("enabled"):
        raise HFTError(f"without torch_autocast fp32 master weights and the frozen half do not multiply; {advice}")
    if not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise HFTError(f"without stage3_gather_16bit_weights_on_model_save no model would be written; {advice}")
