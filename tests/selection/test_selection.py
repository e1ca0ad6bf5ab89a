import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoConfig

from hft.cli import main
from hft.config import read_yaml
from hft.errors import HFTError
from hft.freezing import freeze
from hft.model.anatomy import anatomy_of, meta_model
from hft.record.manifest import Manifest
from hft.selection import SelectionConfig, select
from tests.conftest import command, error_of
from tests.model.test_anatomy import FAMILIES, small

# Table 10: trainable fraction of the layers in percent, and the attention and MLP units of a layer that train.
TABLE_10 = [
    (8.3, 1, 0),
    (22.3, 0, 1),
    (30.6, 1, 1),
    (38.9, 2, 1),
    (50.0, 2, 1.5),
    (61.1, 2, 2),
    (69.4, 3, 2),
    (77.7, 4, 2),
    (91.7, 3, 3),
    (100, 4, 3),
]


def anatomy_of_recipe(name):
    return anatomy_of(meta_model(AutoConfig.from_pretrained(f"recipes/{name}")))


@pytest.fixture(scope="module")
def llama2_7b(request):
    os.chdir(request.config.rootpath)
    return anatomy_of_recipe("llama2-7b")


def trained_kinds(selection, layer, block):
    return [unit.kind for unit in selection.anatomy.layer(layer, block) if selection.trains(unit)]


@pytest.mark.parametrize(("percent", "attention", "mlp"), TABLE_10)
def test_the_ten_ratios_of_table_10(llama2_7b, percent, attention, mlp):
    config = SelectionConfig(attention_fraction=attention / 4, mlp_fraction=mlp / 3)
    selection = select(llama2_7b, config)
    assert 100 * selection.fraction_of_layers == pytest.approx(percent, abs=0.1)
    for layer in range(32):
        assert len(trained_kinds(selection, layer, "attention")) == attention
        assert len(trained_kinds(selection, layer, "mlp")) in {int(mlp), int(mlp + 0.5)}


