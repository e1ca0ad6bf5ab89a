"""Folders of `hft importance` and Spectrum's files: written, read, resumed with, refused."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hft
from hft.cli import main
from hft.data import load_split
from hft.errors import HFTError
from hft.model.anatomy import anatomy_of
from hft.record.manifest import Manifest
from hft.selection import SelectionConfig, select
from hft.selection.importance import select_by_importance, signal_to_noise, token_ids
from tests.conftest import command, error_of, identical, losses, tensors

ARMS = [
    ("unit", "wanda", "false", "two commands"),
    ("element", "fisher", "true", "one command"),
]


def summary(printed: str) -> str:
    """What a command prints of its selection."""
    return re.search(r"selection\n(.*?)\n\n", printed, re.DOTALL).group(1)


def score(out, *flags, method="importance", model, data) -> int:
    """Run `hft importance` in process."""
    recipe = ["--config", "recipes/tiny/sft.yaml", f"recipes/methods/{method}.yaml"]
    words = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--out", str(out)]
    return main(["importance", *recipe, *words, *flags])


@pytest.mark.parametrize(("granularity", "by", "invert", "commands"), ARMS)
def test_what_matters_most_is_frozen_by_one_command_or_two_and_a_killed_run_resumes(
    tmp_path, tiny, data, sft, capsys, granularity, by, invert, commands
):
    scoring = ["--granularity", granularity, "--score", by, "--invert", invert, "--importance_rows", "8"]
    scoring += ["--importance_data", str(data)]
    flags = [*scoring, "--lr_scheduler_type", "constant", "--save_steps", "10"]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert main(["plan", *command("sft", straight, *flags, method="importance", model=tiny, data=data)]) == 0
    planned = summary(capsys.readouterr().out)
    assert not straight.exists()
    assert sft(straight, *flags, "--max_steps", "20", method="importance") == 0
    printed = capsys.readouterr().out
    assert f"scoring the base by {by} on 8 rows" in printed
    assert summary(printed) == planned

    model = AutoModelForCausalLM.from_pretrained(tiny)
    anatomy, tokenizer = anatomy_of(model), AutoTokenizer.from_pretrained(tiny)
    manifest = Manifest.load(straight)
    texts = list(token_ids(tokenizer, load_split(str(data), "train"), 256, 8))
    chosen = select_by_importance(model, anatomy, SelectionConfig(**manifest.selection), texts)
    assert sorted(chosen.trained_units) == sorted(manifest.trained_units)
    assert {name: mask.digest() for name, mask in chosen.frozen_masks.items()} == manifest.masks
    assert chosen.summary().split("\n") == [line.strip() for line in planned.split("\n")]
    assert manifest.trainable_fraction["layers"] == pytest.approx(0.5, abs=5e-3)
    if granularity == "unit":
        assert chosen.counts() == select(anatomy, SelectionConfig()).counts()

    if commands == "two commands":
        assert score(tmp_path / "scores", *scoring, model=tiny, data=data) == 0
        assert summary(capsys.readouterr().out) == planned
        flags += ["--importance", str(tmp_path / "scores")]
    assert sft(cut, *flags, "--max_steps", "10", method="importance") == 0
    (cut / "results.json").unlink()
    capsys.readouterr()
    assert sft(cut, *flags, "--fraction", "0.4", method="importance") == 2
    assert re.search("fraction 0.5 there, 0.4 here|made with fraction 0.5, and 0.4 is asked for", error_of(capsys))
    assert sft(cut, *flags, "--max_steps", "20", method="importance") == 0
    assert "scoring the base" not in capsys.readouterr().out
    logged = losses(cut / "checkpoint-20")
    assert sum(logged[-4:]) < sum(logged[:4]) - 0.8
    expected, found = tensors(straight), tensors(cut)
    assert all(identical(found[name], expected[name]) for name in expected)


def test_a_folder_of_another_base_or_other_settings_is_refused(tmp_path, tiny, data, sft, capsys):
    folder, other, small = tmp_path / "scores", tmp_path / "other", tmp_path / "small"
    flags = ["--score", "magnitude", "--granularity", "unit"]
    assert score(folder, *flags, model=tiny, data=data) == 0
    read = ["--policy", "importance", "--importance", str(folder)]
    shutil.copytree(tiny, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert sft(tmp_path / "out", *read, model=other) == 2
    assert f"was made for {tiny}, whose weights are not those of {other}; run `hft importance`" in error_of(capsys)
    assert sft(tmp_path / "out", *read, "--score", "wanda") == 2
    assert "was made with score magnitude, and wanda is asked for" in error_of(capsys)
    assert sft(tmp_path / "out", "--policy", "importance", "--importance", str(tmp_path)) == 2
    assert "give a folder that `hft importance` wrote" in error_of(capsys)
    assert not (tmp_path / "out").exists()
    assert score(other, *flags, model=tiny, data=data) == 2
    assert "beside scores; name another folder" in error_of(capsys)

    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config.num_hidden_layers = 5
    with pytest.raises(HFTError, match=r"was made for another model: it has no model.layers.4.self_attn.q_proj.weight"):
        hft.select(type(model)(model.config), policy="importance", importance=str(folder))
    model.config.num_hidden_layers, model.config.intermediate_size = 4, 64
    with pytest.raises(HFTError, match=r"it has no model.layers.0.mlp.down_proj.weight of that size"):
        hft.select(type(model)(model.config), policy="importance", importance=str(folder))
    with pytest.raises(HFTError, match=f"{small}.*not found"):
        hft.select(model, policy="importance", importance=str(small))


def snr_of(weight: torch.Tensor) -> float:
    """As Spectrum computes it, in numpy."""
    s = np.linalg.svd(weight.float().numpy(), compute_uv=False)
    sigma = (np.quantile(s, 0.75) - np.quantile(s, 0.25)) / 1.349
    rows, columns = sorted(weight.shape)
    edge = sigma * np.sqrt((1 + np.sqrt(rows / columns)) ** 2)
    return s[s > edge].sum() / (s[s <= edge].sum() if (s <= edge).any() else 1) / s[0]


def test_spectrum_trains_the_top_half_of_each_type_and_freezes_all_else(tmp_path, tiny, data, sft):
    """The base has matrices of low rank and some noise, so that signal and noise are apart."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny, base)
    weights, generator = load_file(base / "model.safetensors"), torch.Generator().manual_seed(0)
    matrices = [name for name in weights if "proj" in name]
    for index, name in enumerate(matrices):
        shape, rank = weights[name].shape, 2 + 5 * index % 13
        low = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
        weights[name] = ((low / rank + 0.3 * torch.randn(shape, generator=generator)) / 50).to(torch.bfloat16)
        assert float(signal_to_noise(weights[name].float())) == pytest.approx(snr_of(weights[name]), rel=1e-4)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    expected = set()
    for kind in {name.split(".", 3)[3] for name in matrices}:
        ranked = sorted((n for n in matrices if n.endswith(kind)), key=lambda n: snr_of(weights[n]), reverse=True)
        expected |= set(ranked[:2])
    assert sft(out, method="spectrum", model=base) == 0
    manifest = Manifest.load(out)
    assert {*manifest.trained_parameters} == {*expected, "model.embed_tokens.weight", "lm_head.weight"}
    assert manifest.frozen_checksums.keys() == weights.keys() - {*manifest.trained_parameters}
    assert manifest.masks == {}


