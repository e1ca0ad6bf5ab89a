"""Counts FLOPs and saved bytes of a training step by running it on fake tensors: the oracle of the closed form."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from hft.errors import HFTError
from hft.freezing import freeze
from hft.model.anatomy import architecture_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from hft.planning.tape import Precision
    from hft.selection import Selection


@dataclass(frozen=True)
class Counted:
    """What was counted of one micro-batch.

    Attributes:
        forward: FLOPs of the forward pass.
        backward: FLOPs of the backward pass, with what it recomputes.
        saved: bytes that are alive for backward once the forward pass has ended, parameters not among them.
    """

    forward: int
    backward: int
    saved: int


def count(
    model_config: PretrainedConfig,
    selection: Selection,
    rows: int,
    length: int,
    *,
    precision: Precision,
    checkpointed: Collection[int] = (),
    attention: str | None = None,
    fused_head: bool = True,
) -> Counted:
    """Run one forward and backward pass of a model without storage.

    Args:
        model_config: the model's.
        selection: what trains.
        rows: sequences.
        length: tokens of each; none is padding, and all are trained on.
        precision: of weights and matrix products.
        checkpointed: layers whose activations are recomputed, by transformers' non-reentrant checkpointing.
        attention: transformers' name of an implementation; by default the model's own.
        fused_head: TRL's head, which computes the logits in tiles and again in backward; otherwise the model's logits.

    Raises:
        HFTError: torch cannot run this model on fake tensors.
    """
    if getattr(model_config, "num_experts_per_tok", None) and precision.trained != torch.bfloat16:
        raise HFTError(
            "a mixture of experts with fp32 master weights cannot be counted exactly, since on fake tensors torch has "
            "grouped products in bf16 only; leave --exact out"
        )
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _build(model_config, selection, precision, attention)
        _checkpoint(model, checkpointed)
        ids = torch.zeros(rows, length, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if fused_head:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        saved = _Saved(model)
        forward, backward = (FlopCounterMode(display=False, custom_mapping=FORMULAS) for _ in range(2))
        with forward, saved.hooks(), torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
            if fused_head:
                loss = -model(**inputs, labels=ids, fused_lm_head=True).log_probs.sum()
            else:
                loss = model(**inputs).logits.sum()
        alive = saved.bytes()
        with backward:
            loss.backward()
    return Counted(forward.get_total_flops(), backward.get_total_flops(), alive)


def _build(
    model_config: PretrainedConfig, selection: Selection, precision: Precision, attention: str | None
) -> PreTrainedModel:
    """The frozen model, in the dtypes that a run holds it in."""
    before = torch.get_default_dtype()
    # `model.to(dtype)` fails on fake tensors, so it is built in the dtype of what is frozen.
    torch.set_default_dtype(precision.frozen)
    try:
        config = type(model_config).from_dict(model_config.to_dict())
        config.dtype = precision.frozen
        kwargs: dict[str, Any] = {"attn_implementation": attention} if attention else {}
        model = architecture_of(config)._from_config(config, **kwargs)
    finally:
        torch.set_default_dtype(before)
    freeze(model, selection)
    wide = {id(p) for p in model.parameters() if p.requires_grad}
    wide |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in wide and parameter.dtype != precision.trained:
                other = replaced.setdefault(
                    id(parameter),
                    nn.Parameter(torch.empty(parameter.shape, dtype=precision.trained), parameter.requires_grad),
                )
                setattr(module, name, other)
    return model.train()


def _checkpoint(model: PreTrainedModel, checkpointed: Collection[int]) -> None:
    if not checkpointed:
        return
    model.activation_checkpointing_enable({"use_reentrant": False})
    for index, layer in enumerate(model.get_decoder().layers):
        layer.gradient_checkpointing = index in checkpointed


class _Saved:
    """The storages that autograd holds for backward, but for those of parameters."""

    def __init__(self, model: nn.Module):
        self._own = {p.untyped_storage()._cdata for p in model.parameters()}
        self._held: list[weakref.ref[_Held]] = []

    def hooks(self) -> saved_tensors_hooks:
        def pack(tensor: torch.Tensor) -> _Held:
            held = _Held(tensor)
            self._held.append(weakref.ref(held))
            return held

        return saved_tensors_hooks(pack, lambda held: held.tensor)

    def bytes(self) -> int:
        """Bytes of what is still held: a checkpoint that nothing needs has freed its input."""
        storages = [held.tensor.untyped_storage() for ref in self._held if (held := ref()) is not None]
        return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in self._own}.values())


class _Held:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def _grouped_flops(a: tuple[int, ...], b: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """FLOPs of a product by groups: rows x in x out, or, for the gradient of a weight, in x rows x out."""
    return 2 * a[-2] * a[-1] * b[-1]


def _addmm_flops(out: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _flash_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """FLOPs of both products of the full square."""
    rows, heads, length, width = q
    return 4 * rows * heads * length * k[2] * width


def _flash_backward_flops(grad: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """FLOPs of the four products that eager attention takes; those that the kernel computes again are left out."""
    return 2 * _flash_flops(*args)


# Products that torch (2.13) has no formula for. TRL's head adds to its gradients in place.
FORMULAS = {
    torch.ops.aten._grouped_mm: _grouped_flops,
    torch.ops.aten.addmm_: _addmm_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward_flops,
}
