"""A run as a value: planned, trained and read back from Python, several in one process."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import hft
from hft.cli import main
from hft.errors import HFTError
from hft.machine import leave_process_group
from hft.planning.forecast import forecast
from hft.runs.plan import load_model_config
from hft.runs.result import summary
from tests.conftest import ROOT, command, error_of, tensors
from tests.processes import torchrun


def chain(words: list[str]) -> int:
    """SFT, then DPO from its result."""
    tiny, data, pairs, out = words
    recipe, method = "recipes/tiny/{}.yaml", "recipes/methods/hft.yaml"
    common = {"max_steps": 2, "save_steps": 2, "eval_strategy": "no", "eval_on_start": False, "report_to": "none"}
    common |= {"bf16": False, "per_device_train_batch_size": 2, "global_batch_size": 4}
    sft = {"model_name_or_path": tiny, "dataset_name": data, "output_dir": f"{out}/sft"}
    first = hft.train(hft.make_plan(hft.load_config("sft", recipe.format("sft"), method, **sft, **common)))
    dpo = {"model_name_or_path": f"{out}/sft", "dataset_name": pairs, "output_dir": f"{out}/dpo"}
    second = hft.train(hft.make_plan(hft.load_config("dpo", recipe.format("dpo"), method, **dpo, **common)))
    assert first.ok
    assert second.ok
    assert (first.steps, second.steps) == (2, 2)
    assert hft.RunResult.load(f"{out}/dpo") == second
    leave_process_group()
    return 0


@pytest.fixture(scope="module")
def chains(tmp_path_factory, tiny, data, pairs):
    """The chain in one process and in two."""
    os.chdir(ROOT)
    folder = tmp_path_factory.mktemp("chains")
    torchrun(2, chain, tiny, data, pairs, folder / "two")
    chain([*map(str, (tiny, data, pairs)), f"{folder}/one"])
    return folder


def test_sft_then_dpo_in_one_process(chains, tiny):
    rounds = [hft.Manifest.load(chains / "one" / name) for name in ("sft", "dpo")]
    assert [manifest.selection["round"] for manifest in rounds] == [1, 2]
    assert rounds[0].frozen_units != rounds[1].frozen_units
    assert rounds[1].base == str(chains / "one" / "sft")
    for name in ("sft", "dpo"):
        assert main(["verify", str(chains / "one" / name)]) == 0


def test_two_gloo_processes_take_the_same_two_runs(chains):
    for name in ("sft", "dpo"):
        one, two = (hft.Manifest.load(chains / how / name) for how in ("one", "two"))
        assert one.frozen_units == two.frozen_units
        ours, theirs = (tensors(chains / how / name / "checkpoint-2") for how in ("one", "two"))
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=2e-3, atol=2e-5)


def config_of(tiny, data, out, **keys):
    settings = {"model_name_or_path": str(tiny), "dataset_name": str(data), "output_dir": str(out)}
    settings |= {"max_steps": 2, "eval_strategy": "no", "eval_on_start": False, "report_to": "none"}
    return hft.load_config("sft", "recipes/tiny/sft.yaml", "recipes/methods/hft.yaml", **(settings | keys))


def test_a_plan_writes_prints_and_loads_nothing(tiny, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    plan = hft.make_plan(config_of(tiny, data, tmp_path / "out"))
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()
    assert len(plan.data.train) == 80
    assert plan.selection.fraction_of_layers == 0.5
    assert "global batch 16 = 16 rows x 1 process x 1 accumulation steps" in plan.report()
    assert "80 training rows, 2 steps" in plan.report()


def test_the_memory_of_a_plan_is_what_its_parts_take(tiny, data, tmp_path):
    plan = hft.make_plan(config_of(tiny, data, tmp_path / "out", bf16=True))
    anatomy = plan.selection.anatomy
    memory, trained = forecast(plan.config).memory, plan.selection.num_trained
    assert memory.master_weights == memory.gradients == 4 * trained
    assert memory.moments == 8 * trained
    assert memory.weights == 2 * (anatomy.numel - trained)
    assert memory.state == 16 * trained + memory.weights
    mixout = config_of(tiny, data, tmp_path / "out", update="l2sp", l2sp_strength=1.0)
    assert forecast(mixout).memory.method == 2 * trained


def test_nothing_is_deleted_before_the_trainer_stands(tiny, data, tmp_path, sft, capsys):
    out = tmp_path / "out"
    assert sft(out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    # TRL refuses this only when the trainer is made.
    assert sft(out, "--resume_from_checkpoint", "none", "--loss_type", "nothing") == 2
    assert "nothing" in error_of(capsys)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert sft(out, "--resume_from_checkpoint", "none", "--max_steps", "2") == 0
    assert not (out / "checkpoint-4").exists()


def test_a_run_that_is_not_there_is_told_from_its_neighbor(tmp_path, capsys):
    (tmp_path / "sft-hft").mkdir()
    for name, *more in (["verify"], ["push"], ["report"], ["compare", str(tmp_path)], ["eval"], ["generate"]):
        assert main([name, str(tmp_path / "sft-hf"), *more]) == 2
        assert "did you mean 'sft-hft'?" in error_of(capsys)


def test_a_result_says_what_is_wrong_with_its_file(tmp_path):
    with pytest.raises(HFTError, match="its run has not finished"):
        hft.RunResult.load(tmp_path)
    (tmp_path / "results.json").write_text('{"steps": 1}')
    with pytest.raises(HFTError, match="is not a valid result"):
        hft.RunResult.load(tmp_path)


def test_a_revision_is_that_of_weights_config_and_tokenizer(tiny, data, tmp_path, monkeypatch):
    cache = tmp_path / "models--some--model"
    for revision, letter in (("main", "a"), ("second", "b")):
        folder = shutil.copytree(tiny, cache / "snapshots" / (letter * 40))
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(letter * 40)
        settings = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": ord(letter)}
        (folder / "config.json").write_text(json.dumps(settings))
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text(template + "{# " + revision + " #}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = config_of(
        "some/model", data, tmp_path / "out", chat_template_path=None, model_init_kwargs={"revision": "second"}
    )
    plan = hft.make_plan(config)
    assert "{# second #}" in plan.tokenizer.chat_template
    assert load_model_config(config).max_position_embeddings == ord("b")


def test_what_was_not_measured_is_not_printed(finished, tmp_path):
    result, content = hft.RunResult.load(finished), json.loads((finished / "results.json").read_text())
    # As runs wrote it while they forecast their own cost.
    (tmp_path / "results.json").write_text(json.dumps(content | {"planned": {"flops_to_fft": 0.88}}))
    assert hft.RunResult.load(tmp_path) == result
    memory = f"peak memory {result.peak_memory_gb} GB"
    assert f"  {result.tokens_per_second:,.0f} tokens/s, {memory} of the process\n" in summary(result, finished)
    earlier = replace(result, tokens_per_second=None, peak_memory_of=None)
    assert f"\n  {memory}\n" in summary(earlier, finished)


def test_a_fork_without_planning_trains_with_another_tracker(tiny, data, tmp_path):
    """A run only asks planning/ whether it fits; trackio is a stub of the calls that transformers' callback makes."""
    shutil.copytree(ROOT / "hft", tmp_path / "hft", ignore=shutil.ignore_patterns("planning", "__pycache__"))
    (tmp_path / "trackio.py").write_text(
        "from unittest.mock import MagicMock\n"
        "__version__, config, context_vars, finish = '0.1', MagicMock(), MagicMock(), MagicMock()\n"
        "context_vars.current_space_id.get.return_value = None\n"
        "def init(**settings): print('trackio run', settings['name'])\n"
        "def log(values, **more): print('trackio log', *values)\n"
    )
    words = command("sft", tmp_path / "out", "--max_steps", "2", "--report_to", "trackio", model=tiny, data=data)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "hft", *words], capture_output=True, text=True, check=False, cwd=ROOT, env=env
    )
    assert "verify passed" in run.stdout, run.stderr[-2000:]
    assert "trackio run out\n" in run.stdout
    assert re.search("trackio log .*loss", run.stdout)
    assert not list(tmp_path.rglob("wandb"))
