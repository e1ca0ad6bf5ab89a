"""A reference model that shares the policy's frozen half."""

import copy
from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hft.freezing import STACKED
from hft.parts import stored as by_name


def has_reference(args: TrainingArguments) -> bool:
    """Whether a trainer with this config compares the policy with a reference: TRL's configs then can sync it."""
    return getattr(args, "kl_to_base", 0) > 0 or (hasattr(args, "sync_ref_model") and getattr(args, "beta", None) != 0)


def reference_to_share(policy: PreTrainedModel, in_part: Collection[str] = ()) -> PreTrainedModel:
    """A copy of a frozen policy, before parts are split and masters made, without copies of what it will share."""
    shared = {id(p): p for name, p in policy.named_parameters() if name in in_part or not p.requires_grad}
    return copy.deepcopy(policy, memo=shared).requires_grad_(False).eval()


def share_frozen(reference: nn.Module, policy: nn.Module, loaded: dict[str, torch.dtype], *, autocast: bool) -> None:
    """Let a reference share a policy's frozen parameters: Llama-2-7B's takes 7.3 GB, not 13.5. `loaded`: its dtypes."""
    narrow, sources = matrices(reference) if autocast else set(), by_name(policy)
    for name, parameter in reference.named_parameters():
        source = sources[name]
        if source.requires_grad:
            parameter.data = parameter.data.to(loaded[name] if name in narrow else source.dtype)
        elif parameter.shape != source.shape:  # the policy has the frozen slices of it, and shares the whole
            parameter.data = source.data = parameter.data.to(source)
        else:
            parameter.data = source.data


def matrices(model: nn.Module) -> set[str]:
    """Parameters that autocast casts at each use; embeddings and norms hand fp32 on to the residual stream."""
    kinds = {id(p): type(module) for module in model.modules() for p in module.parameters(recurse=False)}
    embedded = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    linear = {key for key, kind in kinds.items() if issubclass(kind, nn.Linear)} - embedded
    return {name for name, p in model.named_parameters() if id(p) in linear or p.ndim == STACKED}


def reference_bytes(trainer: Trainer) -> int:
    """Bytes that a trainer's reference takes beyond its policy; storages that both share count nothing."""
    shared = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    storages = [parameter.untyped_storage() for parameter in trainer.ref_model.parameters()]
    return sum(storage.nbytes() for storage in storages if storage.data_ptr() not in shared)
