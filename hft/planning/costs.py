"""What a step of a run costs: FLOPs, and bytes that autograd keeps between forward and backward.

- Attention is the full square, not its causal half, and what a flash kernel computes again is not counted.
- A weight that trains, wholly or in part, costs the gradient of the whole weight. One that trains in part is put
  together at each use, and kept with the activations. What lies below everything that trains costs no backward pass,
  unless activation checkpointing is on.
- The head is TRL's: it never holds all logits, and computes them a second time in the backward pass.
- Rows are as long as they may be, and every token is trained on.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hft.planning.counting import BFLOAT16, FLOAT32, MIXED, CountedModel, Precision  # noqa: F401

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

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
    layers: int  # bytes that layers save which are not checkpointed
    inputs: int  # bytes of the inputs of checkpointed layers
    ends: int  # bytes that embeddings, the last norm and the loss save
    copies: int  # bytes of trained weights in bf16, which autocast keeps until the forward pass ends
    saved_copies: int  # bytes of those that autograd keeps beyond it
    recomputed: int  # bytes that the largest checkpointed layer takes while its backward pass runs
    tile: int  # bytes of a tile of logits, in the forward pass
    loss: int  # bytes that the backward pass of the loss takes for the moment: a tile of logits, and gradients in fp32
    reference: int = 0  # FLOPs of what is computed without gradients, such as by a reference model
    strategy: int = 0  # FLOPs of a strategy's rows of a step, divided over its micro-batches
    sampling: int = 0  # FLOPs of the texts that a strategy samples before the first step; not of the micro-batch
    strategy_peak: int = 0  # bytes of activations and logits while a strategy's rows are computed

    @property
    def flops(self) -> int:
        """All FLOPs of the micro-batch."""
        return self.forward + self.backward + self.recompute + self.reference + self.strategy

    @property
    def saved(self) -> int:
        """Bytes of activations that autograd holds once the forward pass has ended."""
        return self.layers + self.inputs + self.ends

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes beside the activations at each time that may be the peak."""
        kept = " beside bf16 copies of weights" if self.saved_copies else ""
        return {
            "the end of the forward pass: bf16 copies of trained weights, a tile of logits": self.copies + self.tile,
            f"the loss: a tile of logits, its gradients in fp32{kept}": self.saved_copies + self.loss,
            f"a checkpointed layer, computed again{kept}": self.saved_copies + self.recomputed,
            "the rows of the strategy: all their logits": self.strategy_peak - self.saved,
        }

    @property
    def transient(self) -> int:
        """The most bytes beside the activations at one time."""
        return max(self.peaks.values())

    @property
    def peak_at(self) -> str:
        """The name of that time."""
        return max(self.peaks, key=self.peaks.get)

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
    for name in trained & anatomy.in_layers:
        index = anatomy.parts_by_parameter[name][0][0].layer
        by_layer[index][name.partition(f".{index}.")[2]] = name in selection.frozen_masks
    outside = trained.difference(anatomy.in_layers)
    ends, calls = model.ends(outside, layers_train=any(by_layer), checkpointed=bool(checkpointed))
    layers, grad = [], calls[0].x.requires_grad
    for kind, names in zip(model.kinds, by_layer, strict=True):
        in_part = frozenset(name for name, is_split in names.items() if is_split)
        layers.append(model.layer(kind, frozenset(names), in_part, grad=grad))
        grad = layers[-1].output.requires_grad
    kept = [layer for index, layer in enumerate(layers) if index not in checkpointed]
    dropped = [layer for index, layer in enumerate(layers) if index in checkpointed]
    shared = {storage: size for layer in kept for storage, size in layer.shared.items()}
    for index in checkpointed:  # what a layer is given by position is saved with its input
        if layers[index].output.requires_grad:
            shared |= model.calls[index].shared_by_position
    logits = _head(ends.output, *model.head(outside)) if fused_head else Head()
    return StepCosts(
        tokens=rows * length,
        forward=sum(part.forward for part in (*layers, ends, logits)),
        backward=sum(part.backward for part in (*layers, ends, logits)),
        recompute=sum(layer.recompute for layer in dropped) + logits.recompute,
        layers=sum(layer.saved for layer in kept),
        inputs=sum(calls[index].x.nbytes for index in checkpointed if layers[index].output.requires_grad),
        ends=ends.saved + logits.saved + sum(shared.values()),
        copies=sum(part.copies for part in (*layers, ends)),
        saved_copies=sum(part.saved_copies for part in (*kept, ends)),
        recomputed=max((layer.saved + layer.saved_copies for layer in dropped), default=0),
        tile=logits.tile,
        loss=logits.loss,
    )


@functools.lru_cache(maxsize=8)
def _counted_model(config: bytes, *how: Any) -> CountedModel:
    """The same for the same config, which is not hashable."""
    return CountedModel(pickle.loads(config), *how)


class Head(NamedTuple):
    """TRL's product with the vocabulary: FLOPs, saved bytes, and bytes of a tile in the forward and backward pass."""

    forward: int = 0
    backward: int = 0
    recompute: int = 0
    saved: int = 0
    tile: int = 0
    loss: int = 0


def _head(x: torch.Tensor, numel: int, trains: bool) -> Head:
    """Of hidden states of rows x length x width, and a weight of so many elements."""
    rows, length, width = x.shape
    positions = rows * (length - 1)  # nothing is predicted from the last token
    forward, gradients = 2 * positions * numel, x.requires_grad + trains
    # Hidden states, the next tokens, the normalizer and the entropy of each distribution, and what is not trained on.
    saved = positions * (width * x.element_size() + 8 + 4 + 4 + 1) if gradients else 0
    tokens, words = min(TILE_TOKENS, positions), min(TILE_WORDS, numel // width)
    tile = 2 * (tokens * (words + width) + words * width)
    loss = tile + 4 * (positions * width * x.requires_grad + numel * trains)
    return Head(forward, forward * gradients, forward * bool(gradients), saved, tile, loss)


def fewest_checkpointed_layers(costs: Callable[[range], StepCosts], count: int, available: float) -> int | None:
    """The fewest of `count` layers, from the first on, whose checkpointing makes a micro-batch fit; None if none do.

    `costs` gives a micro-batch by the checkpointed layers, `available` is what the state leaves of a device, in bytes.
    """
    return next((n for n in range(count + 1) if costs(range(n)).peak <= available), None)
