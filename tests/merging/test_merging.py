"""Models made out of models: reset and merge."""

import copy
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hft.cli import main
from hft.config import Keys, fill, read_arguments
from hft.merging import merge as merging
from hft.merging.merge import OPERATORS, MergeConfig, check_config
from hft.merging.operators import MagnitudePruner, between, slerp_factors
from hft.merging.reset import ResetConfig
from hft.model.anatomy import anatomy_of, meta_model
from hft.model.weights import Weights
from hft.record.manifest import Manifest
from hft.selection import SelectionConfig, select
from tests.conftest import error_of, identical, tensors
from tests.model.test_architectures import small


def changed_copy(source: Path, folder: Path, change, dtype=None) -> Path:
    """A copy of a model folder whose tensors went through `change(name, tensor)`."""
    shutil.copytree(source, folder)
    content = {name: change(name, tensor) for name, tensor in tensors(source).items()}
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    if dtype:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    return folder


def moved(seed: int, scale: float = 1e-2):
    generator = torch.Generator().manual_seed(seed)

    def change(_, tensor):
        return tensor + (scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)

    return change


@pytest.fixture(scope="module")
def trio(tmp_path_factory, tiny) -> tuple[Path, Path, Path]:
    """P, S and D in fp32, so that no two deltas are alike; D starts from S."""
    folder = tmp_path_factory.mktemp("trio")
    p = changed_copy(tiny, folder / "P", lambda _, tensor: tensor.float(), "float32")
    s = changed_copy(p, folder / "S", moved(1))
    d = changed_copy(s, folder / "D", moved(2))
    return p, s, d


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny) -> Path:
    """The tiny model, moved, in its own bf16."""
    return changed_copy(tiny, tmp_path_factory.mktemp("tuned") / "S", moved(1))


def merge(method: str, out: Path, models, base=None, *flags: str) -> int:
    words = ["--method", method, "--models", *map(str, models), "--out", str(out), *flags]
    return main(["merge", *words, *(["--base", str(base)] if base else [])])


def reset(tuned: Path, base: Path, out: Path, *flags: str) -> int:
    return main(["reset", "--tuned", str(tuned), "--base", str(base), "--out", str(out), *flags])


def resolve(words: list[str], *classes: type) -> tuple[dict, dict]:
    return read_arguments(words, "hft", "", {}).resolve(Keys(classes))


