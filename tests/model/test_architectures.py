"""Half fine-tuning means the same thing in every family, however its projections are stored."""

import functools
import json
import math
import re

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoTokenizer,
)
from trl import SFTConfig

from hft.data import load_split
from hft.errors import HFTError
from hft.methods.lisa import Lisa
from hft.model.anatomy import Anatomy, Part, anatomy_of, architecture_of, meta_model
from hft.model.layouts import EXPERTS, FUSED
from hft.model.weights import weights_of
from hft.parts import parts_of
from hft.record.verification import verify_folder
from hft.selection import SelectionConfig, select
from hft.training import HFTSFTTrainer

MAPPINGS = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
LLAMA = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_HEAD_DIM = {key: value for key, value in LLAMA.items() if key != "head_dim"}
MOE = LLAMA | {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}
MOE |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1}
MOE |= {"first_k_dense_replace": 1}
MLA = MOE | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MLA |= {"num_key_value_heads": 4, "head_dim": 4}
GRANITE = NO_HEAD_DIM | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16}
GRANITE_4 = GRANITE | {"layer_types": ["attention"] * 4, "mamba_n_heads": 8}
TEXT = {"model_type": "qwen2"} | LLAMA
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
VIT = VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": 32}
AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}

# Settings of a small model of each family, by a name that is the model type up to a dash.
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA | {"sliding_window": 8},  # every other layer slides
    "gemma3_text": LLAMA | {"sliding_window": 8},
    "olmo2": LLAMA,
    "stablelm": LLAMA,
    "cohere": LLAMA,  # attention and MLP in parallel, one norm
    "starcoder2": LLAMA,  # no gate
    "phi": LLAMA | {"num_key_value_heads": 4},  # parallel, no gate
    "gptj": LLAMA | {"rotary_dim": 4},  # parallel, no gate
    "opt": LLAMA | {"ffn_dim": 48, "word_embed_proj_dim": 32},  # no gate, tied
    "llava": {"text_config": TEXT, "vision_config": {"model_type": "clip_vision_model"} | VISION},
    # queries, keys and values in one tensor
    "phi3": LLAMA,  # gate and up in one, too
    "gpt2": LLAMA | {"n_positions": 512},  # transposed
    "openai-gpt": LLAMA,  # transposed
    "mpt": LLAMA | {"d_model": 32, "n_heads": 4, "n_layers": 4},
    "gpt_neox": LLAMA,  # head by head
    "bloom": LLAMA | {"n_layer": 4, "n_head": 4},
    "persimmon": LLAMA | {"qk_layernorm": False},
    "falcon": NO_HEAD_DIM | {"bias": True},  # one key and value for all queries
    "falcon-groups": NO_HEAD_DIM | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-heads": NO_HEAD_DIM | {"multi_query": False, "alibi": True},
    "gpt_bigcode": LLAMA | {"n_positions": 512},
    "gpt_bigcode-heads": LLAMA | {"n_positions": 512, "multi_query": False},
    "codegen": LLAMA | {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4},  # in four quarters
    # gate and up in one tensor
    "glm": LLAMA,
    "glm4": LLAMA,
    "glm4v": {"text_config": LLAMA | {"head_dim": 16} | MROPE, "vision_config": VIT},
    "glm_ocr": {"text_config": LLAMA | {"head_dim": 16} | MROPE, "vision_config": VIT},
    "granitemoehybrid": GRANITE_4 | {"num_local_experts": 0},
    # stacked experts
    "axk1": MLA | {"n_group": 2},
    "cohere2_moe": MOE,
    "deepseek_v2": MLA,
    "deepseek_v3": MLA | {"n_group": 2},
    "dots1": MOE,
    "exaone_moe": MOE,
    "flex_olmo": MOE,
    "glm4_moe": MOE,
    "glm4_moe_lite": MLA,
    "glm4v_moe": {"text_config": MOE | {"head_dim": 16} | MROPE, "vision_config": VIT},
    "granitemoe": GRANITE,
    "granitemoe_swa": MOE,
    "granitemoehybrid-experts": GRANITE_4,
    "granitemoeshared": GRANITE,
    "hunyuan_v1_moe": MOE | {"moe_topk": 2},
    "hy_v3": MOE,
    "kolibri1": MOE,
    "mellum": MOE,
    "minimax_m2": MOE | {"rotary_dim": 4},
    "minimax_m3_vl_text": MOE | {"shared_intermediate_size": 16, "dense_intermediate_size": 16, "rotary_dim": 4},
    "mistral4": MLA,
    "mixtral": MOE,
    "olmoe": MOE,
    "phimoe": MOE,
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": MOE,
    "qwen3_omni_moe_thinker": {
        "text_config": MOE | {"shared_expert_intermediate_size": 16},
        "vision_config": VIT,
        "audio_config": AUDIO | {"downsample_hidden_size": 8},
    },
    "qwen3_vl_moe": {"text_config": MOE, "vision_config": VIT},
    "solar_open": MOE,
    "llama4_text": MOE | {"intermediate_size_mlp": 64},  # transposed
    "gpt_oss": MOE,  # transposed and interleaved, with biases
}
# Where sizes allow it, half is half: no biases of unequal length, no odd count of matrices that are not of one size.
EXACT = ("llama", "mistral", "qwen3", "phi3", "mixtral", "qwen3_moe", "mpt", "falcon-groups")
# Their MLP multiplies the gate by `up + 1`.
UP_PLUS_ONE = ("gpt_oss", "minimax_m3_vl_text")
# One of each way to store a layer.
TRAINED = ("llama", "opt", "phi3", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "deepseek_v3", "llava")


