"""The forward pass of the layers of a few families on a tape, operation by operation as transformers has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hft.planning.tape import Tape, Value

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Families whose layers are followed here; tests/planning proves each against the model itself.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral", "qwen3_moe")
# Activation functions that save their input and nothing else.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
# Norms before and after attention and MLP, by whether there are two or four in a layer.
NORMS = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


@dataclass(frozen=True)
class Shape:
    """What of a config and a batch decides what a layer takes.

    Attributes:
        rows: sequences.
        length: tokens of each.
        hidden: width of the hidden state.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: width of each.
        is_eager: whether attention writes its weights out; otherwise it is a flash kernel.
        has_softcap: whether attention's logits are soft-capped.
        is_masked: whether a flash kernel needs a mask: rows are padded, or longer than a sliding window.
        experts_per_token: of a mixture of experts.
        scales_from_one: whether norms multiply by one plus their weight, in fp32.
        stream: bytes of an element of the hidden state.
    """

    rows: int
    length: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    is_eager: bool
    has_softcap: bool
    is_masked: bool
    experts_per_token: int
    scales_from_one: bool
    stream: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @classmethod
    def of(
        cls, config: PretrainedConfig, rows: int, length: int, *, attention: str | None, padded: bool, stream: int
    ) -> Shape:
        """The shape of a model and a batch.

        Args:
            config: the text model's.
            rows: sequences.
            length: tokens of each.
            attention: transformers' name of an implementation; by default the model's own.
            padded: whether some rows are shorter than others.
            stream: bytes of an element of the hidden state.
        """
        window = getattr(config, "sliding_window", None)
        return cls(
            rows=rows,
            length=length,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            is_eager=(attention or ("eager" if config.model_type == "gemma2" else "sdpa")) == "eager",
            has_softcap=getattr(config, "attn_logit_softcapping", None) is not None,
            is_masked=padded or (window is not None and length > window),
            experts_per_token=getattr(config, "num_experts_per_tok", 0),
            scales_from_one=config.model_type == "gemma2",
            stream=stream,
        )


def why_not_known(config: PretrainedConfig) -> str | None:
    """A sentence if the layers of this model are not followed here, else None."""
    if config.model_type not in FAMILIES:
        return (
            f"FLOPs and activations of model type {config.model_type} are not known; of {', '.join(FAMILIES)} they are"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        return f"FLOPs and activations with {activation} are not known; those with {', '.join(ACTIVATIONS)} are"
    if getattr(config, "attention_dropout", 0) or getattr(config, "router_jitter_noise", 0):
        return "FLOPs and activations with dropout are not known"
    return None


def layer(tape: Tape, shape: Shape, weights: Mapping[str, Value], x: Value, rotary: Value) -> Value:
    """One decoder layer.

    Args:
        tape: what it is recorded on.
        shape: of model and batch.
        weights: of the layer, by name in it.
        x: hidden states.
        rotary: cosines and sines of the positions, one after the other.

    Returns:
        Hidden states.
    """
    before, after, before_mlp, after_mlp = NORMS["pre_feedforward_layernorm.weight" in weights]

    def normed(name: str | None, y: Value) -> Value:
        return norm(tape, shape, weights[f"{name}.weight"], y) if name else y

    x = tape.add(x, normed(after, attention(tape, shape, weights, normed(before, x), rotary)))
    mlp = experts if "mlp.experts.gate_up_proj" in weights else dense
    return tape.add(x, normed(after_mlp, mlp(tape, shape, weights, normed(before_mlp, x))))


def norm(tape: Tape, shape: Shape, weight: Value, x: Value) -> Value:
    """An RMS norm, which computes in fp32."""
    wide = tape.cast(x, 4)
    tape.saving_input(wide)  # its square
    root = tape.saving_result(Value(x.numel // weight.numel, 4, x.grad))
    scaled = tape.multiply(wide, root)
    if shape.scales_from_one:
        return tape.cast(tape.multiply(scaled, Value(weight.numel, 4, weight.grad)), x.width)
    return tape.multiply(tape.cast(scaled, x.width), weight)


def attention(tape: Tape, shape: Shape, weights: Mapping[str, Value], x: Value, rotary: Value) -> Value:
    q, k, v = (tape.linear(x, weights[f"self_attn.{name}_proj.weight"], shape.hidden) for name in "qkv")
    if "self_attn.q_norm.weight" in weights:
        q = norm(tape, shape, weights["self_attn.q_norm.weight"], q)
        k = norm(tape, shape, weights["self_attn.k_norm.weight"], k)
    if q.grad or k.grad:
        tape.save(rotary)
    q, k = (Value(y.numel, max(y.width, rotary.width), y.grad) for y in (q, k))
    out = (eager_attention if shape.is_eager else flash_attention)(tape, shape, q, k, v)
    return tape.linear(out, weights["self_attn.o_proj.weight"], shape.heads * shape.head_dim)


def _repeated(shape: Shape, x: Value) -> Value:
    """Keys or values, once for each head of the queries."""
    groups = shape.heads // shape.kv_heads
    return x if groups == 1 else Value(x.numel * groups, x.width, x.grad)


def _products(shape: Shape) -> int:
    """FLOPs of queries by keys, or of attention weights by values: of the full square, as torch counts them."""
    return 2 * shape.rows * shape.heads * shape.length**2 * shape.head_dim


def flash_attention(tape: Tape, shape: Shape, q: Value, k: Value, v: Value) -> Value:
    """A kernel that saves queries, keys, values, its output and a log-sum-exp for each query and head.

    With a mask it takes keys and values once for each head, and every layer saves a mask of length x length for each
    row.

    Its backward pass makes the gradients of all three. FLOPs are those of eager attention: the products of queries and
    keys that the kernel computes again are not counted.
    """
    if shape.is_masked:
        k, v = _repeated(shape, k), _repeated(shape, v)
    q, k, v = (tape.cast(y, tape.compute) for y in (q, k, v))
    out = Value(q.numel, q.width, q.grad or k.grad or v.grad)
    if out.grad:
        tape.save(q, k, v, out, Value(shape.rows * shape.heads * shape.length, 4, grad=False))
        tape.save(*([Value(shape.rows * shape.length**2, q.width, grad=False)] if shape.is_masked else []))
    flops = _products(shape)
    tape.forward += 2 * flops
    tape.backward += 4 * flops * out.grad
    return out


def eager_attention(tape: Tape, shape: Shape, q: Value, k: Value, v: Value) -> Value:
    """Attention weights in fp32 and in the dtype of matrix products, each rows x heads x length x length."""
    k, v, size = _repeated(shape, k), _repeated(shape, v), shape.rows * shape.heads * shape.length**2
    logits = tape.matmul(q, k, _products(shape), size)
    if shape.has_softcap:
        logits = tape.saving_result(logits)
    probabilities = tape.cast(tape.saving_result(logits, 4), q.width)
    out = tape.matmul(probabilities, v, _products(shape), q.numel)
    return Value(out.numel, out.width, out.grad)


def dense(tape: Tape, shape: Shape, weights: Mapping[str, Value], x: Value) -> Value:
    gate, up = (tape.linear(x, weights[f"mlp.{name}_proj.weight"], shape.hidden) for name in ("gate", "up"))
    down = weights["mlp.down_proj.weight"]
    return tape.linear(tape.multiply(tape.saving_input(gate), up), down, down.numel // shape.hidden)


def experts(tape: Tape, shape: Shape, weights: Mapping[str, Value], x: Value) -> Value:
    """transformers' `grouped_mm`: tokens sorted by expert, one grouped product for each stacked weight.

    Autocast leaves it alone, so it computes in the dtype of the weights. A stacked weight that trains in part has its
    gradient computed whole. The load-balancing loss is not counted.
    """
    router, gate_up, down = (weights[f"mlp.{n}"] for n in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"))
    pairs, count = shape.tokens * shape.experts_per_token, router.numel // shape.hidden

    def grouped(y: Value, weight: Value) -> Value:
        y, per_row = tape.cast(y, weight.width), weight.numel // count  # elements of one expert's matrix
        return tape.matmul(y, weight, 2 * pairs * per_row, pairs * per_row // (y.numel // pairs), autocast=False)

    chosen = _routed(tape, shape, tape.linear(x, router, shape.hidden))
    if x.grad:  # which token each row is
        tape.save(Value(pairs, 8, False))
    both = grouped(Value(pairs * shape.hidden, x.width, x.grad), gate_up)
    if both.grad:  # the gate before and after its activation, and up; gate and up lie in one tensor
        tape.save(both, Value(both.numel // 2, both.width, True))
    out = tape.multiply(grouped(Value(both.numel // 2, both.width, both.grad), down), chosen)
    if out.grad:  # the way back to the order of the tokens
        tape.save(Value(pairs, 8, False))
    return Value(shape.tokens * shape.hidden, x.width, out.grad)


def _routed(tape: Tape, shape: Shape, logits: Value) -> Value:
    """The weights of the chosen experts, in fp32."""
    tokens, pairs = shape.tokens, shape.tokens * shape.experts_per_token
    chosen = Value(pairs, 4, tape.saving_result(logits, 4).grad)
    if chosen.grad:  # their indices and their order; what they are divided by, and what they were before
        tape.save(Value(pairs, 8, False), Value(pairs, 8, False), Value(tokens, 4, False), Value(pairs, 4, False))
    return chosen