def same(ours: Path, theirs: dict[str, torch.Tensor]) -> bool:
    ours = dict(Weights(ours))
    return ours.keys() == theirs.keys() and all(identical(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("flags", [[], ["--policy", "model", "--selection_seed", "3"]])
def test_reset_puts_back_what_hft_would_freeze_and_nothing_else(tmp_path, tuned, tiny, capsys, flags):
    assert reset(tuned, tiny, tmp_path / "out", *flags) == 0
    config = SelectionConfig(policy="model", selection_seed=3) if flags else SelectionConfig()
    frozen = select(anatomy_of(meta_model(AutoConfig.from_pretrained(tiny))), config).frozen_parameters
    base, before, after = tensors(tiny), tensors(tuned), tensors(tmp_path / "out")
    assert base.keys() == after.keys()
    for name, tensor in after.items():
        assert identical(tensor, base[name] if name in frozen else before[name]), name
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}.isdisjoint(frozen)

    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert f"reset: {len(frozen)} of {len(frozen)} tensors bit-identical" in text
    assert f"tuned: {39 - len(frozen)} of {39 - len(frozen)} tensors bit-identical" in text
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.tuned == str(tuned)
    assert (manifest.base, list(manifest.frozen_checksums)) == (str(tiny), frozen)
    assert (tmp_path / "out" / "selection.png").stat().st_size > 1000
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Half-Reset of `S`: half of it went back to `tiny`" in card
    assert f"| verify | passed: {len(frozen)} of {len(frozen)} reset tensors bit-identical to the base |" in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_reset_of_a_reset_verifies_and_counts_its_rounds(tmp_path, tuned, tiny, capsys):
    assert reset(tuned, tiny, tmp_path / "one") == 0
    assert reset(tmp_path / "one", tiny, tmp_path / "again", "--selection_seed", "1") == 0
    assert main(["verify", str(tmp_path / "again")]) == 0
    further = changed_copy(tmp_path / "one", tmp_path / "further", moved(3))
    assert reset(further, tmp_path / "one", tmp_path / "two") == 0
    assert main(["verify", str(tmp_path / "two")]) == 0
    manifest = Manifest.load(tmp_path / "two")
    assert manifest.selection["round"] == 2
    assert [earlier["selection"]["round"] for earlier in manifest.earlier] == [1]
    assert manifest.frozen_units != Manifest.load(tmp_path / "one").frozen_units
    shutil.copy(tuned / "model.safetensors", tmp_path / "one")
    capsys.readouterr()
    assert reset(further, tmp_path / "one", tmp_path / "three") == 2
    assert "does not match its hft_manifest.json" in error_of(capsys)


def test_verify_finds_what_did_not_stay_tuned(tmp_path, tuned, tiny, capsys):
    own = shutil.copytree(tuned, tmp_path / "own")
    assert reset(own, tiny, tmp_path / "out") == 0
    assert f"what this selection trains stays tuned; what it freezes goes back to {tiny}" in capsys.readouterr().out
    content = tensors(tmp_path / "out")
    content["model.norm.weight"][0] += 1
    save_file(content, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert "MISMATCH model.norm.weight" in capsys.readouterr().out
    shutil.rmtree(own)
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert f"tuned: not compared, {own} was not found" in capsys.readouterr().out


def test_a_reset_that_would_change_nothing_is_refused(tmp_path, tuned, tiny, capsys):
    assert reset(tuned, tiny, tmp_path / "one") == 0
    assert reset(tmp_path / "one", tiny, tmp_path / "again") == 2
    assert "already has the base's values there: nothing would be reset" in error_of(capsys)
    assert reset(shutil.copytree(tiny, tmp_path / "same"), tiny, tmp_path / "again") == 2
    assert "already has the base's values there" in error_of(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "same"]


def test_flags_win_over_a_resets_recipe(tmp_path, tuned, tiny, capsys):
    files = ["--config", "recipes/smollm2-135m/reset.yaml", "recipes/methods/hft-layer.yaml"]
    assert reset(tuned, tiny, tmp_path / "out", *files, "--selection_seed", "1") == 0
    selection = Manifest.load(tmp_path / "out").selection
    assert (selection["policy"], selection["selection_seed"]) == ("layer", 1)
    assert (
        reset(tuned, tiny, tmp_path / "two", "--policy", "importance", "--score", "snr", "--granularity", "unit") == 2
    )
    assert "the importance policy needs --importance FOLDER" in error_of(capsys)


def test_an_empty_folder_behind_a_link_is_written_to(tmp_path, tuned, tiny):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert reset(tuned, tiny, tmp_path / "link") == 0
    assert (tmp_path / "there" / "model.safetensors").exists()
    assert (tmp_path / "link").is_symlink()


def test_two_models_in_different_dtypes_are_not_mixed(tmp_path, tuned, tiny, capsys):
    half = changed_copy(tiny, tmp_path / "half", lambda _, tensor: tensor.half(), "float16")
    assert reset(tuned, half, tmp_path / "out") == 2
    assert f"is stored in torch.float16 in {half} and in torch.bfloat16 in {tuned}" in error_of(capsys)


@pytest.mark.parametrize("trim", ["tensor", "global"])
def test_ties_is_pefts_and_the_authors(tmp_path, trio, trim):
    p, s, d = map(tensors, trio)
    assert merge("ties", tmp_path / "out", trio[1:], trio[0], "--trim", trim, "--scale", "0.5") == 0
    if trim == "tensor":
        deltas = {name: [s[name] - p[name], d[name] - p[name]] for name in p}
        merged = {name: merge_utils.ties(pair, torch.ones(2), density=0.2) for name, pair in deltas.items()}
    else:  # the whole model as one vector

        def flat(model):
            return torch.cat([(model[name] - p[name]).flatten() for name in p])

        vector = merge_utils.ties([flat(s), flat(d)], torch.ones(2), density=0.2)
        pieces = vector.split([tensor.numel() for tensor in p.values()])
        merged = {name: piece.view_as(p[name]) for name, piece in zip(p, pieces, strict=True)}
    assert same(tmp_path / "out", {name: p[name] + 0.5 * merged[name] for name in p})


def test_dare_keeps_few_deltas_and_divides_them_by_how_many(tmp_path, trio):
    p, s, d = map(tensors, trio)
    assert merge("dare", tmp_path / "linear", trio[1:], trio[0], "--drop", "0.7", "--weights", "1", "0.5") == 0
    assert merge("dare-ties", tmp_path / "ties", trio[1:], trio[0], "--drop", "0.7") == 0
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = (torch.stack([torch.zeros_like(p[name]), (tuned[name] - p[name]) / 0.3]) for tuned in (s, d))
    linear, ties = (tensors(tmp_path / folder)[name] - p[name] for folder in ("linear", "ties"))
    expected = (a[:, None] + 0.5 * b).flatten(0, 1)  # neither, the second, the first, both
    chosen = (linear - expected).abs().argmin(dim=0)
    assert (linear - expected).abs().amin(dim=0).max() < 1e-6
    assert chosen.flatten().bincount(minlength=4) / chosen.numel() == pytest.approx([0.49, 0.21, 0.21, 0.09], abs=0.01)
    agreeing = (chosen == 3) & (a[1].sign() == b[1].sign())
    torch.testing.assert_close(ties[agreeing], ((a[1] + b[1]) / 2)[agreeing], rtol=1e-4, atol=1e-7)


def test_what_dare_drops_depends_on_the_seed_and_not_on_files(tmp_path, trio):
    p, s, _ = trio
    AutoModelForCausalLM.from_pretrained(s).save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    torch.manual_seed(5)
    assert merge("dare", tmp_path / "one", [s], p) == 0
    torch.manual_seed(6)
    assert merge("dare", tmp_path / "two", [tmp_path / "shards"], p, "--max_shard_size", "700KB") == 0
    assert same(tmp_path / "two", tensors(tmp_path / "one"))
    assert merge("dare", tmp_path / "other", [s], p, "--seed", "1") == 0
    assert not same(tmp_path / "other", tensors(tmp_path / "one"))


def test_average_slerp_and_wise_ft_are_their_formulas(tmp_path, trio):
    far = changed_copy(trio[0], tmp_path / "far", moved(7, scale=1.0))
    p, s, d, f = map(tensors, (*trio, far))
    assert merge("average", tmp_path / "average", trio[1:], None, "--weights", "3", "1") == 0
    assert merge("wise-ft", tmp_path / "wise", trio[1:2], trio[0], "--alpha", "0.3") == 0
    assert merge("slerp", tmp_path / "arc", [trio[0], far], trio[2], "--t", "0.3") == 0  # a base changes nothing
    for name in p:
        a, b = p[name].double().numpy(), f[name].double().numpy()
        angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        arc = (np.sin(0.7 * angle) * a + np.sin(0.3 * angle) * b) / np.sin(angle)
        for folder, expected in (
            ("average", 0.75 * s[name] + 0.25 * d[name]),
            ("wise", p[name] + 0.3 * (s[name] - p[name])),
            ("arc", torch.from_numpy(arc).float()),
        ):
            torch.testing.assert_close(tensors(tmp_path / folder)[name], expected, rtol=1e-5, atol=1e-7)


def test_what_did_not_move_keeps_its_bits_on_the_line_and_the_ends_are_the_models():
    base, tuned = torch.tensor([-0.0, 0.1, 3.0]), torch.tensor([-0.0, 7.7, 3.0])
    assert identical(between(base, tuned, 0.3)[::2], base[::2])
    assert identical(between(base, tuned, 1.0), tuned)
    assert identical(between(base, tuned, 0.0), base)


def test_slerp_takes_the_line_only_where_vectors_are_nearly_parallel():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert slerp_factors(a, b, 0.5) == pytest.approx((0.5**0.5, 0.5**0.5))
    for cos, on_the_line in ((0.99951, True), (0.99949, False), (-0.99951, True)):
        near = torch.tensor([cos, (1 - cos**2) ** 0.5], dtype=torch.float64)
        assert (slerp_factors(a.double(), near, 0.25) == (0.75, 0.25)) == on_the_line
    assert slerp_factors(torch.zeros(2), b, 1.0)[1] == pytest.approx(1.0)


def test_mergekit_agrees(tmp_path, trio):
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    p, s, d = map(str, trio)
    far = str(changed_copy(trio[0], tmp_path / "far", moved(7, scale=1.0)))

    def theirs(name: str, base: str | None, models: dict[str, dict], **parameters) -> dict[str, torch.Tensor]:
        models = [{"model": model, "parameters": settings} for model, settings in models.items()]
        config = {"merge_method": name, "models": models, "parameters": parameters, "dtype": "float32"}
        config |= {"base_model": base} if base else {}
        options = MergeOptions(copy_tokenizer=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(config), str(tmp_path / f"theirs-{name}"), options)
        return dict(Weights(tmp_path / f"theirs-{name}"))

    ties = {model: {"weight": 1.0, "density": 0.2} for model in (s, d)}
    found = {
        "ties": (theirs("ties", p, ties, normalize=True), [s, d], p),
        "average": (theirs("linear", None, {s: {"weight": 1.0}, d: {"weight": 1.0}}), [s, d], None),
        "slerp": (theirs("slerp", p, {far: {}}, t=0.5), [p, far], None),
    }
    for method, (expected, models, base) in found.items():
        assert merge(method, tmp_path / method, models, base) == 0
        ours = tensors(tmp_path / method)
        assert ours.keys() == expected.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-7, msg=f"{method} {name}")


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
def test_the_largest_deltas_are_kept_and_all_that_tie_with_the_smallest_of_them(density):
    delta = torch.randint(-4, 5, (1000,), generator=torch.Generator().manual_seed(0)).float() / 1024
    delta[7] = -0.0
    kept = MagnitudePruner(lambda name: delta, ["delta"], density)(delta)
    count = int(density * 1000)
    smallest = delta.abs().sort(descending=True).values[count - 1] if count else torch.inf
    assert torch.equal(kept, delta * (delta.abs() >= smallest))
    assert count <= int((delta.abs() >= smallest).sum())


def test_a_merge_does_not_depend_on_shards(tmp_path, tuned, tiny, capsys):
    """In bf16, where many deltas are equal."""
    assert merge("ties", tmp_path / "one", [tuned], tiny, "--trim", "global") == 0
    said = capsys.readouterr().out.partition(" in ")[0]
    AutoModelForCausalLM.from_pretrained(tuned).save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    AutoTokenizer.from_pretrained(tuned).save_pretrained(tmp_path / "shards")
    flags = ["--trim", "global", "--max_shard_size", "600KB"]
    assert merge("ties", tmp_path / "two", [tmp_path / "shards"], tiny, *flags) == 0
    assert same(tmp_path / "two", tensors(tmp_path / "one"))
    assert capsys.readouterr().out.partition(" in ")[0] == said

    index = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "two").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert all(index["weight_map"][name] == file.name for file in files for name in load_file(file))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert loaded.dtype == torch.bfloat16
    assert all(identical(p.data, tensors(tmp_path / "one")[name]) for name, p in loaded.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "two").chat_template