def config_of(family: str):
    kind = family.partition("-")[0] if family != "openai-gpt" else family
    configs = (config for mapping in MAPPINGS for config in list(mapping.keys()) if config.model_type == kind)
    return next(configs)(**FAMILIES[family])


@functools.cache
def anatomy(family: str) -> Anatomy:
    return anatomy_of(meta_model(config_of(family)))


def small(family: str) -> torch.nn.Module:
    """A real model of a family, with weights large enough that nothing about it is degenerate."""
    torch.manual_seed(0)
    config = config_of(family)
    model = architecture_of(config)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
    return model.eval()


def own(part: Part) -> torch.Tensor:
    """A mask of the whole parameter, true where a part lies."""
    mask = torch.zeros(part.shape, dtype=torch.bool)
    part.mark(mask, True)
    return mask


def layouts_of(anatomy: Anatomy, model_type: str) -> set[tuple[str, str]]:
    """The modules that hold several units: model type of the text, name of the module."""
    parts = [part for unit in anatomy.units for part in unit.parts if part.boxes]
    names = (re.sub(r"\.(weight|bias|(gate_up|down)_proj(_bias)?)$", "", part.parameter) for part in parts)
    return {(model_type, name.rpartition(".")[2]) for name in names}


FUSED_OR_STACKED = [family for family in FAMILIES if any(p.boxes for u in anatomy(family).units for p in u.parts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_of_a_layer_belongs_to_exactly_one_unit(family):
    parameters = dict(meta_model(config_of(family)).named_parameters())
    assert sorted(anatomy(family).numels) == sorted(parameters)
    for name, parts in anatomy(family).parts_by_parameter.items():
        masks = [own(part) for _, part in parts]
        assert [int(mask.sum()) for mask in masks] == [part.numel for _, part in parts]
        assert parts[0][1].shape == tuple(parameters[name].shape)
        assert (sum(mask.int() for mask in masks) == 1).all()
    assert anatomy(family).numel == sum(parameter.numel() for parameter in parameters.values())
    assert len({unit.name for unit in anatomy(family).units}) == len(anatomy(family).units)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_layers_trains(family):
    units = anatomy(family).units
    routers = sum(unit.numel for unit in units if unit.block == "router")
    half = (anatomy(family).numel_in_layers - routers) / 2 + routers
    largest = max(unit.numel for unit in units)
    for seed in range(5):
        selection = select(anatomy(family), SelectionConfig(selection_seed=seed))
        assert abs(selection.num_trained_in_layers - half) <= (0 if family in EXACT else largest)
        for block, (trained, total) in selection.counts().items():
            assert trained == total if block == "router" else abs(trained - total / 2) <= 1
    frozen = select(anatomy(family), SelectionConfig(selection_seed=seed, freeze_router=True))
    assert frozen.num_trained_in_layers == selection.num_trained_in_layers - routers


@pytest.mark.parametrize("family", TRAINED)
def test_every_way_to_store_a_layer_trains_half_and_reloads(family, tmp_path, tiny, data):
    base, out = tmp_path / "base", tmp_path / "out"
    small(family).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(base)
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": 64, "learning_rate": 1e-2}
    settings |= {"weight_decay": 0.1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    trainer = HFTSFTTrainer(
        str(base),
        SFTConfig(output_dir=str(out), gradient_checkpointing=False, **settings),
        train_dataset=load_split(str(data), "train"),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    assert verify_folder(out).ok

    selection = trainer.selection
    before, after = (weights_of(folder, selection.trained_parameters) for folder in (base, out))
    for unit in selection.anatomy.units:
        changed = {part.parameter: before[part.parameter] != after[part.parameter] for part in unit.parts}
        moved = {part.parameter: changed[part.parameter][own(part)].any().item() for part in unit.parts}
        # Without a gradient, as keys' biases have none, only weight decay moves a bias, and Trainer exempts those.
        matrix = next((name for name in moved if name.endswith("weight")), unit.parameters[0])
        assert moved[matrix] if selection.trains(unit) else not any(moved.values()), unit.name
    assert all(torch.equal(before[name], after[name]) for name in selection.anatomy.towers)

    config = AutoConfig.from_pretrained(out)
    reloaded, info = architecture_of(config).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    trained = trainer.model.state_dict()
    for name, parameter in reloaded.named_parameters():
        assert torch.equal(parameter, trained[name]), name


@pytest.mark.parametrize("family", ["llama", *FUSED_OR_STACKED])
@torch.no_grad()
def test_fused_and_stacked_ranges_are_what_they_are_called(family):
    """Queries times c with keys over c, values times c with their output over c, and so on, compute the same."""
    model, tokens = small(family), torch.arange(12).view(1, -1) + 3
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    units = anatomy(family).units

    def scaled(**factors: float) -> torch.Tensor:
        for unit in units:
            for part in unit.parts:
                added = part.parameter.endswith("bias") and unit.kind in ("o_proj", "down_proj")
                if unit.kind in factors and not added and not part.parameter.endswith("sinks"):
                    model.get_parameter(part.parameter)[own(part)] *= factors[unit.kind]
        logits = model(tokens).logits
        model.load_state_dict(weights)
        return logits

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        return torch.allclose(one, other, rtol=1e-4, atol=1e-4)

    plain = scaled()
    if family == "llama" or any(part.boxes for unit in units if unit.block == "attention" for part in unit.parts):
        assert same(scaled(q_proj=4, k_proj=1 / 4), plain)
        assert same(scaled(v_proj=4, o_proj=1 / 4), plain)
        assert not same(scaled(q_proj=4), plain)
        assert not same(scaled(k_proj=4, v_proj=1 / 4), plain)
    if any(unit.kind == "gate_proj" for unit in units):
        assert same(scaled(up_proj=4, down_proj=1 / 4), plain) == (family not in UP_PLUS_ONE)
        assert not same(scaled(gate_proj=4, down_proj=1 / 4), plain)
        closed = scaled(down_proj=0)  # nothing passes, and nothing passes a gate of zeros
        assert same(scaled(gate_proj=0), closed)
        assert same(scaled(up_proj=0), closed) == (family not in UP_PLUS_ONE)


def test_every_known_layout_is_proved():
    """By the test above: no family's tensors are divided in an order that nobody has checked."""
    layouts = (layouts_of(anatomy(family), config_of(family).get_text_config().model_type) for family in FAMILIES)
    assert set().union(*layouts) == {*FUSED, *((model_type, "experts") for model_type in EXPERTS)}


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe", "phimoe", "minimax_m2", "gpt_oss", "llama4_text"])
def test_stacked_experts_are_read_as_they_were_saved(family, tmp_path):
    """Files may hold one expert per tensor, under names of their own."""
    model = small(family)
    model.save_pretrained(tmp_path)
    stored = weights_of(tmp_path, anatomy(family).numels)
    assert all(torch.equal(stored[name], parameter) for name, parameter in model.named_parameters())


def test_experts_are_drawn_matrix_by_matrix_in_every_layer():
    moe = anatomy("qwen3_moe")
    selection = select(moe, SelectionConfig())
    drawn = []
    for layer in range(moe.num_layers):
        experts = moe.layer(layer, "experts")
        trained = [unit for unit in experts if selection.trains(unit)]
        assert (len(experts), len(trained)) == (12, 6)
        drawn.append({unit.name.partition("experts.")[2] for unit in trained})
    assert len({frozenset(names) for names in drawn}) > 1
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert selection.frozen_masks[name].shape == (4, 32, 1)  # one bit per row of an expert, not per element
    assert select(moe, SelectionConfig(experts_fraction=0)).counts()["experts"] == (0, 48)


def test_learned_positions_are_embeddings():
    embeddings = anatomy("gpt2").embeddings
    assert list(embeddings) == ["transformer.wte.weight", "transformer.wpe.weight"]


def test_a_schedule_refuses_frozen_routers():
    selection = select(anatomy("mixtral"), SelectionConfig(policy="all", freeze_router=True))
    with pytest.raises(HFTError, match="remove freeze_router"):
        Lisa().check(selection)
    with pytest.raises(HFTError, match="freeze_router freezes routers"):
        select(selection.anatomy, SelectionConfig(freeze=["gate"]))


def test_vision_towers_never_train_though_their_layers_are_as_many():
    llava = anatomy("llava")
    assert all(unit.name.startswith("model.language_model.layers.") for unit in llava.units)
    assert any("vision_tower" in name for name in llava.towers)
    assert any("multi_modal_projector" in name for name in llava.towers)
    everything = select(llava, SelectionConfig(policy="all"))
    assert everything.frozen_parameters == list(llava.towers)
    assert everything.fraction_of_layers == 1


def test_verify_finds_what_moved_in_a_mixture_stored_expert_by_expert(tmp_path, tiny, data):
    """Mixtral's files hold one expert per tensor, while the model has them stacked."""
    base = tmp_path / "base"
    small("mixtral").save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(base)
    args = SFTConfig(output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, bf16=False, report_to="none")
    trainer = HFTSFTTrainer(str(base), args, train_dataset=load_split(str(data), "train"))
    trainer.save_model()
    manifest = json.loads((tmp_path / "out" / "hft_manifest.json").read_text())
    assert any(name.endswith("experts.gate_up_proj") for name in manifest["masks"])
    found = verify_folder(tmp_path / "out")
    assert found.ok
    assert len(found.parts) == len(manifest["masks"])
    with torch.no_grad():
        held = parts_of(trainer.model)["model.layers.1.mlp.experts.down_proj"].original0  # frozen experts alone
        held.view(-1)[0] += 1
    trainer.save_model()
    found = verify_folder(tmp_path / "out")
    assert list(found.broken) == ["model.layers.1.mlp.experts.down_proj"]
    assert math.isclose(manifest["trainable_fraction"]["layers"], trainer.selection.fraction_of_layers)
