"""What is proved is complete: every tensor of a checkpoint is in exactly one of frozen and trained."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hft
from hft.cli import main
from hft.runs.result import RunResult
from tests.conftest import error_of, tensors


def rewritten(folder, change) -> None:
    content = tensors(folder)
    change(content)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tensor_that_the_manifest_forgets_fails(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    manifest = json.loads((out / "hft_manifest.json").read_text())
    name = next(iter(manifest["frozen_checksums"]))
    del manifest["frozen_checksums"][name]
    (out / "hft_manifest.json").write_text(json.dumps(manifest))
    rewritten(out, lambda content: content.update({name: torch.zeros_like(content[name])}))
    assert main(["verify", str(out)]) == 1
    assert f"UNLISTED {name}: the manifest says neither frozen nor trained" in capsys.readouterr().out


def test_a_tensor_that_is_missing_fails(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    name = hft.Manifest.load(out).trained_parameters[0]
    rewritten(out, lambda content: content.pop(name))
    assert main(["verify", str(out)]) == 1
    assert f"MISSING {name}" in capsys.readouterr().out


def test_nan_in_what_trained_is_said(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    name = hft.Manifest.load(out).trained_parameters[0]
    rewritten(out, lambda content: content[name].view(-1)[:1].fill_(torch.nan))
    main(["verify", str(out)])
    assert f"WARNING: NaN or infinity: {name}" in capsys.readouterr().out


def test_a_head_that_the_config_ties_and_the_file_does_not_is_refused(tmp_path, tiny, sft, capsys):
    config = AutoConfig.from_pretrained(tiny)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "tied")
    other = torch.randn(config.vocab_size, config.hidden_size)
    rewritten(tmp_path / "tied", lambda content: content.update({"lm_head.weight": other}))
    assert sft(tmp_path / "out", model=tmp_path / "tied") == 2
    assert "lm_head.weight would be neither frozen nor trained" in error_of(capsys)


def test_the_result_is_that_of_the_weights_that_were_saved(tmp_path, sft, data):
    """The best checkpoint's, not the last step's."""
    flags = ["--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--learning_rate", "0.03"]
    flags += ["--eval_strategy", "steps", "--eval_on_start", "true", "--eval_steps", "2", "--max_steps", "6"]
    assert sft(tmp_path / "out", *flags, "--save_total_limit", "3", method="lisa") == 0
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    losses = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    assert losses[6] > min(losses[2], losses[4]) == state["best_metric"]
    before, after = RunResult.load(tmp_path / "out").held_out["loss"]
    assert (before, after) == (losses[0], pytest.approx(state["best_metric"], rel=1e-6))


def test_a_checkpoint_without_optimizer_state_is_not_resumed(tmp_path, sft, capsys):
    assert sft(tmp_path / "out", "--save_only_model", "true", "--max_steps", "2") == 0
    (tmp_path / "out" / "results.json").unlink()
    capsys.readouterr()
    assert sft(tmp_path / "out", "--save_only_model", "true") == 2
    assert "holds no optimizer or scheduler state (save_only_model)" in error_of(capsys)
