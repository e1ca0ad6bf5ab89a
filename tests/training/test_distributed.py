"""Two processes on one machine, over gloo."""

import json
import os
import subprocess
import sys

import pytest
import torch

from hft.cli import main
from hft.record.manifest import Manifest
from tests.conftest import ROOT, command, identical, losses, tensors, torchrun


@pytest.mark.parametrize(("stage", "method"), [("sft", "random-element")])
def test_two_processes_agree_with_one_at_the_same_global_batch(tmp_path, tiny, data, pairs, stage, method):
    settings = ["--bf16", "false", "--per_device_train_batch_size", "4", "--global_batch_size", "8"]
    inputs = {"method": method, "model": tiny, "data": data if stage == "sft" else pairs}
    assert main(command(stage, tmp_path / "one", *settings, **inputs)) == 0
    launcher = ["--num_processes", "2", "--engine", "ddp"]
    words = [sys.executable, "-m", "hft", *command(stage, tmp_path / "two", *settings, *launcher, **inputs)]
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"}  # the key wins
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("verify passed") == 1
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


def test_ddp_refuses_other_dtypes_than_planned(tmp_path, tiny, data):
    files = ["recipes/tiny/sft.yaml", "recipes/methods/hft.yaml"]
    values = {"model_name_or_path": str(tiny), "dataset_name": str(data), "output_dir": str(tmp_path / "out")}
    values |= {"max_steps": 2, "per_device_train_batch_size": 4, "global_batch_size": 8, "report_to": "none"}
    values |= {"bf16": True, "eval_strategy": "no", "eval_on_start": False}
    run = {"objective": "sft", "files": files, "flags": values, "refused": "should be held in torch.float32"}
    (tmp_path / "runs.json").write_text(json.dumps([run]))
    torchrun(2, ROOT / "tests/training/fsdp2_on_cpu.py", "--ddp", "--runs", tmp_path / "runs.json")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


ONLY_ONE_FAILS = """
import os, sys, time
from hft.cli import main

if os.environ["RANK"] == "1":
    sys.exit(main(["sft", "--config", "none.yaml"]))
time.sleep(60)
"""


def test_a_mistake_is_printed_though_only_another_process_finds_it(tmp_path):
    (tmp_path / "script.py").write_text(ONLY_ONE_FAILS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launch, str(tmp_path / "script.py")]
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode != 0
    assert "hft: cannot read none.yaml: no such file or recipe" in run.stderr
