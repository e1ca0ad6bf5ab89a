"""What a model is made of: layers -> blocks -> units, read off the module tree; weights may be on `meta`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, KeysView
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from hft.errors import HFTError, shorten
from hft.model.layouts import EXPERTS, FUSED, Box, Shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BLOCKS = ("attention", "mlp", "experts", "router", "norm")

# Roles of matrices, by the names that Llama gave them, and the block that each belongs to. DeepSeek's attention has
# low-rank pairs instead of some.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
ROLES = dict.fromkeys(ATTENTION, "attention") | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp")

# What other families call a role. GPT-2's `c_proj` closes the attention or the MLP, whichever it stands in.
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
    "output_linear": "down_proj",  # Granite's shared MLP
}
# Of Mixtral, Qwen, OLMo and Hunyuan; a gate of an MLP is a `gate_proj`.
ROUTERS = ("gate", "router", "shared_expert_gate", "wg")
# Per-head logits that compete with the keys' (GPT-OSS). They belong to the queries as a bias does.
SINKS = "sinks"
# Attention to an encoder's output. Without an encoder it never gets a gradient.
CROSS_ATTENTION = ("encoder_attn", "cross_attn", "crossattention")
# What may stand outside the layers besides embeddings, the head and norms: OPT-350M's embeddings are narrower.
OUTSIDE = ("project_in", "project_out")


@dataclass(frozen=True)
class Part:
    """What of one parameter belongs to a unit: all of it, or ranges of a fused or stacked tensor."""

    parameter: str  # its name, as in `model.named_parameters()`
    shape: tuple[int, ...]  # its whole shape
    # the ranges; dimensions that a box does not name are taken whole. Without boxes it is the whole parameter
    boxes: tuple[Box, ...] = ()

    @property
    def numel(self) -> int:
        ranges = ([len(range(*interval)) for interval in box] for box in self.boxes or ((),))
        return sum(math.prod([*sizes, *self.shape[len(sizes) :]]) for sizes in ranges)

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
        kind: its role by Llama's name, e.g. `q_proj`, in every family; for a norm, its own name.
        parts: the parameters, or ranges of them, that it consists of.
    """

    name: str
    layer: int
    block: str
    kind: str
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(part.parameter for part in self.parts)

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)


@dataclass(frozen=True)
class Anatomy:
    """The units of every layer in model order, and the parameters outside the layers.

    Attributes:
        units: every unit, layer by layer.
        num_layers: how many layers there are.
        embeddings: number of elements of each embedding, including learned positions, and of the head; tied ones count
            once.
        others: number of elements of the other parameters outside the layers, which train: the final norm, and heads
            such as a reward model's `score`.
        towers: number of elements of each parameter of a vision or audio tower and its projector; they never train.
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
        layers: list[list[Unit]] = [[] for _ in range(self.num_layers)]
        for unit in self.units:
            layers[unit.layer].append(unit)
        return layers

    @functools.cached_property
    def parts_by_parameter(self) -> dict[str, list[tuple[Unit, Part]]]:
        """Of each parameter in the layers, in model order, the units that it holds and what of it belongs to them."""
        parts: dict[str, list[tuple[Unit, Part]]] = {}
        for unit in self.units:
            for part in unit.parts:
                parts.setdefault(part.parameter, []).append((unit, part))
        return parts

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter in the layers, in model order."""
        return {name: parts[0][1].shape for name, parts in self.parts_by_parameter.items()}

    @functools.cached_property
    def numels(self) -> dict[str, int]:
        """Elements of each parameter, those in the layers first."""
        inside = {name: math.prod(shape) for name, shape in self.shapes.items()}
        return inside | self.embeddings | self.others | self.towers

    @functools.cached_property
    def outside_layers(self) -> KeysView[str]:
        """Names of the parameters outside the layers: embeddings and head, others, towers."""
        return (self.embeddings | self.others | self.towers).keys()

    @property
    def grouped_query(self) -> bool:
        """Whether keys and values are narrower than queries."""
        numels = {unit.kind: unit.numel for unit in self.units if unit.block == "attention"}
        return numels.get("k_proj") != numels.get("q_proj")

    @property
    def numel_in_layers(self) -> int:
        """Number of parameters in the layers: the denominator of the paper's ratios (section 1, footnote 1)."""
        return sum(unit.numel for unit in self.units)

    @property
    def numel(self) -> int:
        """Number of parameters in the whole model, tied ones counted once."""
        return sum(self.numels.values())