def test_algorithm_1_on_llama2_7b(llama2_7b):
    selection = select(llama2_7b, SelectionConfig())
    assert llama2_7b.numel_in_layers == 6_476_267_520
    assert llama2_7b.numel == 6_738_415_616
    assert selection.num_trained_in_layers * 2 == llama2_7b.numel_in_layers
    assert selection.fraction_of_model == pytest.approx(0.519, abs=5e-4)
    mlp = Counter(len(trained_kinds(selection, layer, "mlp")) for layer in range(32))
    assert mlp == {1: 16, 2: 16}
    assert all(len(trained_kinds(selection, layer, "norm")) == 1 for layer in range(32))
    drawn = Counter(kind for layer in range(32) for kind in trained_kinds(selection, layer, "attention"))
    assert set(drawn) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_grouped_queries_draw_one_of_q_and_o_and_one_of_k_and_v():
    anatomy = anatomy_of_recipe("llama3-8b")
    selection = select(anatomy, SelectionConfig())
    for layer in range(32):
        kinds = set(trained_kinds(selection, layer, "attention"))
        assert len(kinds & {"q_proj", "o_proj"}) == len(kinds & {"k_proj", "v_proj"}) == 1
    assert selection.num_trained_in_layers * 2 == anatomy.numel_in_layers
    assert selection.fraction_of_model == pytest.approx(0.565, abs=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_every_family_trains(family):
    anatomy = anatomy_of(small(family, num_hidden_layers=4))
    selection = select(anatomy, SelectionConfig())
    largest = max(unit.numel for unit in anatomy.units)
    assert abs(selection.num_trained_in_layers - anatomy.numel_in_layers / 2) < largest
    for trained, total in selection.counts().values():
        assert trained * 2 == total


def test_seed_and_round_draw_anew_and_nothing_else_does(llama2_7b):
    first = select(llama2_7b, SelectionConfig())
    assert first.trained_units == select(llama2_7b, SelectionConfig()).trained_units
    others = [SelectionConfig(selection_seed=1), SelectionConfig(round=2), SelectionConfig(round=3)]
    drawn = [first.trained_units, *(select(llama2_7b, config).trained_units for config in others)]
    assert len(set(drawn)) == 4
    for a in drawn:
        for b in drawn:
            # Independent halves share about a half of their units.
            assert a == b or 0.35 < len(a & b) / len(a) < 0.65


def test_the_draw_is_even(llama2_7b):
    rounds = 40
    times = Counter(u for r in range(1, rounds + 1) for u in select(llama2_7b, SelectionConfig(round=r)).trained_units)
    shares = [times[unit.name] / rounds for unit in llama2_7b.units]
    # 288 units, binomial with sd 0.079 (attention, norms): five of them are the bound.
    assert 0.1 < min(shares) <= max(shares) < 0.9


def test_a_selection_is_the_same_on_any_machine(llama2_7b):
    """Pinned: a change here breaks every manifest and every published seed."""
    names = "\n".join(sorted(select(llama2_7b, SelectionConfig(selection_seed=7, round=3)).trained_units))
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == "d416ade0fb2c3b17"


HASHED = """
from hft.model.anatomy import anatomy_of
from hft.selection import SelectionConfig, select
from tests.model.test_anatomy import small
names = sorted(select(anatomy_of(small("qwen3")), SelectionConfig()).trained_units)
"""


def test_a_selection_does_not_depend_on_the_hash_seed():
    """In this process it is another one, by chance or by hand."""
    seed, here = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1", {}
    exec(HASHED, here)
    command, env = [sys.executable, "-c", f"{HASHED}print(names)"], os.environ | {"PYTHONHASHSEED": seed}
    there = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert there == f"{here['names']}\n"


def test_layer_policy_trains_every_other_layer_whole(llama2_7b):
    selection = select(llama2_7b, SelectionConfig(policy="layer"))
    whole = [all(map(selection.trains, llama2_7b.layer(layer))) for layer in range(32)]
    none = [not any(map(selection.trains, llama2_7b.layer(layer))) for layer in range(32)]
    assert sum(whole) == sum(none) == 16
    assert all(a != b for a, b in itertools.pairwise(whole))
    offsets = {select(llama2_7b, SelectionConfig(policy="layer", round=r)).trained_units for r in range(1, 9)}
    assert len(offsets) == 2


def test_layer_policy_spaces_other_fractions_evenly(llama2_7b):
    selection = select(llama2_7b, SelectionConfig(policy="layer", fraction=0.25))
    trained = [layer for layer in range(32) if any(map(selection.trains, llama2_7b.layer(layer)))]
    assert len(trained) == 8
    assert {b - a for a, b in itertools.pairwise(trained)} == {4}


@pytest.mark.parametrize(("fraction", "first"), [(0.5, 16), (0.8, 6), (0.0, 32), (1.0, 0)])
def test_bottom_policy_freezes_the_lower_layers_and_the_input_embeddings(llama2_7b, fraction, first):
    selection = select(llama2_7b, SelectionConfig(policy="bottom", fraction=fraction))
    assert {unit.name for unit in llama2_7b.units if unit.layer >= first} == selection.trained_units
    outside = [name for name in selection.trained_parameters if name not in llama2_7b.shapes]
    assert outside == ["lm_head.weight", "model.norm.weight"]
    assert "embeddings and head train but model.embed_tokens.weight" in selection.summary()


def test_model_policy_trains_half_of_the_units_wherever_they_are(llama2_7b):
    selection = select(llama2_7b, SelectionConfig(policy="model"))
    assert len(selection.trained_units) * 2 == len(llama2_7b.units)
    assert selection.fraction_of_layers != 0.5
    assert selection.fraction_of_layers == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("pair", [("q_proj", "k_proj"), ("o_proj", "v_proj")])
def test_explicit_policy_freezes_what_is_named(llama2_7b, pair):
    selection = select(llama2_7b, SelectionConfig(policy="explicit", freeze=list(pair)))
    frozen = {unit.kind for unit in llama2_7b.units if not selection.trains(unit)}
    assert frozen == set(pair)
    one_layer = select(llama2_7b, SelectionConfig(policy="explicit", freeze=["model.layers.5.*"]))
    assert {u.layer for u in llama2_7b.units if not one_layer.trains(u)} == {5}
    with pytest.raises(HFTError, match="no unit matches 'w_q'; the kinds here are q_proj"):
        select(llama2_7b, SelectionConfig(policy="explicit", freeze=["w_q"]))


def axolotl(*unfrozen_parameters):
    """axolotl's rule: the names that a regular expression matches from their start, its dots taken literally."""
    return lambda name: any(re.match(pattern.replace(".", r"\."), name) for pattern in unfrozen_parameters)


def llama_factory(layers, modules=("all",), extra=()):
    """LLaMA-Factory's freeze mode: modules of the last layers, or of the first if negative, and extra modules."""
    ids = range(max(0, 4 - layers), 4) if layers > 0 else range(-layers)
    inside = [f".{n}.{'' if module == 'all' else module}" for n in ids for module in modules]
    return lambda name: any(part in name for part in (*inside, *extra))


@pytest.mark.parametrize(
    ("train", "rule"),
    [
        (["lm_head", "embed_tokens"], axolotl("^lm_head.weight$", "^model.embed_tokens.weight$")),
        (["model.layers.[23].mlp.*"], axolotl("model.layers.[23].mlp")),
        (["model.layers.1.self_attn.?_proj"], axolotl("^model.layers.1.self_attn.[qkvo]_proj.weight$")),
        (["model.*", "norm"], axolotl("model")),
        (["2-3"], llama_factory(2)),
        (["0-0"], llama_factory(-1)),
        (["*.[123].self_attn.*", "lm_head", "norm"], llama_factory(3, ["self_attn"], ["lm_head", "model.norm"])),
        (["*.[123].self_attn.*", "*.[123].mlp.*"], llama_factory(3, ["self_attn", "mlp"])),
        (["1-3", "embed_tokens"], llama_factory(3, extra=["embed_tokens"])),
    ],
)
def test_train_says_what_axolotl_and_llama_factory_say(tiny, train, rule):
    model = meta_model(AutoConfig.from_pretrained(tiny))
    freeze(model, select(anatomy_of(model), SelectionConfig(policy="explicit", train=train)))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(filter(rule, dict(model.named_parameters())))
    assert trained


@pytest.mark.parametrize("fraction", [0.01, 0.05])
def test_one_in_a_hundred_elements_can_train(tiny, fraction):
    anatomy = anatomy_of(meta_model(AutoConfig.from_pretrained(tiny)))
    selection = select(anatomy, SelectionConfig(policy="random-element", fraction=fraction))
    for name, mask in selection.frozen_masks.items():
        assert mask.numel - mask.count() == round(fraction * anatomy.numels[name])
    norms = sum(unit.numel for unit in anatomy.units if unit.block == "norm")
    expected = fraction * (anatomy.numel_in_layers - norms) + norms
    assert selection.num_trained_in_layers == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "frozen"), [("freeze-qk", {"q_proj", "k_proj"}), ("freeze-ov", {"o_proj", "v_proj"})]
)
@pytest.mark.parametrize("recipe", ["llama2-7b", "llama3-8b"])
def test_table_23_freezes_the_same_two_of_attention_in_every_layer(request, method, frozen, recipe):
    os.chdir(request.config.rootpath)
    anatomy = anatomy_of_recipe(recipe)
    settings = read_yaml(f"recipes/methods/{method}.yaml")
    settings.pop("method")
    selection = select(anatomy, SelectionConfig(**settings))
    for layer in range(32):
        assert set(trained_kinds(selection, layer, "attention")) == {"q_proj", "k_proj", "v_proj", "o_proj"} - frozen
    assert selection.num_trained_in_layers * 2 == anatomy.numel_in_layers
    usual = select(anatomy, SelectionConfig())
    mlp = {unit.name for unit in anatomy.units if unit.block != "attention"}
    assert selection.trained_units & mlp == usual.trained_units & mlp


