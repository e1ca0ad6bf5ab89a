"""What a model is made of: layers -> blocks -> units, read off the module tree; weights may be on `meta`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from hft.errors import HFTError

BLOCKS = ("attention", "mlp", "norm")

# The separate projections of Llama, Mistral, Qwen2, Qwen3, SmolLM, Gemma 2 and 3, and OLMo 2. Norms are known by
# their class, since their number and names differ: Gemma has four in a layer, Qwen3 norms its queries and keys.
PROJECTIONS = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "attention",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


@dataclass(frozen=True)
class Unit:
    """What is frozen or trained as a whole: a matrix with its bias, or a norm.

    Attributes:
        name: module path, e.g. `model.layers.3.self_attn.q_proj`.
        layer: index of its layer, from 0.
        block: one of `BLOCKS`.
        kind: last part of the name, e.g. `q_proj` or `input_layernorm`.
        parameters: names of its parameters, as in `model.named_parameters()`.
        size: number of scalars.
    """

    name: str
    layer: int
    block: str
    kind: str
    parameters: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Anatomy:
    """The units of every layer in model order, and the parameters outside the layers.

    Attributes:
        units: every unit, layer by layer.
        num_layers: number of layers.
        embeddings: scalars of each embedding and head parameter; a tied head is not listed twice.
        others: scalars of the other parameters outside the layers: the final norm.
        grouped_query: whether keys and values have fewer heads than queries.
    """

    units: tuple[Unit, ...]
    num_layers: int
    embeddings: dict[str, int]
    others: dict[str, int]
    grouped_query: bool

    def layer(self, index: int, block: str | None = None) -> list[Unit]:
        """The units of one layer, or of one of its blocks."""
        return [unit for unit in self.units if unit.layer == index and block in (None, unit.block)]

    @property
    def layers_size(self) -> int:
        """Scalars in the layers: the denominator of the paper's ratios (section 1, footnote 1)."""
        return sum(unit.size for unit in self.units)

    @property
    def size(self) -> int:
        """Scalars in the whole model, tied parameters counted once."""
        return self.layers_size + sum(self.embeddings.values()) + sum(self.others.values())


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of a config on the `meta` device: a module tree with shapes and no storage.

    Raises:
        HFTError: transformers knows no causal language model for this config.
    """
    try:
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise HFTError(f"model type {config.model_type!r} has no causal language model in transformers") from None
    with torch.device("meta"):
        return architecture(config)


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Read layers, blocks and units off a model's module tree.

    Args:
        model: a decoder-only model with separate projections, on any device, `meta` included.

    Raises:
        HFTError: the model has no list of layers, or a layer holds modules that are no known unit; their paths are
            named, since freezing only what is recognised would train the rest in silence.
    """
    config = model.config.get_text_config()
    prefix, layers = _find_layers(model, config.num_hidden_layers)

    units, unknown = [], []
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            parameters = dict(module.named_parameters(recurse=False))
            if not parameters:
                continue
            kind = path.rpartition(".")[2]
            block = "norm" if type(module).__name__.endswith("Norm") else PROJECTIONS.get(kind)
            name = f"{prefix}.{index}.{path}"
            if block is None:
                unknown.append(name)
                continue
            names = tuple(f"{name}.{parameter}" for parameter in parameters)
            size = sum(parameter.numel() for parameter in parameters.values())
            units.append(Unit(name, index, block, kind, names, size))
    if unknown:
        raise HFTError(
            f"{type(model).__name__} has modules in its layers that are no known unit: {some(unknown)}; "
            f"known are {', '.join(PROJECTIONS)} and norms"
        )

    inside = {name for unit in units for name in unit.parameters}
    outside = {name: p.numel() for name, p in model.named_parameters() if name not in inside}
    ends = {id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    embeddings = {name: outside[name] for name, p in model.named_parameters() if name in outside and id(p) in ends}
    heads = config.num_attention_heads
    return Anatomy(
        units=tuple(units),
        num_layers=len(layers),
        embeddings=embeddings,
        others={name: size for name, size in outside.items() if name not in embeddings},
        grouped_query=(getattr(config, "num_key_value_heads", None) or heads) != heads,
    )


def _find_layers(model: PreTrainedModel, count: int) -> tuple[str, nn.ModuleList]:
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise HFTError(f"{type(model).__name__} has no list of {count} layers; only decoder-only models are known")
    return lists[0]


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
