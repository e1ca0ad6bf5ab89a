"""What a step of a run costs: FLOPs, and bytes that autograd keeps between forward and backward.

- Attention is the full square, not its causal half, and what a flash kernel computes again is not counted.
- A weight that trains in part costs the gradient of the whole weight; it is put together at each use and kept.
- The head is TRL's: it never holds all logits, and computes them a second time in the backward pass.
- Rows are as long as they may be, and every token is trained on.
"""

import functools
import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from hft.planning.counting import MIXED, Counted, CountedModel, Precision, size_of, storages_of
from hft.selection import Selection

# Of TRL's head: tokens and words of the vocabulary that it has logits of at once (trl/kernels/chunked_logprob.py).
TILE_TOKENS, TILE_WORDS = 4096, 32768


@dataclass(frozen=True)
class StepCosts:
    """One micro-batch on one device."""

    tokens: int  # that go through the model with gradients
    forward: int  # FLOPs
    backward: int  # FLOPs of gradients, of weights and of activations
    recompute: int  # FLOPs of what is computed a second time: checkpointed layers and the logits
    saved: int  # bytes of activations that autograd holds once the forward pass has ended
    saved_copies: int  # bytes of bf16 copies of trained weights that it holds beside them
    peaks: dict[str, int]  # bytes beside the activations at each time that may be the peak
    reference: int = 0  # FLOPs of what is computed without gradients, such as by a reference model
    strategy: int = 0  # FLOPs of a strategy's rows of a step, divided over its micro-batches
    sampling: int = 0  # FLOPs of the texts that a strategy samples before the first step; not of the micro-batch

    @property
    def flops(self) -> int:
        return self.forward + self.backward + self.recompute + self.reference + self.strategy

    @property
    def transient(self) -> int:
        """The most bytes beside the activations at one time."""
        return max(self.peaks.values())

    @property
    def peak(self) -> int:
        """The most bytes beside the state at one time."""
        return self.saved + self.transient


def costs_of(
    model_config: PretrainedConfig,
    selection: Selection,
    rows: int,
    length: int,
    *,
    checkpointed: Collection[int] = (),
    precision: Precision = MIXED,
    attention: str | None = None,
    padded: bool = False,
    fused_head: bool = True,
) -> StepCosts:
    """What one micro-batch of `rows` sequences of `length` tokens costs; an `HFTError` where it is not known.

    `attention` is transformers' name of an implementation, by default the model's own; `padded` rows need a mask.
    Without TRL's `fused_head` the model's logits count.
    """
    model = _counted_model(pickle.dumps(model_config), precision, rows, length, attention, padded, not fused_head)
    anatomy, trained = selection.anatomy, frozenset(selection.trained_parameters)
    by_layer: list[dict[str, bool]] = [{} for _ in range(anatomy.num_layers)]
    for name in trained & anatomy.shapes.keys():
        index = anatomy.parts_by_parameter[name][0][0].layer
        by_layer[index][name.partition(f".{index}.")[2]] = name in selection.frozen_masks
    outside = trained.difference(anatomy.shapes)
    ends, calls = model.ends(outside, layers_train=any(by_layer), checkpointed=bool(checkpointed))
    layers, grad = [], calls[0].x.requires_grad
    for kind, names in zip(model.kinds, by_layer, strict=True):
        in_part = frozenset(name for name, is_split in names.items() if is_split)
        layers.append(model.layer(kind, frozenset(names), in_part, grad=grad))
        grad = layers[-1].output.requires_grad
    kept = [layer for index, layer in enumerate(layers) if index not in checkpointed]
    dropped = [layer for index, layer in enumerate(layers) if index in checkpointed]
    shared = frozenset().union(*(layer.shared for layer in kept))
    inputs = 0
    for index in checkpointed:
        if layers[index].output.requires_grad:
            inputs += calls[index].x.nbytes
            shared |= storages_of(model.calls[index].args)  # what it is given by position is saved with its input
    head, tile, loss = _head(model, ends.output, outside) if fused_head else (Counted(), 0, 0)
    every = (*layers, ends, head)
    copies, saved_copies = sum(part.copies for part in every), sum(part.saved_copies for part in (*kept, ends))
    beside = " beside bf16 copies of weights" if saved_copies else ""
    recomputed = max((layer.saved + layer.saved_copies for layer in dropped), default=0)
    return StepCosts(
        tokens=rows * length,
        forward=sum(part.forward for part in every),
        backward=sum(part.backward for part in every),
        recompute=sum(part.recompute for part in (*dropped, head)),
        saved=sum(part.saved for part in (*kept, ends, head)) + inputs + size_of(shared),
        saved_copies=saved_copies,
        peaks={
            "the end of the forward pass: bf16 copies of trained weights, a tile of logits": copies + tile,
            f"the loss: a tile of logits, its gradients in fp32{beside}": saved_copies + loss,
            f"a checkpointed layer, computed again{beside}": saved_copies + recomputed,
        },
    )


@functools.lru_cache(maxsize=8)
def _counted_model(config: bytes, *how: Any) -> CountedModel:
    """The same for the same config, which is not hashable."""
    return CountedModel(pickle.loads(config), *how)


def _head(model: CountedModel, x: Tensor, trained: Collection[str]) -> tuple[Counted, int, int]:
    """TRL's product of hidden states with the vocabulary; and bytes of a tile of logits, and of its backward pass."""
    weight = model.model.get_output_embeddings().weight
    numel, trains = weight.numel(), any(model.model.get_parameter(name) is weight for name in trained)
    rows, length, width = x.shape
    positions = rows * (length - 1)  # nothing is predicted from the last token
    forward, gradients = 2 * positions * numel, x.requires_grad + trains
    # Hidden states, the next tokens, the normalizer and the entropy of each distribution, and what is not trained on.
    saved = positions * (width * x.element_size() + 8 + 4 + 4 + 1) if gradients else 0
    tokens, words = min(TILE_TOKENS, positions), min(TILE_WORDS, numel // width)
    tile = 2 * (tokens * (words + width) + words * width)
    loss = tile + 4 * (positions * width * x.requires_grad + numel * trains)
    return Counted(forward, forward * gradients, forward * bool(gradients), saved), tile, loss


def fewest_checkpointed_layers(costs: Callable[[range], StepCosts], count: int, available: float) -> int | None:
    """The fewest of `count` layers, the first ones, with which a micro-batch takes so many bytes; None if none do."""
    return next((n for n in range(count + 1) if costs(range(n)).peak <= available), None)