def test_results_are_in_the_first_models_dtypes(tmp_path, tuned, tiny):
    mixed = changed_copy(tuned, tmp_path / "mixed", lambda name, t: t.float() if "norm" in name else t)
    assert merge("average", tmp_path / "out", [mixed, tiny]) == 0
    ours, theirs = tensors(tmp_path / "out"), tensors(mixed)
    assert all(ours[name].dtype == theirs[name].dtype for name in theirs)
    expected = (theirs["model.norm.weight"] + tensors(tiny)["model.norm.weight"].float()) / 2
    assert torch.equal(ours["model.norm.weight"], expected)


def test_bin_files_are_read_and_tensors_that_are_no_parameters_are_the_first_models(tmp_path, tuned, tiny):
    """As in Llama-2's files, which hold a `rotary_emb.inv_freq` that no model has."""
    old = shutil.copytree(tuned, tmp_path / "old")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(16)}
    torch.save(tensors(tuned) | extra, old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    assert reset(old, tiny, tmp_path / "out") == 0
    assert reset(tuned, tiny, tmp_path / "plain") == 0
    assert same(tmp_path / "out", tensors(tmp_path / "plain") | extra)


def test_tensors_that_are_not_parameters_must_be_in_all_models_and_may_be_integers(tmp_path, tuned, tiny, capsys):
    extra = {"mask": torch.tensor([0, 255], dtype=torch.uint8), "flags": torch.tensor([True, False])}
    old = shutil.copytree(tuned, tmp_path / "old")
    save_file(tensors(tuned) | extra, old / "model.safetensors", metadata={"format": "pt"})
    assert merge("average", tmp_path / "out", [old, tiny]) == 2
    assert "only the first has flags, mask" in error_of(capsys)  # such as a value head
    new = shutil.copytree(tiny, tmp_path / "new")
    save_file(tensors(tiny) | extra, new / "model.safetensors", metadata={"format": "pt"})
    assert merge("average", tmp_path / "out", [old, new]) == 0
    content = tensors(tmp_path / "out")
    assert all(identical(content[name], extra[name]) for name in extra)
    assert len(content) == 41


def test_an_adapter_becomes_a_plain_model(tmp_path, tiny, capsys):
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    # With --base, since a model that was loaded from a folder need not have its name in the adapter.
    assert merge("adapter", tmp_path / "out", [tmp_path / "adapter"], tiny) == 0
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before, after = tensors(tiny), tensors(tmp_path / "out")
    for name, tensor in before.items():
        if "q_proj" in name:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            product = lora[f"{path}.lora_B.weight"] @ lora[f"{path}.lora_A.weight"] * 2
            tensor = (tensor.float() + product).bfloat16()  # noqa: PLW2901
        assert identical(after[name], tensor), name
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"

    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    get_peft_model(plain, prompt).save_pretrained(tmp_path / "prompt")
    capsys.readouterr()
    assert merge("adapter", tmp_path / "no", [tmp_path / "prompt"], tiny) == 2
    assert "learned prompts are not weights and cannot be merged" in error_of(capsys)
    assert merge("adapter", tmp_path / "no", [tiny]) == 2
    assert "holds no adapter that PEFT saved" in error_of(capsys)


@pytest.mark.parametrize("method", ["adalora", "osf"])
def test_an_adapter_that_was_trained_merges_into_what_peft_computes(tmp_path, trio, sft, capsys, method):
    small = ["--per_device_train_batch_size", "4", "--global_batch_size", "4", "--max_length", "64"]
    tiny = trio[0]  # in fp32, so that the merged weights are not rounded
    assert sft(tmp_path / "adapter", *small, "--max_steps", "2", method=method, model=tiny) == 0
    capsys.readouterr()
    assert merge("adapter", tmp_path / "out", [tmp_path / "adapter"]) == 0
    assert "wrote 5.31MB in" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    words = torch.arange(40, 60)[None]
    with torch.no_grad():
        start = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)(words).logits
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval().float()(words).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(words).logits
    assert (adapted - start).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert merge("adapter", tmp_path / "other", [tmp_path / "adapter"], trio[1]) == 2
    assert f"{trio[1]} is not the base of {tmp_path / 'adapter'}" in error_of(capsys)


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path, tiny, capsys):
    def refused(message: str, *flags: str) -> None:
        assert (
            main(["merge", "--method", "adapter", "--models", str(adapter), "--out", str(tmp_path / "out"), *flags])
            == 2
        )
        assert message in error_of(capsys)
        assert not (tmp_path / "out").exists()

    def named(base: str | None) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))

    adapter, config = tmp_path / "adapter", AutoConfig.from_pretrained(tiny)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base, lora)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(adapter)
    tied = ["--base", str(tmp_path / "tied")]
    refused("changes lm_head.weight or model.embed_tokens.weight, which", *tied)

    for nothing in (None, ""):
        named(nothing)
        refused("name its base with --base")
    named(str(tmp_path / "gone"))
    refused("not found")
    named(str(tmp_path / "tied"))
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[:-100])
    refused("cannot merge")
    (adapter / "adapter_model.safetensors").unlink()
    refused("cannot merge")
    assert reset(adapter, tiny, tmp_path / "out") == 2
    assert "is an adapter, not a model; `hft merge --method adapter" in error_of(capsys)