def test_naming_more_than_the_fraction_leaves_frozen_is_refused(llama2_7b):
    with pytest.raises(HFTError, match="it lists more units than the fraction leaves frozen; lower the fraction"):
        select(llama2_7b, SelectionConfig(freeze=["q_proj", "k_proj", "v_proj"]))


def test_all_trains_everything_and_embeddings_can_be_frozen(llama2_7b):
    assert select(llama2_7b, SelectionConfig(policy="all")).frozen_parameters == []
    config = SelectionConfig(policy="all", freeze_embeddings=True)
    assert select(llama2_7b, config).frozen_parameters == ["model.embed_tokens.weight", "lm_head.weight"]
    half = select(llama2_7b, SelectionConfig(freeze_embeddings=True))
    assert half.num_trained == half.num_trained_in_layers + 4096


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 1.5}, "fraction: expected a number less than or equal to 1, got 1.5"),
        ({"mlp_fraction": -0.1}, "mlp_fraction: expected a number greater than or equal to 0"),
        ({"policy": "layer", "mlp_fraction": 0.5}, "belongs to the category policy"),
        ({"policy": "explicit"}, "the explicit policy needs `freeze` or `train`"),
        ({"train": ["q_proj"]}, "train belongs to the explicit policy"),
        ({"policy": "explicit", "train": ["q_proj"], "freeze": ["k_proj"]}, "remove freeze and freeze_embeddings"),
        ({"policy": "model", "freeze": ["q_proj"]}, "the explicit policy needs `freeze`"),
        ({"policy": "catgory"}, "unknown policy 'catgory', did you mean 'category'"),
        ({"policy": "importance"}, "needs a granularity"),
        ({"score": "wanda"}, "score belongs to the importance policy"),
        ({"policy": "model", "mlp_fraction": 0.0}, "belongs to the category policy"),
        ({"policy_options": {"a": 1}}, "a policy of your own"),
        ({"round": 0}, "round: expected a number greater than 0, got 0"),
    ],
)
def test_a_config_that_cannot_be_met_is_refused(settings, message):
    with pytest.raises(HFTError, match=message):
        SelectionConfig(**settings)


