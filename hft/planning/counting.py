"""Counts what a model computes and keeps, by running its parts on tensors without storage.

FLOPs are those of matrix products, as torch's `FlopCounterMode` has them; bytes are those of the tensors that autograd
saves for the backward pass. The backward pass is not run: the gradient of each operand is a product of the same size.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hft.errors import HFTError
from hft.model.anatomy import layers_of, meta_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hft.planning.costs import Precision

aten = torch.ops.aten
# Matrix products, and where their two operands are among the arguments.
PRODUCTS = {
    aten.mm: slice(0, 2),
    aten.bmm: slice(0, 2),
    aten._grouped_mm: slice(0, 2),
    aten.addmm: slice(1, 3),
    aten.baddbmm: slice(1, 3),
}
# Names of a layer's position, the one setting in which equal layers differ.
POSITIONS = ("layer_idx", "layer_id", "layer_number")


@dataclass(frozen=True)
class Counted:
    """A part of a model: one layer, or what is around the layers.

    Attributes:
        forward: FLOPs.
        backward: FLOPs.
        recompute: FLOPs of the forward pass up to the last tensor that it saves, where checkpointing stops.
        saved: bytes that it saves for the backward pass.
        shared: bytes of each tensor that it saves and other layers save too, such as cosines and sines.
        copies: bytes of its trained weights in bf16, which autocast keeps until the forward pass ends.
        saved_copies: bytes of those that autograd keeps beyond it.
        input: the hidden states that it was given, or that reach the first layer.
        output: the hidden states, or logits, that it returns.
    """

    forward: int
    backward: int
    recompute: int
    saved: int
    shared: dict[torch.UntypedStorage, int]
    copies: int
    saved_copies: int
    input: torch.Tensor
    output: torch.Tensor


class Counter(TorchDispatchMode):
    """Counts what runs inside it, on fake tensors.

    Args:
        weights: tensors that exist anyway, so that saving them takes nothing.
        shared: tensors that are counted apart.
    """

    def __init__(self, weights: Iterable[torch.Tensor], shared: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.forward = self.backward = self.recompute = 0
        self.weights = {weight.untyped_storage() for weight in weights}
        self.shared = {tensor.untyped_storage() for tensor in shared}
        self.copies: set[torch.UntypedStorage] = set()
        self.held: list[weakref.ref[Held]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = func.overloadpacket
        if op is aten._grouped_mm:  # which torch has on fake tensors in bf16 only
            out = args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])
        else:
            out = func(*args, **(kwargs or {}))
        if op in PRODUCTS:
            a, b = args[PRODUCTS[op]]
            flops = 2 * out.numel() * a.shape[-1]
            self.forward += flops
            self.backward += flops * (a.requires_grad + b.requires_grad)
        elif op is aten._scaled_dot_product_flash_attention_for_cpu:  # two products; four in the backward pass
            q, k, v = args[:3]
            flops = 4 * q.numel() * k.shape[-2]
            self.forward += flops
            self.backward += 2 * flops * (q.requires_grad or k.requires_grad or v.requires_grad)
        elif op is aten._to_copy and out.dtype == torch.bfloat16 and self._is_trained_weight(args[0]):
            self.copies.add(out.untyped_storage())
        return out

    def _is_trained_weight(self, x: torch.Tensor) -> bool:
        return x.requires_grad and x.is_leaf and x.untyped_storage() in self.weights

    def saving(self) -> saved_tensors_hooks:
        """A context in which it notes what autograd saves."""

        def pack(tensor: torch.Tensor) -> Held:
            held = Held(tensor)
            self.held.append(weakref.ref(held))
            self.recompute = self.forward
            return held

        return saved_tensors_hooks(pack, lambda held: held.tensor)

    def counted(self, x: torch.Tensor, out: torch.Tensor) -> Counted:
        """What was counted, given hidden states before and after, while these and their graphs are alive."""
        saved = {held.tensor.untyped_storage() for ref in self.held if (held := ref()) is not None} - self.weights

        def size(storages: set[torch.UntypedStorage]) -> int:
            return sum(storage.nbytes() for storage in storages)

        return Counted(
            forward=self.forward,
            backward=self.backward,
            recompute=self.recompute,
            saved=size(saved - self.shared - self.copies),
            shared={storage: storage.nbytes() for storage in saved & self.shared},
            copies=size(self.copies),
            saved_copies=size(self.copies & saved),
            input=x.detach().requires_grad_(x.requires_grad),
            output=out.detach().requires_grad_(out.requires_grad),
        )


class Held:
    """A tensor that autograd saves. What no gradient needs is freed with its part of the graph."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


