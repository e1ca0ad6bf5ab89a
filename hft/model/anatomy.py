"""What a model is made of: layers -> blocks -> units, read off the module tree; weights may be on `meta`."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from hft.errors import HFTError, shorten

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BLOCKS = ("attention", "mlp", "experts", "router", "norm")

# Roles of matrices, by the names that Llama gave them, and the block that each belongs to. DeepSeek's attention has
# low-rank pairs in the place of some.
ROLES = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "attention",
    "q_a_proj": "attention",
    "q_b_proj": "attention",
    "kv_a_proj_with_mqa": "attention",
    "kv_b_proj": "attention",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}

# What other families call a role. `c_proj` and `dense` close the attention or the MLP, whichever they stand in.
OTHER_NAMES = {
    "out_proj": "o_proj",  # OPT, GPT-J, MPT
    "dense": "o_proj",  # GPT-NeoX, Falcon, BLOOM, Phi
    "fc1": "up_proj",  # OPT, Phi
    "fc2": "down_proj",
    "fc_in": "up_proj",  # GPT-J
    "fc_out": "down_proj",
    "dense_h_to_4h": "up_proj",  # GPT-NeoX, Falcon, BLOOM
    "dense_4h_to_h": "down_proj",
    "c_fc": "up_proj",  # GPT-2, StarCoder 2
}
ROUTERS = ("gate", "router", "shared_expert_gate")  # of Mixtral, Qwen and OLMo; a gate of an MLP is a `gate_proj`

# A (start, stop) for each leading dimension of a parameter.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """What of one parameter belongs to a unit: all of it, or ranges of a fused or stacked tensor.

    Attributes:
        parameter: its name, as in `model.named_parameters()`.
        shape: its whole shape.
        boxes: the ranges; dimensions that a box does not name are taken whole. Without boxes it is the whole parameter.
    """

    parameter: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements in it."""
        return sum(
            math.prod(stop - start for start, stop in box) * math.prod(self.shape[len(box) :])
            for box in self.boxes or ((),)
        )

    def mark(self, mask: torch.Tensor, value: bool) -> None:
        """Write a value wherever this part lies in a mask that broadcasts to the parameter."""
        for box in self.boxes or ((),):
            mask[tuple(itertools.starmap(slice, box))] = value


@dataclass(frozen=True)
class Unit:
    """What is frozen or trained as a whole: a matrix with its bias, or a norm.

    Attributes:
        name: module path, e.g. `model.layers.3.self_attn.q_proj`; where a module fuses several units or stacks
            experts, followed by the expert and the role, e.g. `model.layers.3.mlp.experts.7.gate_proj`.
        layer: index of its layer, from 0.
        block: one of `BLOCKS`.
        kind: its role under Llama's name, e.g. `q_proj`, whatever the model calls it; of a norm its own name.
        parts: what of which parameters it is made of.
    """

    name: str
    layer: int
    block: str
    kind: str
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that it touches."""
        return tuple(part.parameter for part in self.parts)

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(part.numel for part in self.parts)


@dataclass(frozen=True)
class Anatomy:
    """The units of every layer in model order, and the parameters outside the layers.

    Attributes:
        units: every unit, layer by layer.
        num_layers: number of layers.
        embeddings: elements of each embedding, of learned positions too, and of the head; a tied one is not listed
            twice.
        others: elements of the other parameters outside the layers: the final norm.
        towers: elements of each parameter of a vision or audio tower and what joins it to the text; they never train.
    """

    units: tuple[Unit, ...]
    num_layers: int
    embeddings: dict[str, int]
    others: dict[str, int]
    towers: dict[str, int] = field(default_factory=dict)

    def layer(self, index: int, block: str | None = None) -> list[Unit]:
        """The units of one layer, or of one of its blocks."""
        return [unit for unit in self.layers[index] if block in (None, unit.block)]

    @functools.cached_property
    def layers(self) -> list[list[Unit]]:
        """The units of each layer."""
        layers: list[list[Unit]] = [[] for _ in range(self.num_layers)]
        for unit in self.units:
            layers[unit.layer].append(unit)
        return layers

    @property
    def grouped_query(self) -> bool:
        """Whether keys and values are narrower than queries."""
        numels = {unit.kind: unit.numel for unit in self.units if unit.block == "attention"}
        return numels.get("k_proj") != numels.get("q_proj")

    @property
    def numel_in_layers(self) -> int:
        """Parameters in the layers: the denominator of the paper's ratios (section 1, footnote 1)."""
        return sum(unit.numel for unit in self.units)

    @property
    def numel(self) -> int:
        """Parameters in the whole model, tied parameters counted once."""
        return self.numel_in_layers + sum(
            itertools.chain(*(d.values() for d in (self.embeddings, self.others, self.towers)))
        )