def test_the_documented_policy_trains_and_verifies(tmp_path, tiny, data, sft, capsys):
    """docs/new-policy.md, by its own words."""
    policy = "docs/examples/outer_layers.py:outer_layers"
    assert policy in Path("docs/new-policy.md").read_text()
    assert sft(tmp_path / "out", "--policy", policy) == 0
    assert "attention 8/16, mlp 6/12, norm 8/8 units train" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "out")
    assert {name.split(".")[2] for name in manifest.frozen_units} == {"1", "2"}

    method = tmp_path / "outer-layers.yaml"
    text = re.search(r"```yaml\n(.*?)```", Path("docs/new-policy.md").read_text(), re.DOTALL).group(1)
    method.write_text(text)
    words = command("sft", tmp_path / "dry", "--dry_run", "true", model=tiny, data=data)
    assert main([str(method) if word.endswith("hft.yaml") else word for word in words]) == 0
    assert "attention 4/16, mlp 3/12, norm 2/8 units train" in capsys.readouterr().out


def test_the_code_in_the_document_is_the_example():
    text = Path("docs/new-policy.md").read_text()
    shown = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1).strip().splitlines()
    example = Path("docs/examples/outer_layers.py").read_text()
    assert all(line in example for line in shown)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("nowhere.py:choose", "nowhere.py is not a Python file"),
        ("docs/examples/outer_layers.py:inner_layers", "has no function inner_layers"),
    ],
)
def test_a_policy_that_cannot_be_loaded_is_refused(tmp_path, sft, capsys, policy, message):
    assert sft(tmp_path / "out", "--policy", policy) == 2
    assert message in error_of(capsys)


def test_what_a_policy_returns_is_checked(tmp_path, sft, capsys):
    file = tmp_path / "mine.py"
    head = "import torch\ndef choose(anatomy, config): return "
    name = "model.layers.0.mlp.up_proj.weight"
    for returned, message in {
        "['a']": "must return units of the anatomy",
        "anatomy.units, {'w': torch.ones(1).bool()}": "chose w, which the model does not have",
        f"anatomy.units, {{'{name}': torch.ones(352, 128)}}": f"must give a bool tensor for {name}",
        f"anatomy.units, {{'{name}': torch.ones(1, 5).bool()}}": "a mask of shape (1, 5) for",
    }.items():
        file.write_text(head + returned)
        assert sft(tmp_path / "out", "--policy", f"{file}:choose") == 2
        assert message in error_of(capsys)
