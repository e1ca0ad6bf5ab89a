"""Counts what a model computes and keeps for a backward pass, by running its parts on tensors without storage.

FLOPs are those of matrix products, two per multiplication with its addition, as torch's `FlopCounterMode` has them, and
bytes those of the tensors that autograd saves. No backward pass is run: the gradient of each operand of a product takes
as much as the product itself.
"""

import functools
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from hft.errors import HFTError
from hft.freezing import STACKED, is_wide
from hft.model.anatomy import layers_of, meta_model

aten = torch.ops.aten
# Matrix products, and which of their arguments are the two factors.
PRODUCTS = {op: slice(0, 2) for op in (aten.mm, aten.bmm, aten._grouped_mm)}
PRODUCTS |= {op: slice(1, 3) for op in (aten.addmm, aten.baddbmm)}
# How models find out whether a mask hides anything.
MASK_QUERIES = (Tensor.view, Tensor.sum, Tensor.eq, Tensor.__eq__, Tensor.all, torch.all, Tensor.__bool__)
# Names of a layer's index, the one setting in which equal layers differ.
INDICES = ("layer_idx", "layer_id", "layer_number")


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run."""

    frozen: torch.dtype  # of frozen parameters
    trained: torch.dtype  # of trained parameters, and of embeddings and their output
    autocast: bool  # whether matrix products run in bf16 whatever they are given


MIXED = Precision(torch.bfloat16, torch.float32, autocast=True)  # on one device and under DDP
BFLOAT16 = Precision(torch.bfloat16, torch.bfloat16, autocast=False)  # what FSDP2 gathers and computes with
FLOAT32 = Precision(torch.float32, torch.float32, autocast=False)


@dataclass(frozen=True)
class Counted:
    """Costs of one layer, or of what is around the layers."""

    forward: int = 0  # FLOPs
    backward: int = 0  # FLOPs
    recompute: int = 0  # FLOPs up to the last tensor saved, which is as far as non-reentrant checkpointing recomputes
    saved: int = 0  # bytes that are saved
    shared: frozenset[UntypedStorage] = frozenset()  # what is saved that all layers are given, such as cosines
    copies: int = 0  # bytes of trained weights in bf16, which autocast keeps until the forward pass ends
    saved_copies: int = 0  # bytes of those that are saved
    output: Tensor | None = None  # hidden states or logits


class Call(NamedTuple):
    """A layer, the hidden states that it is given, and what else."""

    layer: nn.Module
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Counter(TorchDispatchMode):
    """Counts what runs inside it on fake tensors."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = self.recompute = 0
        self._saved: list[weakref.ref[Callable[[], Tensor]]] = []
        self.copies: set[UntypedStorage] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = func.overloadpacket
        if op is aten._grouped_mm:  # torch knows its shape for bf16 only
            out = args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])
        else:
            out = func(*args, **(kwargs or {}))
        if op in PRODUCTS:
            a, b = args[PRODUCTS[op]]
            flops = 2 * out.numel() * a.shape[-1]
            self.forward += flops
            self.backward += flops * (a.requires_grad + b.requires_grad)
        elif op is aten._scaled_dot_product_flash_attention_for_cpu:  # two products, and four in the backward pass
            q, k, v = args[:3]
            flops = 4 * q.numel() * k.shape[-2]
            self.forward += flops
            self.backward += 2 * flops * any(x.requires_grad for x in (q, k, v))
        elif op is aten._to_copy and out.dtype == torch.bfloat16 and args[0].is_leaf and args[0].requires_grad:
            self.copies.add(out.untyped_storage())
        return out

    def save(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What autograd keeps for a tensor, as long as a gradient needs it."""

        def unpack() -> Tensor:
            return tensor

        self._saved.append(weakref.ref(unpack))
        self.recompute = self.forward
        return unpack

    @property
    def saved(self) -> set[UntypedStorage]:
        return {unpack().untyped_storage() for ref in self._saved if (unpack := ref())}


class AsOnGPU(TorchFunctionMode):
    """Attention as a GPU's kernel computes it, without dropout's mask, and answers about masks that hide nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MASK_QUERIES and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v, *more = args
        missing = q.shape[-1] - v.shape[-1]
        out = func(q, k, pad(v, (0, missing)) if missing else v, *more, **kwargs | {"dropout_p": 0.0})
        return out[..., : v.shape[-1]] if missing else out


class CountedModel:
    """A model without storage on a micro-batch. What its parts cost depends on what of them trains."""

    def __init__(
        self,
        config: PretrainedConfig,
        precision: Precision,
        rows: int,
        length: int,
        attention: str | None,
        padded: bool,
        logits: bool,
    ):
        from transformers.modeling_utils import local_torch_dtype

        self.precision, self.flash = precision, (attention or "").startswith("flash")
        with local_torch_dtype(precision.frozen):  # as when a checkpoint is loaded
            self.model = meta_model(config).train()
        if attention:
            self.model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
        self.body, self.layers = self.model if logits else self.model.get_decoder(), layers_of(self.model)[1]
        with FakeTensorMode(allow_non_fake_inputs=True) as self.mode:
            for module in self.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
            ids = torch.zeros(rows, length, dtype=torch.long)
            mask = torch.ones_like(ids)
        if not padded:
            mask = torch.ones(rows, length, dtype=torch.bool)  # a real one, to be asked
        self.inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        self.layer, self.ends = functools.cache(self._layer), functools.cache(self._ends)
        self.output: Any = None  # of a layer
        with torch.no_grad():
            self.calls = self._ends(frozenset(), layers_train=False, checkpointed=False)[1]

    def _layer(self, index: int, trained: frozenset[str], in_part: frozenset[str], *, grad: bool) -> Counted:
        """A layer; trained parameters go by their names in it; the weight of those `in_part` is made at each use."""
        layer, x, args, kwargs = self.calls[index]
        with self.mode:
            x = torch.empty_like(x, requires_grad=grad)
            x = x.view_as(x)  # autocast would keep the copy of a leaf
        return self._count(layer, trained, (x, *args), kwargs, storages_of((args, kwargs)), in_part)

    def _ends(self, trained: frozenset[str], *, layers_train: bool, checkpointed: bool) -> tuple[Counted, list[Call]]:
        """Embeddings, last norm, and the head if it is counted; and how layers are called."""
        calls: list[Call] = []

        def stand_in(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            del layer.forward
            kwargs |= {"attention_mask": None} if self.flash else {}
            calls.append(Call(layer, x, args, kwargs))
            if self.output is None:
                self.output = functional_call(layer, self._weights(layer, ()), (x, *args), kwargs)
            y = torch.empty_like(_hidden(self.output), requires_grad=x.requires_grad or layers_train)
            return (y, *self.output[1:]) if isinstance(self.output, tuple | list) else y

        for layer in self.layers:
            layer.forward = functools.partial(stand_in, layer)
        if checkpointed:  # as transformers does
            self.model.enable_input_require_grads()
        counted = self._count(self.body, trained, (), self.inputs)
        if checkpointed:
            self.model.disable_input_require_grads()
        return counted, calls

    def _count(
        self,
        module: nn.Module,
        trained: frozenset[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        shared: frozenset[UntypedStorage] = frozenset(),
        in_part: Collection[str] = (),
    ) -> Counted:
        owner = self.model if module is self.body else module
        counter = Counter()
        try:
            with self.mode, AsOnGPU(), torch.autocast("cpu", torch.bfloat16, enabled=self.precision.autocast):
                weights = self._weights(module, {owner.get_parameter(name) for name in trained})
                stacked = {n for n, p in weights.items() if p.ndim == STACKED and p.requires_grad}
                made = {*in_part, *(stacked if self.precision.autocast else ())}
                for name in made:
                    narrow = not is_wide(name, weights[name].ndim)
                    weights[name] = weights[name].to(self.precision.frozen if narrow else self.precision.trained)
                with counter, saved_tensors_hooks(counter.save, lambda unpack: unpack()):
                    out = _hidden(functional_call(module, weights, args, kwargs))
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
            kind, why = self.model.config.model_type, f"what it computes depends on its weights ({error})"
            raise HFTError(f"FLOPs and activations of model type {kind} are not known: {why}") from error
        own = (weight for name, weight in weights.items() if name not in made)
        kept = {tensor.untyped_storage() for tensor in (*own, *module.buffers())}
        saved = counter.saved - kept
        return Counted(
            forward=counter.forward,
            backward=counter.backward,
            recompute=counter.recompute,
            saved=size_of(saved - shared - counter.copies),
            shared=shared & saved,
            copies=size_of(counter.copies),
            saved_copies=size_of(counter.copies & saved),
            output=out,
        )

    def _weights(self, module: nn.Module, trained: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
        """Parameters of a layer, or those outside the layers, in the dtypes of a run."""
        trained, elsewhere = set(trained), set(self.layers.parameters()) if module is self.body else set()
        wide = trained.union(*(m.parameters() for m in module.modules() if isinstance(m, nn.Embedding)))
        return {
            name: nn.Parameter(
                torch.empty(p.shape, dtype=self.precision.trained if p in wide else self.precision.frozen), p in trained
            )
            for name, p in module.named_parameters()
            if p not in elsewhere
        }

    @functools.cached_property
    def kinds(self) -> list[int]:
        """For each layer the first that costs the same if the same of it trains."""
        first: dict[Any, int] = {}
        return [first.setdefault(_kind(*call), index) for index, call in enumerate(self.calls)]


def _kind(layer: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What can make layers differ: settings of their modules, shapes of weights and of what they are given."""
    settings = [
        (path, type(module), key, value)
        for path, module in layer.named_modules()
        for key, value in vars(module).items()
        if key not in INDICES and isinstance(value, (bool, int, float, str))
    ]
    shapes = [getattr(leaf, "shape", None) for leaf in (*layer.parameters(), *tree_leaves((x, args, kwargs)))]
    return (*settings, *shapes)


def _hidden(out: Any) -> Tensor:
    """Hidden states or logits, which come first in what a layer or a model returns."""
    return out if isinstance(out, Tensor) else out[0]


def storages_of(tree: Any) -> frozenset[UntypedStorage]:
    """The storages of the tensors in nested containers."""
    return frozenset(leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def size_of(storages: Iterable[UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)