def architecture_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of a config's language model; of a vision-language model the whole one, whose text tower is trained.

    Raises:
        HFTError: transformers knows no causal language model for this config.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise HFTError(f"model type {config.model_type!r} has no causal language model in transformers")


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The language model of a config on the `meta` device: a module tree with shapes and no storage.

    Raises:
        HFTError: transformers knows no causal language model for this config.
    """
    architecture = architecture_of(config)
    with torch.device("meta"):
        return architecture(config)


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Read layers, blocks and units off a model's module tree.

    Args:
        model: a decoder-only model, or one with a text decoder beside other towers, on any device, `meta` included.

    Raises:
        HFTError: the model has no list of layers, or a layer holds modules that are not known units; their paths are
            named, since freezing only what is recognized would train the rest in silence.
    """
    config = model.config.get_text_config()
    prefix, layers = _find_layers(model, config.num_hidden_layers)

    units, unknown = [], []
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            if not (shapes := {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}):
                continue
            name = f"{prefix}.{index}.{path}" if path else f"{prefix}.{index}"
            block, parts = _units_of(path, module, shapes, config)
            if block is None:
                unknown += [f"{name}.{parameter}" for parameter in shapes] if not path else [name]
            for suffix, kind, own in parts:
                whole = tuple(Part(f"{name}.{parameter}", shapes[parameter], boxes) for parameter, boxes in own)
                units.append(Unit(name + suffix, index, block, kind, whole))
    if unknown:
        raise HFTError(
            f"{type(model).__name__} has modules in its layers that are not known units: {shorten(unknown)}; "
            f"known are {', '.join([*ROLES, *OTHER_NAMES])}, fused and stacked ones of these, routers and norms"
        )

    inside = {name for unit in units for name in unit.parameters}
    text = prefix.rpartition(".")[0] + "."
    learned = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and name.startswith(text)]
    ends = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
    embedding = {id(parameter) for module in (*learned, *ends) for parameter in module.parameters()}
    embeddings, others, towers = {}, {}, {}
    for name, parameter in model.named_parameters():
        if name not in inside:
            end = embeddings if id(parameter) in embedding else others if name.startswith(text) else towers
            end[name] = parameter.numel()
    return Anatomy(tuple(units), len(layers), embeddings, others, towers)


# The units of a module: suffix of the name, kind, and boxes of each of the module's parameters.
_Parts = list[tuple[str, str, list[tuple[str, tuple[Box, ...]]]]]


def _units_of(path: str, module: nn.Module, shapes: dict, config: PretrainedConfig) -> tuple[str | None, _Parts]:
    parent, _, own = path.rpartition(".")
    whole = [(parameter, ()) for parameter in shapes]
    if type(module).__name__.endswith("Norm"):
        return "norm", [("", own, whole)]
    if own in ROUTERS:
        return "router", [("", own, whole)]
    if (
        own == "experts"
        and set(shapes) == {"gate_up_proj", "down_proj"}
        and not getattr(module, "is_transposed", False)
    ):
        return "experts", _stacked(shapes)
    # The output dimension is the last one of GPT-2's Conv1D and the first one of a Linear.
    dim = 1 if type(module).__name__ == "Conv1D" else 0
    if "weight" in shapes and (roles := _fused(own, shapes["weight"][dim], config)):
        fused = []
        for role, ranges in roles.items():
            boxes = [(p, tuple(_along(dim if len(s) > 1 else 0, r, s) for r in ranges)) for p, s in shapes.items()]
            fused.append((f".{role}", role, boxes))
        return ROLES[role], fused
    role = OTHER_NAMES.get(own, own)
    if own == "c_proj":  # GPT-2, StarCoder
        role = "o_proj" if "attn" in parent else "down_proj"
    return ROLES.get(role), [("", role, whole)] if role in ROLES else []


def _along(dim: int, interval: tuple[int, int], shape: tuple[int, ...]) -> Box:
    return (*((0, size) for size in shape[:dim]), interval)


def _stacked(shapes: dict[str, tuple[int, ...]]) -> _Parts:
    """Experts as transformers 5 stacks them: gate_up_proj (experts, 2 x width, in), down_proj (experts, in, width)."""
    experts, twice, _ = shapes["gate_up_proj"]
    units = []
    for e in range(experts):
        one = (e, e + 1)
        units.append((f".{e}.gate_proj", "gate_proj", [("gate_up_proj", ((one, (0, twice // 2)),))]))
        units.append((f".{e}.up_proj", "up_proj", [("gate_up_proj", ((one, (twice // 2, twice)),))]))
        units.append((f".{e}.down_proj", "down_proj", [("down_proj", ((one,),))]))
    return units


def _fused(own: str, features: int, config: PretrainedConfig) -> dict[str, list[tuple[int, int]]]:
    """The ranges of output features of each role in a fused projection; empty if the module is not a known one."""
    if own == "gate_up_proj":  # Phi-3, GLM
        return {"gate_proj": [(0, features // 2)], "up_proj": [(features // 2, features)]}
    if own not in ("qkv_proj", "query_key_value", "c_attn", "Wqkv"):
        return {}
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    family = config.model_type
    if family in ("gpt_neox", "bloom") or (family, getattr(config, "multi_query", True)) == ("gpt_bigcode", False):
        return _interleaved(heads, 1, width)
    if family == "falcon" and config.new_decoder_architecture:
        return _interleaved(config.num_kv_heads, heads // config.num_kv_heads, width)
    if family == "falcon":
        return _interleaved(1, heads, width) if config.multi_query else _interleaved(heads, 1, width)
    if family == "gpt_bigcode":
        return _interleaved(1, heads, width)
    # Phi-3, GPT-2, MPT: one after the other.
    q = heads * width
    kv = (features - q) // 2
    return {"q_proj": [(0, q)], "k_proj": [(q, q + kv)], "v_proj": [(q + kv, q + 2 * kv)]}


def _interleaved(groups: int, queries: int, width: int) -> dict[str, list[tuple[int, int]]]:
    """Groups of heads one after the other, each its queries, a key and a value."""
    group = (queries + 2) * width
    starts = range(0, groups * group, group)
    key, value = queries * width, (queries + 1) * width
    return {
        "q_proj": [(start, start + key) for start in starts],
        "k_proj": [(start + key, start + value) for start in starts],
        "v_proj": [(start + value, start + group) for start in starts],
    }


def _find_layers(model: PreTrainedModel, count: int) -> tuple[str, nn.ModuleList]:
    """The layers of the text decoder; a vision tower may have a list of the same length."""
    decoder = model.get_decoder()
    prefix = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    lists = [(name, m) for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise HFTError(f"{type(model).__name__} has no list of {count} layers; only decoder-only models are known")
    name, layers = lists[0]
    return prefix + name, layers
