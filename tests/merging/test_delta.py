"""`save_only_trained`, and `hft merge --method delta`, which puts what was saved back into the base."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hft
from hft.cli import main
from hft.record.manifest import Manifest
from hft.runs.train import make_trainer
from tests.conftest import command, error_of, identical, losses, tensors
from tests.model.test_architectures import small

ONLY_TRAINED = ("--save_only_trained", "true")


@pytest.fixture(scope="module")
def part(tmp_path_factory, tiny, data, finished):
    """The run of `finished`, with only what trained in the end and in its checkpoints."""
    out = tmp_path_factory.mktemp("runs") / "part"
    assert main(command("sft", out, *ONLY_TRAINED, model=tiny, data=data)) == 0
    return out


def merged(run, out, *flags):
    assert main(["merge", "--method", "delta", "--models", str(run), "--out", str(out), *map(str, flags)]) == 0
    return out


def config_of(model, data, out):
    keys = {"model_name_or_path": str(model), "dataset_name": str(data), "output_dir": str(out), "report_to": "none"}
    return hft.load_config("sft", "recipes/tiny/sft.yaml", "recipes/methods/hft.yaml", **keys, save_only_trained=True)


def same_files(ours, theirs):
    ours, theirs = tensors(ours), tensors(theirs)
    return ours.keys() == theirs.keys() and all(identical(ours[name], theirs[name]) for name in theirs)


def test_only_what_trained_is_saved_and_becomes_the_whole_model(part, finished, tmp_path, capsys):
    manifest = Manifest.load(part)
    assert tensors(part).keys() == set(manifest.trained_parameters)
    assert not (part / "config.json").exists()  # so that nothing takes it for a model
    assert main(["verify", str(part)]) == 0
    assert "frozen:  18 of 18 tensors bit-identical" in capsys.readouterr().out
    new = merged(part, tmp_path / "new")
    assert same_files(new, finished)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (new / name).read_bytes() == (finished / name).read_bytes()
    assert main(["verify", str(new)]) == 0
    assert Manifest.load(new) == Manifest.load(finished)


def test_a_checkpoint_becomes_one_too(part, finished, tmp_path):
    assert same_files(merged(part / "checkpoint-2", tmp_path / "new"), finished / "checkpoint-2")


@pytest.mark.parametrize("flags", [ONLY_TRAINED, ()], ids=["again", "now-whole"])
def test_a_run_goes_on_exactly_from_what_trained(part, finished, tmp_path, sft, flags):
    out = tmp_path / "out"
    shutil.copytree(part / "checkpoint-2", out / "checkpoint-2")
    assert sft(out, *flags) == 0
    assert same_files(out, part if flags else finished)
    assert losses(out / "checkpoint-4") == losses(finished / "checkpoint-4")


def test_checkpoints_hold_the_trained_halfs_state(part, finished):
    """Weights in fp32 and two moments of what trains; a checkpoint of everything holds 12 bytes per parameter."""
    numbers = {name: tensor.numel() for name, tensor in tensors(finished).items()}
    trained = sum(numbers[name] for name in Manifest.load(part).trained_parameters)
    bytes_of = {
        name: sum((folder / "checkpoint-4" / file).stat().st_size for file in ("model.safetensors", "optimizer.pt"))
        for name, folder in (("part", part), ("whole", finished))
    }
    assert bytes_of["part"] == pytest.approx(12 * trained, rel=0.01)
    assert bytes_of["whole"] == pytest.approx(12 * trained + 2 * (sum(numbers.values()) - trained), rel=0.01)


@pytest.mark.parametrize(
    "case", ["tied, in shards, fp32", "tied, frozen embeddings", "elements", "experts", "schedule"]
)
def test_the_whole_model_is_what_a_run_without_the_key_saves(tmp_path, tiny, sft, case):
    flags, base, method = ["--max_steps", "2"], tmp_path / "base", "hft"
    if "tied" in case:
        torch.manual_seed(0)
        config = LlamaConfig.from_pretrained(tiny, tie_word_embeddings=True, hidden_size=32, intermediate_size=48)
        model = LlamaForCausalLM(config).to(torch.float32 if "fp32" in case else torch.bfloat16)
        model.save_pretrained(base, max_shard_size="100KB" if "shards" in case else "5GB")
        AutoTokenizer.from_pretrained(tiny).save_pretrained(base)
        assert (base / "model.safetensors.index.json").exists() == ("shards" in case)
    elif case == "experts":
        small("mixtral").save_pretrained(base)  # one expert per tensor
        AutoTokenizer.from_pretrained(tiny).save_pretrained(base)
    else:
        shutil.copytree(tiny, base)
        method = "random-element" if case == "elements" else "badam"
    flags += [] if "fp32" in case else ["--freeze_embeddings", "true"]
    assert sft(tmp_path / "whole", *flags, model=base, method=method) == 0
    assert sft(tmp_path / "part", *flags, *ONLY_TRAINED, model=base, method=method) == 0
    moved = shutil.move(base, tmp_path / "moved")
    new = merged(tmp_path / "part", tmp_path / "new", "--base", moved)
    assert same_files(new, tmp_path / "whole")
    assert main(["verify", str(new), "--base", str(moved)]) == 0
    trained, whole = ({n: t.numel() for n, t in tensors(tmp_path / name).items()} for name in ("part", "whole"))
    fraction = Manifest.load(tmp_path / "part").trainable_fraction["model"]
    assert case == "schedule" or sum(trained.values()) == round(fraction * sum(whole.values()))  # to the element


def test_every_command_that_takes_a_model_says_how_to_make_it_whole(part, tiny, tmp_path, sft, capsys):
    other = str(tiny)
    commands = [
        ["eval", str(part)],
        ["diff", other, str(part)],
        ["merge", "--method", "average", "--models", str(part), other, "--out", str(tmp_path / "new")],
        ["reset", "--tuned", str(part), "--base", other, "--out", str(tmp_path / "new")],
        ["verify", str(part), "--base", str(part)],
        ["sft", "--config", "recipes/tiny/sft.yaml", "--model_name_or_path", str(part)],
        ["cpi", "--config", "recipes/tiny/cpi.yaml", "--model_name_or_path", str(part)],
        ["continual", "--config", "recipes/tiny/trace.yaml", "--model_name_or_path", str(part)],
        ["eval", str(part / "checkpoint-2")],
    ]
    capsys.readouterr()
    for words in commands:
        assert main(words) == 2, words
        assert "hft merge --method delta --models" in error_of(capsys), words


def test_another_base_is_refused(part, finished, tiny, tmp_path, capsys):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    content = tensors(broken)
    name = next(iter(Manifest.load(part).frozen_checksums))
    content[name].view(torch.uint8)[0, 0] ^= 1
    save_file(content, broken / "model.safetensors", metadata={"format": "pt"})
    words = ["merge", "--method", "delta", "--out", str(tmp_path / "new"), "--models"]
    assert main([*words, str(part), "--base", str(broken)]) == 2
    assert f"is not the base of {part}, or one of the two is damaged: {name} differs" in error_of(capsys)
    assert main([*words, str(finished), "--base", str(tiny)]) == 2
    assert "holds the whole model already" in error_of(capsys)
    assert main(["verify", str(part), "--base", str(broken)]) == 1
    gone = shutil.copytree(part, tmp_path / "gone")
    path = gone / "hft_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": str(tmp_path / "nowhere")}))
    assert main(["verify", str(gone)]) == 2
    assert "was not found; name it with --base" in error_of(capsys)
    assert main([*words, str(gone)]) == 2
    assert "was not found; name it with --base" in error_of(capsys)


def test_what_moved_in_memory_fails_verify(tiny, data, tmp_path, capsys):
    """The folder does not show it, so it is found when the folder is written."""
    trainer = make_trainer(hft.make_plan(config_of(tiny, data, tmp_path / "out")))
    name = trainer.selection.frozen_parameters[0]
    trainer.model.get_parameter(name).data.view(-1)[0] += 1
    trainer.save_model()
    assert Manifest.load(tmp_path / "out").moved == [name]
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert f"MISMATCH {name}: changed in memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft", "--config", "recipes/tiny/sft.yaml", "recipes/methods/lora.yaml"], "an adapter's folder holds only"),
        (["cpi", "--config", "recipes/tiny/cpi.yaml"], "each run starts from the models of those before"),
        (["continual", "--config", "recipes/tiny/trace.yaml"], "each run starts from the models of those before"),
    ],
)
def test_where_whole_models_are_needed_it_is_refused(tmp_path, tiny, capsys, words, message):
    flags = ["--model_name_or_path", str(tiny), "--output_dir", str(tmp_path / "out")]
    assert main([*words, *flags, *ONLY_TRAINED]) == 2
    assert message in error_of(capsys)
