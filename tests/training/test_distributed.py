"""Two processes on one machine, over gloo."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hft.cli import main
from hft.continual.strategies import self_replay
from hft.record.manifest import Manifest
from tests.conftest import command, identical, losses, tensors, write_jsonl
from tests.processes import torchrun
from tests.training.fsdp2_on_cpu import FAULTS, follow
from tests.training.test_fsdp2 import GEM, memory_of


@pytest.mark.parametrize(("stage", "method"), [("sft", "random-element")])
def test_two_processes_agree_with_one_at_the_same_global_batch(tmp_path, tiny, data, pairs, stage, method):
    settings = ["--bf16", "false", "--per_device_train_batch_size", "4", "--global_batch_size", "8"]
    inputs = {"method": method, "model": tiny, "data": data if stage == "sft" else pairs}
    assert main(command(stage, tmp_path / "one", *settings, **inputs)) == 0
    launcher = ["--num_processes", "2", "--engine", "ddp"]
    words = [sys.executable, "-m", "hft", *command(stage, tmp_path / "two", *settings, *launcher, **inputs)]
    environment = {key: value for key, value in os.environ.items() if key != "TQDM_DISABLE"}  # set by the run above
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("verify passed") == run.stdout.count("resolved config") == 1
    assert not re.search(r"%\|.*it/s", run.stderr)  # a progress bar, which a file is no place for
    assert run.stdout.count("launching 2 processes with ddp") == 1
    assert "x 2 processes x 1 accumulation" in run.stdout
    assert "num_processes" not in (tmp_path / "two" / "config.yaml").read_text()

    one, two = Manifest.load(tmp_path / "one"), Manifest.load(tmp_path / "two")
    assert one.frozen_checksums == two.frozen_checksums
    checkpoints = [tmp_path / name / "checkpoint-4" for name in ("one", "two")]
    assert losses(checkpoints[1]) == pytest.approx(losses(checkpoints[0]), rel=1e-4)
    ours, theirs = map(tensors, checkpoints)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)
        assert name not in one.frozen_checksums or name in one.masks or identical(ours[name], tensor)


def follow_and_watch(words: list[str]) -> int:
    """Take the runs of a file, and write in which modes self-replay computes."""
    modes, compute = set(), self_replay.next_token_logits

    def watched(model, batch):
        modes.add((model.training, torch.is_grad_enabled()))
        return compute(model, batch)

    self_replay.next_token_logits = watched
    status = follow(words)
    Path(f"{words[0]}.{os.environ['RANK']}").write_text(json.dumps(sorted(modes)))
    return status


def test_ddp_holds_each_run_to_its_plan(tmp_path, tiny, data, rows, monkeypatch):
    """Masters, batch, precision, the order of what changes gradients, and the mode in which a strategy computes."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    values = {"model_name_or_path": str(tiny), "dataset_name": str(data), "report_to": "none", "bf16": True}
    values |= {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4, "global_batch_size": 8}
    values |= {"eval_strategy": "no", "eval_on_start": False}

    def run(name: str, method: str, **more) -> dict:
        files = ["recipes/tiny/sft.yaml", f"recipes/methods/{method}.yaml"]
        return {"objective": "sft", "files": files, "flags": values | more | {"output_dir": str(tmp_path / name)}}

    projected = GEM | {"strategy_data": str(write_jsonl(tmp_path / "memory.jsonl", memory_of(rows)))}
    own = {"strategy": "self-replay", "replay_texts": 4, "replay_tokens": 8, "replay_batch": 4}
    own |= {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "eval_rows": 2, "bf16": False}
    runs = [run("refused", "hft") | {"fault": fault} for fault in FAULTS]
    runs += [run("gem", "gmt", **projected), run("own", "hft", **own)]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    torchrun(2, follow_and_watch, tmp_path / "runs.json")
    assert not list((tmp_path / "refused").rglob("*.safetensors"))
    state = torch.load(tmp_path / "gem" / "checkpoint-2" / "optimizer.pt")["state"].values()
    # Of the projected gradients the largest fifth, in each of two steps.
    fractions = [moments["exp_avg"].count_nonzero() / moments["exp_avg"].numel() for moments in state]
    assert 0.1 < max(fractions) <= 0.41
    for rank in "01":  # the reference evaluates, and the model always trains
        assert json.loads((tmp_path / f"runs.json.{rank}").read_text()) == [[False, False], [True, True]]


def only_one_fails(words: list[str]) -> int:
    if os.environ["RANK"] == "1":
        return main(["sft", "--config", "none.yaml"])
    return time.sleep(60)


def test_a_mistake_is_printed_though_only_another_process_finds_it():
    with pytest.raises(AssertionError, match=r"hft: cannot read none\.yaml: no such file or recipe"):
        torchrun(2, only_one_fails)