def architecture_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of a config's language model, whole if it is multimodal, or of the reward model that was saved."""
    import transformers

    classifier = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if classifier and config.architectures == [classifier.__name__]:
        return classifier
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        # A class may stand for the text tower alone and take only the config of that, e.g. Llama 4's.
        if type(config) in mapping and mapping[type(config)].config_class not in config.sub_configs.values():
            return mapping[type(config)]
    raise HFTError(f"model type {config.model_type!r} has no causal language model in transformers")


def meta_model(config: PretrainedConfig, auto_class: type | None = None) -> PreTrainedModel:
    """The model of a config, or of another of transformers' auto classes, on the `meta` device, without storage."""
    with torch.device("meta"):
        return auto_class.from_config(config) if auto_class else architecture_of(config)(config)


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Read layers, blocks and units off a model's module tree.

    Args:
        model: a decoder-only model, or one with a text decoder beside other towers, on any device, `meta` included.

    Raises:
        HFTError: the model is not decoder-only, two layers share a parameter, or a parameter belongs to no known unit:
            freezing only what is recognized would silently train the rest.
    """
    if not hasattr(model, "config"):
        raise HFTError(f"only a transformers model can be divided; give the one inside {type(model).__name__}")
    prefix, layers = layers_of(model)
    config = model.config.get_text_config()
    units: list[Unit] = []
    unknown: dict[str, str] = {}  # of each module, by its path in a layer, the first
    for index, layer in enumerate(layers):
        for path, shapes in _modules_of(layer).items():
            found = list(_units_of(path, layer.get_submodule(path), shapes, config))
            if not found:
                unknown.setdefault(path, ", ".join(f"{prefix}.{index}.{name}" for name in shapes))
            for block, kind, suffix, boxes in found:
                parts = tuple(Part(f"{prefix}.{index}.{name}", shapes[name], of) for name, of in boxes.items())
                units.append(Unit(f"{prefix}.{index}.{path}{suffix}", index, block, kind, parts))
    if unknown:
        raise HFTError(
            f"{type(model).__name__} cannot be divided: these parameters of its layers belong to no known unit: "
            f"{shorten(list(unknown.values()))}; describe the family in hft/model/layouts.py"
        )
    return Anatomy(tuple(units), len(layers), *_outside(model, prefix, {p for unit in units for p in unit.parameters}))


def _modules_of(layer: nn.Module) -> dict[str, Shapes]:
    """The parameters of each module of a layer that has any, with their shapes, named from the layer."""
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    modules: dict[str, Shapes] = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        queries = f"{path}.q_proj"
        modules.setdefault(queries if leaf == SINKS and f"{queries}.weight" in shapes else path, {})[name] = shape
    return modules


def _units_of(
    path: str, module: nn.Module, shapes: Shapes, config: PretrainedConfig
) -> Iterator[tuple[str, str, str, dict[str, tuple[Box, ...]]]]:
    """The block, kind, suffix of the name, and boxes by parameter, of each unit in a module; nothing if unknown."""
    parent, _, leaf = path.rpartition(".")
    in_attention = "attn" in parent or "attention" in parent
    whole: dict[str, tuple[Box, ...]] = dict.fromkeys(shapes, ())
    if "Norm" in type(module).__name__:
        yield "norm", leaf, "", whole
    elif leaf in ROUTERS and not in_attention:
        yield "router", leaf, "", whole
    elif leaf == "experts" and config.model_type in EXPERTS:
        local = {name.removeprefix(f"{path}."): shape for name, shape in shapes.items()}
        for suffix, role, boxes in EXPERTS[config.model_type](local):
            yield "experts", role, suffix, {f"{path}.{name}": of for name, of in boxes.items()}
    elif layout := FUSED.get((config.model_type, leaf)):
        # The output dimension is the last one of GPT-2's Conv1D and the first one of a Linear.
        dim = 1 if type(module).__name__ == "Conv1D" else 0
        before = {name: tuple((0, size) for size in shape[:dim]) for name, shape in shapes.items() if len(shape) > 1}
        for role, ranges in layout(config, shapes[f"{path}.weight"][dim]).items():
            boxes = {name: tuple((*before.get(name, ()), one) for one in ranges) for name in shapes}
            yield ROLES[role], role, f".{role}", boxes
    else:
        role = OTHER_NAMES.get(leaf, leaf)
        if leaf == "c_proj":  # GPT-2, StarCoder
            role = "o_proj" if in_attention else "down_proj"
        if role in ROLES and (ROLES[role] == "attention") == in_attention:
            yield ROLES[role], role, "", whole


def _outside(model: PreTrainedModel, prefix: str, inside: set[str]) -> tuple[dict[str, int], ...]:
    """Embeddings and head, other parameters beside the layers, and towers with what joins them to the text decoder."""
    text = prefix.rpartition(".")[0] + "."
    learned = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and name.startswith(text)]
    ends = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
    embedding = {id(parameter) for module in (*learned, *ends) for parameter in module.parameters(recurse=False)}
    in_base = {id(parameter) for parameter in model.base_model.parameters()}
    is_multimodal = model.config.get_text_config() is not model.config
    parameters = dict(model.named_parameters())
    if shared := inside - parameters.keys():
        raise HFTError(f"{type(model).__name__} has layers that share parameters: {shorten(sorted(shared))}")
    embeddings, others, towers, unknown = {}, {}, {}, {}
    for name in (name for name in parameters if name not in inside):
        path, key = name.rpartition(".")[0], id(parameters[name])
        module = model.get_submodule(path)
        is_norm = "Norm" in type(module).__name__ or path.rpartition(".")[2] in OUTSIDE
        if key in embedding:
            kind = embeddings
        elif is_multimodal and key in in_base and not name.startswith(text):
            kind = towers
        elif (is_norm and name.startswith(text)) or (isinstance(module, nn.Linear) and key not in in_base):
            kind = others
        else:
            kind = unknown
        kind[name] = parameters[name].numel()
    if unknown:
        why = f"these parameters outside its layers are not embeddings, heads or norms: {shorten(list(unknown))}"
        raise HFTError(f"{type(model).__name__} cannot be divided: {why}")
    return embeddings, others, towers


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and the layers of the text decoder; a vision tower inside it may have as many, further down."""
    text = model.config.get_text_config()
    refused = f"only decoder-only models can be divided, and {type(model).__name__}"
    if model.config.is_encoder_decoder or text.is_encoder_decoder:
        raise HFTError(f"{refused} is an encoder-decoder")
    if (count := getattr(text, "num_hidden_layers", None)) is None:
        raise HFTError(f"{refused} has no num_hidden_layers in its config")
    decoder = model.get_decoder()
    lists = [(path, m) for path, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise HFTError(f"{refused} has no list of {count} layers")
    path, layers = min(lists, key=lambda found: found[0].count("."))
    if crossed := {leaf for name, _ in layers.named_modules() if (leaf := name.rpartition(".")[2]) in CROSS_ATTENTION}:
        raise HFTError(f"{refused} attends to an encoder in its layers, by {', '.join(crossed)}")
    prefix = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    return prefix + path, layers
