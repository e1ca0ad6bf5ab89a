"""What a step of a run costs, in closed form: FLOPs, and bytes that autograd keeps between forward and backward.

No weights are needed, and no pass is run: `hft.planning.exact` runs one on fake tensors, and the two agree.

- FLOPs are those of matrix products, two for each multiplication with its addition, as torch's `FlopCounterMode` has
  them. Attention is the full square, not its causal half, and as eager attention computes it.
- A weight that trains, wholly or in part, costs the gradient of the whole weight. What lies below everything that
  trains costs no backward pass, unless activation checkpointing is on: transformers then asks for the gradient of the
  embeddings.
- Checkpointed layers are computed again as far as the last tensor that their backward pass needs, which leaves out
  their last product.
- The head is TRL's: it never holds all logits, and computes them a second time in the backward pass.
- Rows are as long as they may be, without padding, and every token is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hft.errors import HFTError
from hft.planning.layers import Shape, layer, norm, why_not_known
from hft.planning.tape import BFLOAT16, FLOAT32, MIXED, Precision, Tape, Value  # noqa: F401

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hft.selection import Selection

# Of TRL's head: tokens and words of the vocabulary that it has logits of at once (trl/kernels/chunked_logprob.py).
TILE_TOKENS, TILE_WORDS = 4096, 32768


@dataclass(frozen=True)
class LayerCosts:
    """One layer, kept or checkpointed.

    Attributes:
        forward: FLOPs.
        backward: FLOPs.
        recompute: FLOPs if it is checkpointed.
        saved: bytes if it is not checkpointed.
        input: bytes of its input, which is what is saved if it is checkpointed.
        rotary: bytes of cosines and sines, which all layers share, if it saves them.
        copies: bytes of its trained weights in bf16, which autocast keeps until the forward pass ends.
        saved_copies: bytes of those that autograd keeps beyond it if the layer is not checkpointed.
    """

    forward: int
    backward: int
    recompute: int
    saved: int
    input: int
    rotary: int
    copies: int
    saved_copies: int


@dataclass(frozen=True)
class StepCosts:
    """One micro-batch on one device.

    Attributes:
        tokens: that go through the model, both sequences of each pair in DPO.
        forward: FLOPs.
        backward: FLOPs of gradients, of weights and of activations.
        recompute: FLOPs of what is computed a second time: checkpointed layers and the logits.
        reference: FLOPs of DPO's reference model.
        layers: bytes that layers save which are not checkpointed.
        inputs: bytes of the inputs of checkpointed layers.
        ends: bytes that embeddings, the last norm and the loss save.
        copies: bytes of trained weights in bf16, which autocast keeps until the forward pass ends.
        saved_copies: bytes of those that autograd keeps beyond it.
        recomputed: bytes that the largest checkpointed layer takes while its backward pass runs.
        tile: bytes of a tile of logits, in the forward pass.
        loss: bytes that the backward pass of the loss takes for the moment: a tile of logits, and gradients in fp32.
    """

    tokens: int
    forward: int
    backward: int
    recompute: int
    reference: int
    layers: int
    inputs: int
    ends: int
    copies: int
    saved_copies: int
    recomputed: int
    tile: int
    loss: int

    @property
    def flops(self) -> int:
        """All FLOPs of the micro-batch."""
        return self.forward + self.backward + self.recompute + self.reference

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
        }

    @property
    def transient(self) -> int:
        """The most bytes beside the activations at one time."""
        return max(self.peaks.values())

    @property
    def peak_at(self) -> str:
        """When that is, in words."""
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
    reference: bool = False,
    attention: str | None = None,
    padded: bool = False,
    fused_head: bool = True,
) -> StepCosts:
    """What one micro-batch costs.

    Args:
        model_config: the model's.
        selection: what trains.
        rows: sequences, two for each pair of DPO.
        length: tokens of each.
        checkpointed: layers whose activations are recomputed.
        precision: of weights and matrix products.
        reference: whether a reference model computes the same sequences.
        attention: transformers' name of an implementation; by default the model's own.
        padded: whether some rows are shorter than others, so that attention needs a mask.
        fused_head: TRL's head; otherwise the model's logits.

    Raises:
        HFTError: it is not known for this model.
    """
    config = model_config.get_text_config()
    if sentence := why_not_known(config):
        raise HFTError(sentence)
    width = precision.trained.itemsize  # that of the embeddings
    shape = Shape.of(config, rows, length, attention=attention, padded=padded, stream=width)
    tape, weights = Tape(precision.compute), _weights(selection, precision)
    by_layer = _by_layer(weights, selection)
    rotary = Value(2 * length * shape.head_dim, width, grad=False)

    embedding = weights[next(iter(selection.anatomy.embeddings))]
    x = Value(shape.tokens * shape.hidden, width, embedding.grad or bool(checkpointed))
    if embedding.grad:
        tape.save(Value(shape.tokens, 8, grad=False))  # the tokens
    found, alike = [], {}
    for own in by_layer:  # layers that train the same units cost the same
        key = (x.grad, tuple((name, value.grad) for name, value in own.items()))
        if key not in alike:
            alike[key] = _layer_costs(shape, own, x.grad, width, rotary, precision)
        costs, grad = alike[key]
        found.append(costs)
        x = Value(x.numel, width, grad)
    before = tape.forward
    x = norm(tape, shape, weights[next(name for name in selection.anatomy.others)], x)
    words = weights[list(selection.anatomy.embeddings)[-1]]
    again = _head(tape, shape, x, words, fused=fused_head)

    kept = [costs for index, costs in enumerate(found) if index not in checkpointed]
    dropped = [costs for index, costs in enumerate(found) if index in checkpointed]
    forward = sum(costs.forward for costs in found) + tape.forward - before
    return StepCosts(
        tokens=shape.tokens,
        forward=forward,
        backward=sum(costs.backward for costs in found) + tape.backward,
        recompute=sum(costs.recompute for costs in dropped) + again,
        reference=forward if reference else 0,
        layers=sum(costs.saved for costs in kept),
        inputs=sum(costs.input for costs in dropped),
        ends=tape.saved_bytes + max((costs.rotary for costs in kept), default=0),
        copies=sum(costs.copies for costs in found) + tape.copied_bytes,
        saved_copies=sum(costs.saved_copies for costs in kept) + tape.saved_copied_bytes,
        recomputed=max((costs.saved + costs.saved_copies for costs in dropped), default=0),
        **(_loss_bytes(shape, x, words) if fused_head else {"tile": 0, "loss": 0}),
    )


def _weights(selection: Selection, precision: Precision) -> dict[str, Value]:
    """Every parameter of the model."""
    anatomy, frozen = selection.anatomy, set(selection.frozen_parameters)
    numels = {name: math.prod(shape) for name, shape in anatomy.shapes.items()}
    first = next(iter(anatomy.embeddings))  # in model order, so that of the input
    weights = {}
    for name, numel in (numels | anatomy.embeddings | anatomy.others).items():
        grad = name not in frozen
        dtype = precision.trained if grad or name == first else precision.frozen
        weights[name] = Value(numel, dtype.itemsize, grad, is_parameter=True)
    return weights


def _by_layer(weights: dict[str, Value], selection: Selection) -> list[dict[str, Value]]:
    """The weights of each layer by their names in it, such as `mlp.up_proj.weight`."""
    layers: list[dict[str, Value]] = [{} for _ in range(selection.anatomy.num_layers)]
    for name, parts in selection.anatomy.parts_by_parameter.items():
        index = parts[0][0].layer
        layers[index][name.partition(f".{index}.")[2]] = weights[name]
    return layers


def _layer_costs(
    shape: Shape, weights: dict[str, Value], grad: bool, width: int, rotary: Value, precision: Precision
) -> tuple[LayerCosts, bool]:
    """One layer, and whether its output requires a gradient."""
    tape, x = Tape(precision.compute), Value(shape.tokens * shape.hidden, width, grad)
    out = layer(tape, shape, weights, x, rotary)
    shared = rotary.nbytes if rotary in tape.saved else 0
    return LayerCosts(
        forward=tape.forward,
        backward=tape.backward,
        recompute=tape.forward_at_last_save,
        saved=tape.saved_bytes - shared,
        input=x.nbytes if out.grad else 0,
        rotary=shared,
        copies=tape.copied_bytes,
        saved_copies=tape.saved_copied_bytes,
    ), out.grad


def _head(tape: Tape, shape: Shape, x: Value, words: Value, *, fused: bool) -> int:
    """The product with the vocabulary, and the FLOPs that its backward pass computes again."""
    if not fused:
        tape.linear(x, words, shape.hidden)
        return 0
    positions = shape.rows * (shape.length - 1)  # nothing is predicted from the last token
    flops = 2 * positions * words.numel
    tape.forward += flops
    tape.backward += flops * (x.grad + words.grad)
    if not (x.grad or words.grad):
        return 0
    # Hidden states, the next tokens, the normalizer and the entropy of each distribution, and what is not trained on.
    tape.save(Value(positions * shape.hidden, x.width, x.grad))
    tape.save(*(Value(positions, width, grad=False) for width in (8, 4, 4, 1)))
    return flops


def _loss_bytes(shape: Shape, x: Value, words: Value) -> dict[str, int]:
    """What TRL's head takes in its two passes: a tile of logits with what it is the product of; gradients in fp32."""
    vocabulary, positions = words.numel // shape.hidden, shape.rows * (shape.length - 1)
    tokens, tile = min(TILE_TOKENS, positions), min(TILE_WORDS, vocabulary)
    bf16 = 2 * (tokens * (tile + shape.hidden) + tile * shape.hidden)
    gradients = 4 * (positions * shape.hidden * x.grad + words.numel * words.grad)
    return {"tile": bf16, "loss": bf16 + gradients}


def layers_to_checkpoint(count: int, *, every: int = 1) -> range:
    """The layers that transformers checkpoints: each one whose index is a multiple of `every_n_layers`."""
    return range(0, count, every)


def fewest_checkpointed_layers(costs: Callable[[range], StepCosts], count: int, available: float) -> int | None:
    """The smallest number of layers, counted from the first, whose checkpointing makes a micro-batch fit.

    Args:
        costs: of a micro-batch, given the layers that are checkpointed; `functools.partial(costs_of, ...)` does.
        count: layers of the model.
        available: bytes of a device beside the state: weights, gradients, optimizer state, reference.

    Returns:
        The number of layers, 0 if none need be; None if all of them are not enough.
    """
    return next((n for n in range(count + 1) if costs(range(n)).peak <= available), None)
