"""TRL's trainers with one of PEFT's adapters on a base that is frozen whole, and what the adapters lack there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import BitsAndBytesConfig, TrainerCallback, TrainingArguments
from transformers.utils import is_bitsandbytes_available
from trl import DPOTrainer, SFTTrainer

from hft.errors import HFTError
from hft.freezing import upcast
from hft.machine import is_main, is_sharded
from hft.methods.adapter import PROMPT_LEARNING, AdapterConfig, adapter_selection, freeze_ranknum
from hft.model.weights import checksum, local_folder, weights_of
from hft.record.manifest import Manifest
from hft.runs.folder import CHECKPOINT
from hft.training.mixin import load_base
from hft.training.recorded import Recorded

# In a checkpoint, beside PEFT's own files: all that trains, and AdaLoRA's importance scores.
STATE_NAME = "training_state.safetensors"
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdapterTuning(Recorded):
    """Mixin that makes a TRL trainer train an adapter; the model itself is frozen whole.

    Args:
        model: path or Hub id of the base, loaded in the dtype its weights are stored in, or in 4 bits for QLoRA.
        args: the trainer's own config.
        adapter: which adapter, and its settings.
        kwargs: whatever else the trainer takes.

    Raises:
        HFTError: the adapter cannot be trained in this way (`check_possible`), or it does not fit the model.
    """

    def __init__(self, model: str, args: TrainingArguments, *, adapter: AdapterConfig, **kwargs):
        check_possible(adapter, args, pairs=isinstance(self, DPOTrainer))
        self.adapter = adapter
        self._checkpointing_lost = adapter.adapter == "p-tuning-v2" and args.gradient_checkpointing
        if self._checkpointing_lost:
            args.gradient_checkpointing = args.activation_checkpointing = False  # transformers is renaming it

        base, stored = load_base(model, args, **(quantized(args) if adapter.adapter == "qlora" else {}))
        keep_quantised_weights(base)
        base.requires_grad_(False)
        if adapter.adapter != "osf":  # its factors are taken from the weights as stored, and again when it is loaded
            upcast(base, autocast=args.bf16 or args.fp16)
        revision = (args.model_init_kwargs or {}).get("revision")
        checksums = checksums_on_disk(local_folder(model, revision), stored) if is_main() else {}
        self.manifest = Manifest.of(adapter_selection(base.config, adapter), model, checksums, revision=revision)

        super().__init__(model=base, args=args, peft_config=adapter.peft_config(), **kwargs)
        if self.is_deepspeed_enabled:
            raise HFTError("DeepSpeed is not supported; adapters train on one device or under DDP")
        freeze_ranknum(self.model)
        upcast(self.model, autocast=args.bf16 or args.fp16)  # TRL gives QLoRA's adapters bf16
        self._peft_config.base_model_name_or_path = self.manifest.base
        self._peft_config.revision = revision
        self._before = self._checksums()
        self.add_callback(AdapterCallback(self))

    @property
    def _peft_config(self):
        return self.model.peft_config[self.model.active_adapter]

    def notes(self) -> list[str]:
        """What is done otherwise than the recipe says, and which reference there is."""
        notes = ["reference: the base itself, its adapter switched off"] if isinstance(self, DPOTrainer) else []
        if self._checkpointing_lost:
            notes.append("gradient checkpointing is off: it would drop the prefix, which reaches the layers as a cache")
        return notes

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, and in training AdaLoRA's orthogonality loss, which TRL leaves behind in `outputs.loss`."""
        if self.adapter.adapter == "p-tuning" and "labels" in inputs:
            # The first token would become the target of the last virtual one, and is not counted as a target.
            inputs["labels"] = inputs["labels"].index_fill(1, inputs["labels"].new_zeros(1), -100)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.adapter.adapter == "adalora" and self.model.training:
            # Where the loss is a mean over the tokens of the whole step, Trainer leaves the micro-batches to us.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self._peft_config.orth_reg_weight * orthogonality(self.model) / steps
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a standard PEFT folder with its manifest; in a checkpoint also what an exact resume needs."""
        folder = Path(output_dir or self.args.output_dir)
        checkpoint = folder.parent == Path(self.args.output_dir) and CHECKPOINT.fullmatch(folder.name)
        pattern = getattr(self._peft_config, "rank_pattern", None)
        if checkpoint and self.adapter.adapter == "adalora":
            self._peft_config.rank_pattern = None  # PEFT would cut the pruned rows off, and optimizer state not fit
        super().save_model(str(folder), _internal_call)
        if self.adapter.adapter == "adalora":
            self._peft_config.rank_pattern = pattern
        if not self.args.should_save:
            return
        if checkpoint:
            save_file({name: t.detach().contiguous() for name, t in self._state()}, folder / STATE_NAME)
        self.manifest.moved = [name for name, now in self._checksums().items() if now != self._before[name]]
        self.manifest.save(folder)

    def restore(self, checkpoint: str) -> None:
        """Bring back all that trained, bit for bit.

        PEFT's own files do not hold all of it: of P-tuning they keep the prompt and not the encoder that made it, of
        AdaLoRA no scores.
        """
        saved = load_file(Path(checkpoint) / STATE_NAME)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name in [name for name in saved if name in parameters]:
                parameters[name].copy_(saved.pop(name))
        if self.adapter.adapter != "adalora":
            return
        pattern = {}
        for key, tensor in saved.items():
            kind, name = key.split("|")
            if kind == "rank_pattern":
                pattern[name] = tensor.tolist()
            else:
                getattr(self.model.base_model.rankallocator, kind)[name] = tensor.to(self.args.device)
        self._peft_config.rank_pattern = pattern or None

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        if self.adapter.adapter == "adalora":
            for kind in SCORES:
                for name, scores in getattr(self.model.base_model.rankallocator, kind).items():
                    yield f"{kind}|{name}", scores
            for name, kept in (self._peft_config.rank_pattern or {}).items():
                yield f"rank_pattern|{name}", torch.tensor(kept)

    def _checksums(self) -> dict[str, str]:
        """Checksums of every parameter as this process holds it."""
        parameters = list(self.model.named_parameters()) if is_main() else []
        return {name: checksum(p) for name, p in tqdm(parameters, desc="hashing what is in memory", leave=False)}


class AdapterSFTTrainer(AdapterTuning, SFTTrainer):
    """TRL's `SFTTrainer` with an adapter."""

    _tag_names = ["trl", "sft", "hft"]


