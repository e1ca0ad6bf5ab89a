import pytest
from transformers import AutoConfig

from hft.errors import HFTError
from hft.model.anatomy import anatomy_of, meta_model

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TWO_NORMS = {"input_layernorm", "post_attention_layernorm"}
FOUR_NORMS = TWO_NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
FAMILIES = {
    "llama": TWO_NORMS,
    "mistral": TWO_NORMS,
    "qwen2": TWO_NORMS,
    "qwen3": TWO_NORMS | {"q_norm", "k_norm"},
    "gemma2": FOUR_NORMS,
    "gemma3_text": FOUR_NORMS | {"q_norm", "k_norm"},
    "olmo2": {"post_attention_layernorm", "post_feedforward_layernorm", "q_norm", "k_norm"},
}


def small(family: str, **overrides):
    return meta_model(AutoConfig.for_model(family, **SMALL | overrides))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_layer_belongs_to_one_unit(family):
    model = small(family)
    anatomy = anatomy_of(model)
    owned = [name for unit in anatomy.units for name in unit.parameters]
    everything = [*owned, *anatomy.embeddings, *anatomy.others]
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert anatomy.numel == sum(parameter.numel() for parameter in model.parameters())
    for layer in range(3):
        kinds = {unit.kind for unit in anatomy.layer(layer)}
        assert kinds == PROJECTIONS | FAMILIES[family]
        assert {unit.kind for unit in anatomy.layer(layer, "norm")} == FAMILIES[family]
        assert len(anatomy.layer(layer, "attention")) == 4
        assert len(anatomy.layer(layer, "mlp")) == 3


def test_a_bias_belongs_to_its_matrix():
    units = {unit.name: unit for unit in anatomy_of(small("qwen2")).units}
    q = units["model.layers.0.self_attn.q_proj"]
    assert q.parameters == ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias")
    assert q.numel == 32 * 32 + 32


def test_embeddings_head_and_final_norm_lie_outside_the_layers():
    untied = anatomy_of(small("llama", tie_word_embeddings=False))
    assert untied.embeddings == {"model.embed_tokens.weight": 64 * 32, "lm_head.weight": 64 * 32}
    assert untied.others == {"model.norm.weight": 32}
    tied = anatomy_of(small("llama", tie_word_embeddings=True))
    assert tied.embeddings == {"model.embed_tokens.weight": 64 * 32}


def test_grouped_queries_are_seen():
    assert anatomy_of(small("llama")).grouped_query
    assert not anatomy_of(small("llama", num_key_value_heads=4)).grouped_query


def test_an_unknown_family_is_refused_with_its_modules():
    with pytest.raises(HFTError, match=r"belong to no known unit: .*backbone\.layers\.0\.mixer"):
        anatomy_of(small("mamba"))


def test_a_model_that_is_no_language_model_is_refused():
    with pytest.raises(HFTError, match="no causal language model"):
        meta_model(AutoConfig.for_model("vit"))
