"""Half fine-tuning means the same thing in every family, however its projections are stored."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer
from trl import SFTConfig

from hft.data import load_split
from hft.errors import HFTError
from hft.methods.lisa import Lisa
from hft.model.anatomy import anatomy_of, architecture_of, meta_model
from hft.model.weights import weights_of
from hft.record.verification import verify_folder
from hft.selection import SelectionConfig, select
from hft.training import HFTSFTTrainer

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
MOE = LLAMA | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
TEXT = {"model_type": "qwen2"} | LLAMA
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}

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
    "phi3": LLAMA,  # qkv_proj, gate_up_proj
    "glm": LLAMA,  # gate_up_proj
    "gpt_neox": LLAMA,  # query_key_value, head by head
    "bloom": LLAMA | {"n_layer": 4, "n_head": 4},
    "falcon": NO_HEAD_DIM | {"bias": True},  # one key and value for all queries
    "falcon-groups": NO_HEAD_DIM | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-heads": NO_HEAD_DIM | {"multi_query": False, "alibi": True},
    "gpt2": LLAMA | {"n_positions": 512},  # c_attn, transposed
    "gpt_bigcode": LLAMA | {"n_positions": 512},
    "gpt_bigcode-heads": LLAMA | {"n_positions": 512, "multi_query": False},
    "mpt": LLAMA | {"d_model": 32, "n_heads": 4, "n_layers": 4},
    "mixtral": LLAMA | {"num_local_experts": 4},
    "qwen2_moe": MOE | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_moe": MOE | {"num_experts": 4},
    "olmoe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": MOE
    | {"n_routed_experts": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    | {"v_head_dim": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4}
    | {"head_dim": 4},
    "llava": {"text_config": TEXT, "vision_config": {"model_type": "clip_vision_model"} | VISION},
}
# Where sizes allow it, half is half: no biases of unequal length, no odd count of matrices that are not of one size.
EXACT = ("llama", "mistral", "qwen3", "phi3", "mixtral", "qwen3_moe", "mpt", "falcon-groups")


def config_of(family: str):
    return AutoConfig.for_model(family.partition("-")[0], **FAMILIES[family])


def small(family: str) -> torch.nn.Module:
    """A real model of a family, with weights large enough that nothing about it is degenerate."""
    torch.manual_seed(0)
    config = config_of(family)
    model = architecture_of(config)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_scalar_of_a_layer_belongs_to_exactly_one_unit(family):
    model = meta_model(config_of(family))
    anatomy = anatomy_of(model)
    times = {name: torch.zeros(p.shape, dtype=torch.int) for name, p in model.named_parameters()}
    for unit in anatomy.units:
        for part in unit.parts:
            own = torch.zeros(part.shape, dtype=torch.bool)
            part.mark(own, True)
            assert own.sum() == part.numel
            times[part.parameter] += own
    outside = anatomy.embeddings | anatomy.others | anatomy.towers
    assert all((count == (0 if name in outside else 1)).all() for name, count in times.items())
    assert anatomy.numel == sum(p.numel() for p in model.parameters())
    assert len({unit.name for unit in anatomy.units}) == len(anatomy.units)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_layers_trains(family):
    anatomy = anatomy_of(meta_model(config_of(family)))
    for seed in range(5):
        selection = select(anatomy, SelectionConfig(selection_seed=seed))
        routers = sum(unit.numel for unit in anatomy.units if unit.block == "router")
        half = (anatomy.numel_in_layers - routers) / 2 + routers
        largest = max(unit.numel for unit in anatomy.units)
        assert abs(selection.num_trained_in_layers - half) <= (0 if family in EXACT else largest)
        frozen = select(anatomy, SelectionConfig(selection_seed=seed, freeze_router=True))
        assert frozen.num_trained_in_layers == selection.num_trained_in_layers - routers
        for block, (trained, total) in selection.counts().items():
            assert trained == total if block == "router" else abs(trained - total / 2) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_half_and_reloads(family, tmp_path, tiny, data):
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
        moved = []
        for part in unit.parts:
            own = torch.zeros(part.shape, dtype=torch.bool)
            part.mark(own, True)
            moved.append((before[part.parameter][own] != after[part.parameter][own]).any().item())
        # Without a gradient, as keys' biases have none, only weight decay moves a bias, and Trainer exempts those.
        assert moved[0] if selection.trains(unit) else not any(moved), unit.name
    assert all(torch.equal(before[name], after[name]) for name in selection.anatomy.towers)

    config = AutoConfig.from_pretrained(out)
    reloaded, info = architecture_of(config).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    for name, parameter in reloaded.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name


@pytest.mark.parametrize(
    "family", ["llama", "phi3", "gpt_neox", "bloom", "gpt2", "gpt_bigcode-heads", "mpt", "falcon-heads"]
)
def test_fused_ranges_are_what_they_are_called(family):
    """Queries times c with keys over c, and values times c with their output over c, compute the same."""
    model = small(family)
    anatomy = anatomy_of(model)
    tokens = torch.arange(12).view(1, -1) + 3

    @torch.no_grad()
    def scaled(**factors: float) -> torch.Tensor:
        changed = architecture_of(model.config)(model.config).eval()
        changed.load_state_dict(model.state_dict())
        parameters = dict(changed.named_parameters())
        for unit in anatomy.units:
            for part in unit.parts:
                bias_of_a_sum = part.parameter.endswith("bias") and unit.kind in ("o_proj", "down_proj")
                own = torch.zeros(part.shape, dtype=torch.bool)
                part.mark(own, True)
                if not bias_of_a_sum:
                    parameters[part.parameter][own] *= factors.get(unit.kind, 1.0)
        return changed(tokens).logits

    plain = model(tokens).logits
    gated = any(unit.kind == "gate_proj" for unit in anatomy.units)
    for factors in ({"q_proj": 4, "k_proj": 1 / 4}, {"v_proj": 4, "o_proj": 1 / 4}, {"up_proj": 4, "down_proj": 1 / 4}):
        if "up_proj" not in factors or gated:
            torch.testing.assert_close(scaled(**factors), plain, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(scaled(q_proj=4), plain, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(scaled(k_proj=4, v_proj=1 / 4), plain, rtol=1e-2, atol=1e-2)


def test_grouped_fused_ranges_are_what_they_are_called():
    """One key for several queries: scaling all queries against all keys holds for groups too."""
    for family in ("falcon", "falcon-groups", "gpt_bigcode", "glm"):
        model = small(family)
        tokens = torch.arange(12).view(1, -1) + 3
        plain = model(tokens).logits.detach()
        with torch.no_grad():
            for unit in anatomy_of(model).units:
                factor = {"q_proj": 4, "k_proj": 1 / 4}.get(unit.kind, 1)
                for part in unit.parts:
                    own = torch.zeros(part.shape, dtype=torch.bool)
                    part.mark(own, True)
                    model.get_parameter(part.parameter)[own] *= factor
        torch.testing.assert_close(model(tokens).logits, plain, rtol=1e-3, atol=1e-3)


def test_experts_are_drawn_matrix_by_matrix_in_every_layer():
    anatomy = anatomy_of(meta_model(config_of("qwen3_moe")))
    selection = select(anatomy, SelectionConfig())
    drawn = []
    for layer in range(anatomy.num_layers):
        experts = anatomy.layer(layer, "experts")
        trained = [unit for unit in experts if selection.trains(unit)]
        assert (len(experts), len(trained)) == (12, 6)
        drawn.append({unit.name.partition("experts.")[2] for unit in trained})
    assert len({frozenset(names) for names in drawn}) > 1
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert selection.frozen_masks[name].shape == (4, 32, 1)  # one bit per row of an expert, not one per element
    assert select(anatomy, SelectionConfig(experts_fraction=0)).counts()["experts"] == (0, 48)


def test_learned_positions_are_embeddings():
    embeddings = anatomy_of(meta_model(config_of("gpt2"))).embeddings
    assert list(embeddings) == ["transformer.wte.weight", "transformer.wpe.weight"]


def test_a_schedule_refuses_frozen_routers():
    selection = select(anatomy_of(meta_model(config_of("mixtral"))), SelectionConfig(policy="all", freeze_router=True))
    with pytest.raises(HFTError, match="leave freeze_router out"):
        Lisa().check(selection)
    with pytest.raises(HFTError, match="freeze_router freezes routers"):
        select(selection.anatomy, SelectionConfig(freeze=["gate"]))


def test_vision_towers_never_train_though_their_layers_are_as_many():
    anatomy = anatomy_of(meta_model(config_of("llava")))
    assert all(unit.name.startswith("model.language_model.layers.") for unit in anatomy.units)
    assert any("vision_tower" in name for name in anatomy.towers)
    assert any("multi_modal_projector" in name for name in anatomy.towers)
    everything = select(anatomy, SelectionConfig(policy="all"))
    assert everything.frozen_parameters == list(anatomy.towers)
    assert everything.fraction_of_layers == 1


def test_a_mixture_stored_expert_by_expert_is_told_to_have_broken(tmp_path, tiny, data):
    """Mixtral's files hold one expert a tensor, the model has them stacked: verify still finds what moved."""
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
        frozen = trainer.selection.frozen_masks["model.layers.1.mlp.experts.down_proj"].tensor()
        expert = int(frozen.flatten().nonzero()[0])
        trainer.model.get_parameter("model.layers.1.mlp.experts.down_proj")[expert, 0, 0] += 1
    trainer.save_model()
    found = verify_folder(tmp_path / "out")
    assert list(found.broken) == ["model.layers.1.mlp.experts.down_proj"]
    assert math.isclose(manifest["trainable_fraction"]["layers"], trainer.selection.fraction_of_layers)
