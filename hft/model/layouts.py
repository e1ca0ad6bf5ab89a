"""Which ranges of a fused or stacked tensor each matrix has, family by family.

One name means different orders in different families, so a tensor is divided only in the families listed here, by
`model_type` of the text config. `tests/model/test_architectures.py` proves each by what the model computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The (start, stop) or (start, stop, step) of each leading dimension of a parameter.
Range = tuple[int, int] | tuple[int, int, int]
Box = tuple[Range, ...]
Shapes = dict[str, tuple[int, ...]]
Ranges = dict[str, list[Range]]  # of output features, by role


def _groups(count: int, sizes: dict[str, int]) -> Ranges:
    """Equal groups one after the other; within each, the roles in this order, with so many features each."""
    ranges: Ranges = {role: [] for role in sizes}
    start = 0
    for _ in range(count):
        for role, size in sizes.items():
            ranges[role].append((start, start + size))
            start += size
    return ranges


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _consecutive(config: PretrainedConfig, features: int) -> Ranges:
    """All queries, all keys, all values; there may be fewer heads of keys and values."""
    queries = config.num_attention_heads * _head_dim(config)
    keys = (features - queries) // 2
    return _groups(1, {"q_proj": queries, "k_proj": keys, "v_proj": keys})


def _per_head(config: PretrainedConfig, features: int) -> Ranges:
    """Of each head its query, key and value."""
    return _groups(config.num_attention_heads, dict.fromkeys(("q_proj", "k_proj", "v_proj"), _head_dim(config)))


def _by_query(config: PretrainedConfig, features: int) -> Ranges:
    """Three layouts: of each group its queries, a key and a value; one key and value for all; or head by head."""
    if getattr(config, "new_decoder_architecture", False):
        groups, width = config.num_kv_heads, _head_dim(config)
        queries = config.num_attention_heads // groups * width
        return _groups(groups, {"q_proj": queries, "k_proj": width, "v_proj": width})
    return (_consecutive if config.multi_query else _per_head)(config, features)


def _codegen(config: PretrainedConfig, features: int) -> Ranges:
    """As it was split over four TPU cores: of each a quarter of the queries, of the values, and of the keys."""
    return _groups(4, dict.fromkeys(("q_proj", "v_proj", "k_proj"), features // 12))


def _gate_then_up(config: PretrainedConfig, features: int) -> Ranges:
    return _groups(1, dict.fromkeys(("gate_proj", "up_proj"), features // 2))


# By model type and module: the ranges of output features, from the config and the number of features.
FUSED: dict[tuple[str, str], Callable[[PretrainedConfig, int], Ranges]] = {
    ("codegen", "qkv_proj"): _codegen,
    ("falcon", "query_key_value"): _by_query,
    ("gpt_bigcode", "c_attn"): _by_query,
    ("gpt2", "c_attn"): _consecutive,
    ("mpt", "Wqkv"): _consecutive,
    ("openai-gpt", "c_attn"): _consecutive,
    ("phi3", "qkv_proj"): _consecutive,
}
FUSED |= {(family, "query_key_value"): _per_head for family in ("bloom", "gpt_neox", "persimmon")}
GATE_UP = ("glm", "glm4", "glm4v_text", "glm_ocr_text", "minimax_m3_vl_text", "phi3")
FUSED |= {(family, "gate_up_proj"): _gate_then_up for family in GATE_UP}
FUSED |= {(family, "input_linear"): _gate_then_up for family in ("granitemoehybrid", "granitemoeshared")}


def _stacked(
    shapes: Shapes, *, transposed: bool = False, interleaved: bool = False
) -> Iterator[tuple[str, str, dict[str, tuple[Box, ...]]]]:
    """The suffix, role and boxes of every expert's matrices, with their biases.

    gate_up_proj is (experts, 2 x width, hidden), down_proj (experts, hidden, width); `transposed` ones are (experts,
    in, out). Features of gate and up alternate if they are `interleaved`; otherwise all of gate come first.
    """
    whole = shapes["gate_up_proj"]
    twice = whole[2 if transposed else 1]
    gate, up = ((0, twice, 2), (1, twice, 2)) if interleaved else ((0, twice // 2), (twice // 2, twice))
    before: Box = ((0, whole[1]),) if transposed else ()
    for expert in range(whole[0]):
        one = (expert, expert + 1)
        for role, features in (("gate_proj", gate), ("up_proj", up)):
            boxes = {"gate_up_proj": ((one, *before, features),), "gate_up_proj_bias": ((one, features),)}
            yield f".{expert}.{role}", role, {name: boxes[name] for name in boxes if name in shapes}
        down = [name for name in ("down_proj", "down_proj_bias") if name in shapes]
        yield f".{expert}.down_proj", "down_proj", dict.fromkeys(down, ((one,),))


# fmt: off
STACKED = (
    "axk1", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "exaone_moe", "flex_olmo", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe_text", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
    "hunyuan_v1_moe", "hy_v3", "kolibri1", "mellum", "minimax_m2", "minimax_m3_vl_text", "mistral4", "mixtral",
    "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_omni_moe_text", "qwen3_vl_moe_text", "solar_open",
)
# fmt: on
# By model type: how a module named `experts` stacks them.
EXPERTS = dict.fromkeys(STACKED, _stacked) | {
    "gpt_oss": functools.partial(_stacked, transposed=True, interleaved=True),
    "llama4_text": functools.partial(_stacked, transposed=True),
}