class FlashAttention(TorchFunctionMode):
    """Attention as a GPU's kernel has it: of dropout it keeps a seed, and values as narrow as they like are padded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v, *more = args
        kwargs = kwargs | {"dropout_p": 0.0}
        if q.shape[-1] == v.shape[-1]:
            return func(q, k, v, *more, **kwargs)
        return func(q, k, pad(v, (0, q.shape[-1] - v.shape[-1])), *more, **kwargs)[..., : v.shape[-1]]


class CountedModel:
    """A model without storage, and what its parts take of a micro-batch, depending on what of them trains.

    Args:
        config: of the model.
        precision: of weights and matrix products.
        rows: sequences.
        length: tokens of each.
        attention: transformers' name of an implementation; by default the model's own.
        padded: whether some rows are shorter than others, so that attention needs a mask.
        logits: whether those of the model are counted too.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        precision: Precision,
        rows: int,
        length: int,
        *,
        attention: str | None,
        padded: bool,
        logits: bool,
    ):
        self.precision, self.length, self.padded = precision, length, padded
        self.flash = (attention or "").startswith("flash")
        self.model = meta_model(config).train()
        if attention:
            self.model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
        self.body = self.model if logits else self.model.get_decoder()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            for module in self.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
            ids = torch.zeros(rows, length, dtype=torch.long)
            self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if padded else None}
        self.calls: list[Call] = []  # of each layer
        self.layer, self.ends = functools.cache(self._layer), functools.cache(self._ends)
        with torch.no_grad():
            self._ends(frozenset(), layers_train=False, checkpointed=False)

    def _layer(self, kind: Any, trained: frozenset[str], *, grad: bool) -> Counted:
        """A layer of a kind.

        Args:
            kind: of the layer, as it is in `calls`.
            trained: its parameters that train, by their names in it.
            grad: whether its input requires a gradient.
        """
        call = next(call for call in self.calls if call.kind == kind)
        with self.mode:
            x = torch.empty_like(call.x, requires_grad=grad)
            weights = self._weights(call.layer, trained)
            counter = Counter([*weights.values(), *call.layer.buffers()], call.tensors)
            with self._computing(), counter.saving(), counter:
                out = functional_call(call.layer, weights, (x, *call.args), call.kwargs)
            return counter.counted(x, _first(out))

    def _ends(self, trained: frozenset[str], *, layers_train: bool, checkpointed: bool) -> Counted:
        """What is around the layers: embeddings, last norm, and the model's logits if they are counted.

        Args:
            trained: parameters outside the layers that train, by their names in the model.
            layers_train: whether a layer has any.
            checkpointed: whether a layer is, for which transformers asks for the gradient of the embeddings.
        """
        layers, first = layers_of(self.model), self.calls == []
        reached: list[torch.Tensor] = []  # hidden states before each layer

        def stand_in(layer: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            del layer.forward
            reached.append(x)
            if first:
                if not self._is_masked(len(self.calls)):
                    args, kwargs = tree_map(self._without_mask, (args, kwargs))
                self.calls.append(Call(_kind(layer, args, kwargs), layer, x, args, kwargs))
            if len(self.calls) == 1:
                self.out = functional_call(layer, self._weights(layer, frozenset()), (x, *args), kwargs)
            y = torch.empty_like(_first(self.out), requires_grad=x.requires_grad or layers_train)
            return (y, *self.out[1:]) if isinstance(self.out, tuple) else y

        for layer in layers:
            layer.forward = functools.partial(stand_in, layer)
        prefix = next((f"{name}." for name, module in self.model.named_modules() if module is self.body and name), "")
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        with self.mode:
            weights = self._weights(self.body, frozenset(name.removeprefix(prefix) for name in trained), without=inside)
            counter = Counter([*weights.values(), *self.body.buffers()])
            embeddings = self.model.get_input_embeddings()
            hook = embeddings.register_forward_hook(
                lambda *args: args[-1].requires_grad_(checkpointed or args[-1].requires_grad)
            )
            with self._computing(), counter.saving(), counter:
                out = functional_call(self.body, weights, (), self.inputs | {"use_cache": False})[0]
            hook.remove()
            return counter.counted(reached[0], out)

    def _is_masked(self, index: int) -> bool:
        """Whether a layer needs a mask. Of fake rows transformers cannot see that they are not padded."""
        config = self.model.config.get_text_config()
        window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        slides = window and self.length >= window and not (types and types[index] == "full_attention")
        return config._attn_implementation == "eager" or (not self.flash and bool(self.padded or slides))

    def _without_mask(self, x: Any) -> Any:
        is_mask = isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[1:] == (1, self.length, self.length)
        return None if is_mask else x

    def _weights(
        self, module: nn.Module, trained: frozenset[str], without: Collection[int] = ()
    ) -> dict[str, nn.Parameter]:
        """Parameters of a module in the dtypes of a run."""
        wide = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        weights = {}
        for name, parameter in module.named_parameters():
            if id(parameter) not in without:
                grad = name in trained
                dtype = self.precision.trained if grad or id(parameter) in wide else self.precision.frozen
                weights[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=grad)
        return weights

    @contextmanager
    def _computing(self) -> Iterator[None]:
        try:
            with FlashAttention(), torch.autocast("cpu", torch.bfloat16, enabled=self.precision.autocast):
                yield
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
            raise HFTError(
                f"FLOPs and activations of model type {self.model.config.model_type} are not known: what it computes "
                f"depends on its weights ({type(error).__name__}: {error})"
            ) from error


@dataclass(frozen=True, eq=False)
class Call:
    """How a model calls one of its layers.

    Attributes:
        kind: equal for layers that are.
        layer: without storage.
        x: hidden states.
        args: what follows them.
        kwargs: all else.
    """

    kind: tuple[Any, ...]
    layer: nn.Module
    x: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What all layers share."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]


def _kind(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Whatever makes two layers of one model differ: settings of its modules, shapes of weights and arguments."""
    settings = [
        (path, type(module), key, value)
        for path, module in layer.named_modules()
        for key, value in vars(module).items()
        if key not in POSITIONS and isinstance(value, (bool, int, float, str))
    ]
    shapes = [(name, parameter.shape) for name, parameter in layer.named_parameters()]
    given = [getattr(leaf, "shape", None) for leaf in tree_leaves((args, kwargs))]
    return (*settings, *shapes, *given)


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out