class AdapterDPOTrainer(AdapterTuning, DPOTrainer):
    """TRL's `DPOTrainer` with an adapter; the reference is the base with the adapter switched off."""

    _tag_names = ["trl", "dpo", "hft"]


class AdapterCallback(TrainerCallback):
    """Restores a checkpoint's state before the first step, and lets AdaLoRA prune after each."""

    def __init__(self, trainer: AdapterTuning):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.adapter.adapter == "adalora":
            set_schedule(self.trainer.model, self.trainer.adapter, state.max_steps)
        if self.trainer.resumed_from:
            self.trainer.restore(self.trainer.resumed_from)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.adapter.adapter == "adalora":  # the gradients, which it scores by, are still there
            self.trainer.model.base_model.update_and_allocate(state.global_step + 1)


def check_possible(adapter: AdapterConfig, args: TrainingArguments, *, pairs: bool) -> None:
    """Refuse what does not work with an adapter, or has not been seen to.

    Raises:
        HFTError: it does not; the sentence says what to do.
    """
    name = adapter.adapter
    if name is None:
        raise HFTError("give the adapter's name, e.g. --adapter lora")
    if is_sharded(args):
        raise HFTError("adapters train on one device or under DDP; launch with recipes/accelerate/ddp.yaml")
    if name in PROMPT_LEARNING and pairs:
        raise HFTError(
            f"{name} cannot do DPO: its untrained prompt already moves the policy away from the reference; take lora"
        )
    if name in PROMPT_LEARNING and (getattr(args, "packing", False) or getattr(args, "padding_free", False)):
        raise HFTError(f"{name} puts its prompt before each row, so rows cannot be packed; set packing to false")
    if name == "qlora" and not is_bitsandbytes_available():
        raise HFTError("qlora needs bitsandbytes: pip install bitsandbytes")


def quantized(args: TrainingArguments) -> dict[str, Any]:
    """How `from_pretrained` loads a base for QLoRA: nf4 with double quantization (QLoRA, arXiv 2305.14314)."""
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": config, "device_map": {"": args.device}}


def keep_quantised_weights(model: nn.Module) -> None:
    """Keep bitsandbytes (0.50) from repacking 4-bit weights in place when a model is evaluated on a CPU with bf16.

    That rounds their scales for good, so that training after an evaluation would go on with another base, and it fails
    on widths that are no multiple of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def checksums_on_disk(folder: Path, names: dict[str, torch.dtype]) -> dict[str, str]:
    """Checksums of the base's tensors as its files have them, whatever they become in memory."""
    weights = weights_of(folder, names)
    return {name: checksum(weights[name]) for name in tqdm(names, desc="hashing the base", leave=False)}


def orthogonality(model: PeftModel) -> torch.Tensor:
    """AdaLoRA's regularizer, as PEFT takes it: the mean of ||P^T P - I|| over all P and Q (arXiv 2303.10512)."""
    norms = []
    for name, p in model.named_parameters():
        if p.requires_grad and ("lora_A" in name or "lora_B" in name):
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=p.device)))
    return torch.stack(norms).mean()


def set_schedule(model: nn.Module, adapter: AdapterConfig, steps: int) -> None:
    """Lay AdaLoRA's pruning over the steps that there will be, which only the trainer knows.

    Raises:
        HFTError: there is one step only, and ranks are scored before they are pruned.
    """
    if steps < 2:
        raise HFTError("adalora needs 2 steps or more, to score ranks and then prune them; raise --max_steps")
    config = model.peft_config[model.active_adapter]
    end = max(2, int(adapter.pruning_until * steps))
    start = min(int(adapter.pruning_from * steps), end - 1)
    config.total_step, config.tinit, config.tfinal = steps, start, steps - end
    config.deltaT = max(1, steps // 500)