# A file as Spectrum's script writes it, for two layers. At 50% one of two modules of a type trains, the one with the
# larger ratio, of equal ones the first; of a type with one module none does. Embeddings and head always do.
SNR = {
    "model.layers.0.self_attn.q_proj": (0.5, "self_attn.q_proj"),
    "model.layers.1.self_attn.q_proj": (0.25, "self_attn.q_proj"),
    "model.layers.0.mlp.down_proj": (0.125, "mlp.down_proj"),
    "model.layers.1.mlp.down_proj": (float("inf"), "mlp.down_proj"),
    "model.layers.0.input_layernorm": (float("inf"), "input_layernorm"),
    "model.layers.1.input_layernorm": (float("inf"), "input_layernorm"),
    "model.norm": (float("inf"), "model.norm"),
    "lm_head": (0.75, "lm_head"),
}
ENDS = {"model.embed_tokens.weight", "lm_head.weight"}
HALF = {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.0.input_layernorm"}


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, HALF), (0.99, HALF), (1.0, {*SNR} - {"lm_head"}), (0.49, {})])
def test_a_file_of_spectrums_trains_what_its_script_unfreezes(tmp_path, tiny, fraction, expected):
    file = tmp_path / "snr_results_tiny.json"
    file.write_text(json.dumps({name: {"snr": snr, "type": kind} for name, (snr, kind) in SNR.items()}, indent=4))
    config = AutoConfig.from_pretrained(tiny)
    model, other = (
        AutoModelForCausalLM.from_config(config.__class__(**config.to_dict() | {"num_hidden_layers": layers}))
        for layers in (2, 3)
    )
    selection = hft.select(model, policy="importance", importance=str(file), fraction=fraction)
    assert {*selection.trained_parameters} == {f"{name}.weight" for name in expected} | ENDS
    assert selection.config.score == "snr"
    with pytest.raises(HFTError, match=r"was made for another model: its layers with self_attn.q_proj differ"):
        hft.select(other, policy="importance", importance=str(file))
    with pytest.raises(HFTError, match="was made with score snr, and wanda is asked for"):
        hft.select(model, policy="importance", importance=str(file), score="wanda")
    file.write_text("{}")
    assert set(hft.select(model, policy="importance", importance=str(file)).trained_parameters) == ENDS
    reward = AutoModelForSequenceClassification.from_config(model.config)
    reward = hft.select(reward, policy="importance", importance=str(file))
    assert {"score.weight", "model.norm.weight"} & {*reward.frozen_parameters} == {"model.norm.weight"}
    by_type = {kind: {name: snr for name, (snr, other) in SNR.items() if other == kind} for _, kind in SNR.values()}
    file.write_text(json.dumps(by_type))
    assert hft.select(model, policy="importance", importance=str(file), fraction=fraction) == selection
    file.write_text(json.dumps({"model.layers.0.mlp.down_proj": 1.0}))
    with pytest.raises(HFTError, match=r"is not a file of Spectrum's, MODULE: \{snr, type\}"):
        hft.select(model, policy="importance", importance=str(file))