def test_an_adapters_folder_gives_its_tokenizer_and_not_its_config(tmp_path, tiny):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("mine")
    assert merge("adapter", tmp_path / "out", [tmp_path / "adapter"], tiny) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "mine"
    assert (tmp_path / "out" / "config.json").read_text() == (tiny / "config.json").read_text()


def test_an_adapters_base_is_taken_at_its_revision(tmp_path, tiny, tuned, monkeypatch):
    for revision, model in {"main": tiny, "second": tuned}.items():
        shutil.copytree(model, tmp_path / "models--some--model" / "snapshots" / (revision * 40)[:40])
        (tmp_path / "models--some--model" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--some--model" / "refs" / revision).write_text((revision * 40)[:40])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=4, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = "some/model"
    model.peft_config["default"].revision = "second"
    model.save_pretrained(tmp_path / "adapter")  # adds nothing yet
    assert merge("adapter", tmp_path / "out", [tmp_path / "adapter"]) == 0
    assert same(tmp_path / "out", tensors(tuned))


def test_make_names_the_models_of_a_reset_and_of_merges():
    targets = ["reset", "merge-ties-sd", "merge-average-sd"]
    command = ["make", "-n", *targets, "MODEL=llama2-7b"]
    outer = {key: value for key, value in os.environ.items() if key not in ("ARGS", "MAKEFLAGS")}  # of make test
    environment = outer | {"S": "no/model", "P": "nor/this"}
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.replace(
        "\\\n", " "
    )
    lines = [
        line.split("hft ", 1)[1].split() for line in text.splitlines() if "hft reset" in line or "hft merge" in line
    ]
    both = ["--models", "runs/llama2-7b-sft-fft", "runs/llama2-7b-dpo-fft"]
    reset, ties, average = lines
    assert reset == ["reset", "--config", "recipes/llama2-7b/reset.yaml", "--out", "runs/llama2-7b-reset"]
    assert ties[:6] == ["merge", "--config", "recipes/merges/ties-sd.yaml", *both]
    assert ties[6:] == ["--base", "meta-llama/Llama-2-7b-hf", "--out", "runs/llama2-7b-merge-ties-sd"]
    assert average[:6] == ["merge", "--config", "recipes/merges/average-sd.yaml", *both]
    assert average[6:] == ["--out", "runs/llama2-7b-merge-average-sd"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "ties", "--models", "S", "--out", "O"], "ties needs --base"),
        (["--method", "average", "--models", "S", "--out", "O"], "average takes 2 models or more, got 1"),
        (["--method", "slerp", "--models", "P", "S", "D", "--out", "O"], "slerp takes 2 models, got 3"),
        (["--method", "wise-ft", "--models", "S", "D", "--base", "P", "--out", "O"], "wise-ft takes 1 model, got 2"),
        (
            ["--method", "ties", "--models", "S", "--base", "P", "--out", "O", "--alpha", "0.5"],
            "alpha is not a setting of",
        ),
        (["--method", "ties", "--models", "S", "--base", "P", "--out", "O", "--density", "1.5"], "density: expected"),
        (["--method", "dare", "--models", "S", "--base", "P", "--out", "O", "--drop", "1"], "drop: expected"),
        (["--method", "wise-ft", "--models", "S", "--base", "P", "--out", "O", "--alpha", "-1"], "alpha: expected"),
        (["--method", "average", "--models", "S", "D", "--out", "O", "--weights", "1"], "weights must be 2"),
        (["--method", "average", "--models", "S", "D", "--out", "O", "--weights", "1", "-1"], "which must not be 0"),
        (
            ["--method", "dare", "--models", "S", "--base", "P", "--out", "O", "--weights", "nan"],
            "weights: expected a finite",
        ),
        (["--method", "average", "--models", "S", "D", "--out", "O", "--max_shard_size", "huge"], "such as 5GB"),
        (["--method", "average", "--models", "S", "D", "--out", "."], "is the current folder"),
        (["--method", "average", "--models", "S", "D", "--out", "O", "--weigths", "1"], "did you mean 'weights'"),
        (["--method", "mean", "--models", "S", "D", "--out", "O"], "method: expected 'average'"),
        (["--models", "S", "D", "--out", "O"], "method, models and out are needed"),
        (["--method", "average", "--models", "S", "S", "--out", "O"], "are the same model"),
        (["--method", "ties", "--models", "S", "--base", "S", "--out", "O"], "are the same model"),
        (["--method", "average", "--models", "S", "D", "--out", "S"], "is, holds or lies in the input"),
        (["--method", "average", "--models", "S", "D", "--out", "full"], "exists and is not an empty folder"),
        (["--method", "average", "--models", "S", "gone", "--out", "O"], "not found"),
    ],
)
def test_what_a_method_does_not_take_is_refused(tmp_path, trio, capsys, monkeypatch, words, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    places = {letter: str(folder) for letter, folder in zip("PSD", trio, strict=True)}
    places |= {name: str(tmp_path / name) for name in ("O", "full", "gone")}
    monkeypatch.chdir(tmp_path)
    assert main(["merge", *(places.get(word, word) for word in words)]) == 2
    assert message in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_models_that_do_not_fit_are_refused_with_the_first_difference(tmp_path, tuned, tiny, capsys):
    def other(name: str, **changes) -> Path:
        config = AutoConfig.from_pretrained(tiny)
        for key, value in changes.items():
            setattr(config, key, value)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        return tmp_path / name

    def refused(base: Path, message: str) -> None:
        assert reset(tuned, base, tmp_path / "out") == 2
        assert message in error_of(capsys)
        assert not (tmp_path / "out").exists()

    refused(tuned, "are the same model")
    refused(other("vocab", vocab_size=2049), "vocab_size is 2048 in the first and 2049 in the second")
    rope = {"rope_type": "default", "rope_theta": 1e6}
    refused(other("rope", rope_parameters=rope), "rope_parameters is {'rope_theta': 10000.0, 'rope_type': 'default'}")
    refused(other("deep", num_hidden_layers=5), "only the second has model.layers.4.input_layernorm.weight")
    refused(other("wide", intermediate_size=360), "has shape [352, 128] in the first and [360, 128] in the second")
    qwen = AutoConfig.for_model("qwen2", vocab_size=2048, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    AutoModelForCausalLM.from_config(qwen).save_pretrained(tmp_path / "qwen")
    refused(tmp_path / "qwen", "model_type is llama in the first and qwen2 in the second")

    headless = changed_copy(tiny, tmp_path / "headless", lambda _, tensor: tensor)
    content = {name: tensor for name, tensor in tensors(tiny).items() if name != "lm_head.weight"}
    save_file(content, headless / "model.safetensors")
    refused(headless, "lacks lm_head.weight")
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    next((tmp_path / "shards").glob("*00002*")).unlink()
    refused(tmp_path / "shards", "is incomplete")
    nan = changed_copy(tiny, tmp_path / "nan", lambda name, t: t * float("nan") if "1.mlp.up" in name else t)
    assert merge("average", tmp_path / "out", [tuned, nan]) == 2
    assert "model.layers.1.mlp.up_proj.weight would hold NaN or infinity" in error_of(capsys)
    assert reset(tuned, tiny, tmp_path / "out", "--policy", "all") == 2
    assert "nothing would be reset" in error_of(capsys)
    assert merge("average", tmp_path / "merge", [tuned, tiny]) == 0
    assert main(["verify", str(tmp_path / "merge")]) == 2
    assert "there is nothing to verify: it is a merge" in error_of(capsys)
    assert not list(tmp_path.glob(".out*"))


def test_a_tied_head_is_merged_once_and_one_that_is_not_tied_in_fact_is_refused(tmp_path, tiny, capsys):
    config = AutoConfig.from_pretrained(tiny)
    config.tie_word_embeddings = True
    for name in "ab":
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    content = tensors(tmp_path / "a")
    twin = {"lm_head.weight": content["model.embed_tokens.weight"].clone()}
    save_file(content | twin, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    assert merge("average", tmp_path / "out", [tmp_path / "a", tmp_path / "b"]) == 0
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    twin["lm_head.weight"][0, 0] += 1
    save_file(content | twin, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    assert merge("average", tmp_path / "no", [tmp_path / "a", tmp_path / "b"]) == 2
    assert "stores a lm_head.weight that differs from model.embed_tokens.weight" in error_of(capsys)


def test_values_that_overflow_the_stored_dtype_are_refused(tmp_path, tiny, capsys):
    half = changed_copy(tiny, tmp_path / "half", lambda _, tensor: tensor.half())
    huge = changed_copy(half, tmp_path / "huge", lambda name, t: t * 0 + 60000 if "1.mlp.up" in name else t)
    assert merge("dare", tmp_path / "out", [huge], half, "--drop", "0.5") == 2
    assert "overflows torch.float16" in error_of(capsys)


def test_a_full_disk_leaves_nothing(tmp_path, tuned, tiny, capsys, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # fails in the middle of the file
    try:
        assert reset(tuned, tiny, tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no room on the disk" in error_of(capsys)
    assert list(tmp_path.iterdir()) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    assert reset(tuned, tiny, tmp_path / "out") == 2
    assert "has 0.0 GB free" in error_of(capsys)
    monkeypatch.setattr(merging, "MagnitudePruner", None)  # its passes would take long
    assert merge("ties", tmp_path / "out", [tuned], tiny, "--trim", "global") == 2
    assert "has 0.0 GB free" in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import os, re, signal, sys
from hft.cli import main

def anonymous():  # pages of mapped files count as resident too, but the kernel takes them back when it needs them
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

folder, peak = sys.argv[1], 0
words = ["merge", "--method", "ties", "--base"]
small = [sys.argv[2], "--models", sys.argv[3], "--out", f"{folder}/small"]
assert main([*words, *small]) == 0  # loads what is loaded at the first use

from hft.merging import checkpoint as checkpoints
fp32 = checkpoints.Checkpoint.fp32

def watched(self, name):
    global peak
    peak = max(peak, anonymous())
    return fp32(self, name)

checkpoints.Checkpoint.fp32 = watched
before, peak = anonymous(), 0
words += [f"{folder}/P", "--models", f"{folder}/S", f"{folder}/D"]
assert main([*words, "--out", f"{folder}/big", "--trim", "global", "--max_shard_size", "20MB"]) == 0
print("peak", peak - before, flush=True)

def killed(self, name):
    if ".0." in name:
        os.kill(os.getpid(), signal.SIGKILL)
    return fp32(self, name)

checkpoints.Checkpoint.fp32 = killed
main([*words, "--out", f"{folder}/killed"])
"""


def test_a_merge_needs_little_memory_and_a_killed_one_leaves_no_model(tmp_path, tiny, tuned):
    """Of models of 85 MB whose largest tensors have 17 MB: a shard, and some tensors in fp32."""
    config = AutoConfig.from_pretrained(tiny)
    config.hidden_size, config.head_dim, config.vocab_size, config.num_hidden_layers = 1024, 256, 8192, 5
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    assert size > 5 * largest
    for name in "PSD":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape[-1], dtype=parameter.dtype))
        model.save_pretrained(tmp_path / name, max_shard_size="30MB")
    command = [sys.executable, "-c", SCRIPT, *map(str, (tmp_path, tiny, tuned))]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")
    }  # make keeps memory
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    peak = int(process.stdout.partition("peak ")[2].split()[0])
    assert peak < 18 * largest, process.stderr  # fp32 deltas of two models, and what TIES makes of them
    assert process.returncode == -9
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / ".killed.partial").exists()
    assert merge("ties", tmp_path / "killed", [tuned], tiny) == 0
    assert not (tmp_path / ".killed.partial").exists()
    assert same(tmp_path / "killed", tensors(tmp_path / "small"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "big").dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", sorted(Path("recipes").glob("*/reset.yaml")), ids=str)
def test_reset_recipes_are_sound(recipe):
    config, _ = resolve(["--config", str(recipe), "--out", "out"], ResetConfig, SelectionConfig)
    assert fill(SelectionConfig, config) == SelectionConfig()
    assert fill(ResetConfig, config).tuned
    assert "make reset" in recipe.read_text()


@pytest.mark.parametrize("recipe", sorted(Path("recipes/merges").glob("*.yaml")), ids=str)
def test_merge_recipes_are_sound(recipe):
    assert f"make merge-{recipe.stem} MODEL=llama2-7b" in recipe.read_text()
    models = ["S", "D"] if recipe.stem.endswith("-sd") else ["S"]
    base = ["--base", "P"] if OPERATORS[yaml.safe_load(recipe.read_text())["method"]].base else []
    config, _ = resolve(["--config", str(recipe), "--models", *models, *base, "--out", "out"], MergeConfig)
    check_config(fill(MergeConfig, config), config)


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_a_fused_projection_is_reset_by_its_ranges(tmp_path, family):
    base = small(family)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    words = ["--tuned", tmp_path / "tuned", "--base", tmp_path / "base", "--out", tmp_path / "out"]
    assert main(["reset", *map(str, words)]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    selection = select(anatomy_of(base), SelectionConfig())
    assert selection.frozen_masks
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for unit in selection.anatomy.units:
        for part in unit.parts:
            own = torch.zeros(part.shape, dtype=torch.bool)
            part.mark(own, True)
            expected = (tuned if selection.trains(unit) else base).get_parameter(part.parameter)
            assert torch.equal(out.get_parameter(part.parameter)[own], expected[own]), unit.name


def test_models_stored_expert_by_expert_are_refused(tmp_path, capsys):
    small("mixtral").save_pretrained(tmp_path / "a")
    words = ["merge", "--method", "average", "--models", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out"]
    assert main(list(map(str, words))) == 2
    message = error_of(capsys)
    assert "but transformers computes with model.layers.0.mlp." in message
    assert "only models that need no such conversion can be combined" in message


def test_another_base_of_the_same_shapes_is_refused(tmp_path, finished, tiny, tuned, capsys):
    """By the frozen half, which is the base's; `tuned` is the base, moved."""
    name = "which was frozen, differs"
    assert reset(finished, tuned, tmp_path / "out", "--selection_seed", "1") == 2
    assert name in error_of(capsys)
    for method in ("wise-ft", "ties"):
        assert merge(method, tmp_path / "out", [finished], tuned) == 2
        assert name in error_of(capsys)
    assert main(["diff", str(tuned), str(finished)]) == 0
    assert name in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert reset(finished, tiny, tmp_path / "out", "--selection_seed", "1") == 0


def test_base_and_tuned_give_a_merge_with_the_tuned_models_files(tmp_path, finished, tiny, capsys):
    """Whichever comes first; without a manifest the one with a chat template counts as tuned."""
    model = shutil.copytree(finished, tmp_path / "model")
    (model / "chat_template.jinja").write_text("of the tuned model")
    generation = json.loads((model / "generation_config.json").read_text()) | {"eos_token_id": 7}
    (model / "generation_config.json").write_text(json.dumps(generation))
    assert merge("average", tmp_path / "out", [tiny, model]) == 0
    said = rf"NOTE: not all models have the same chat_template, .*generation_config, .*; taken from {model}\n"
    assert re.search(said, capsys.readouterr().out)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "of the tuned model"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 7
    plain = shutil.copytree(tiny, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    (model / "hft_manifest.json").unlink()
    assert merge("slerp", tmp_path / "slerp", [plain, model]) == 0
    assert (tmp_path / "slerp" / "chat_template.jinja").read_text() == "of the tuned model"
