"""Two processes on one machine, over gloo."""

import subprocess
import sys

import pytest
import torch

from hft.selection import Manifest
from tests.conftest import losses
from tests.test_sft import identical, tensors


def test_two_processes_agree_with_one_at_the_same_global_batch(tmp_path, tiny, data, sft):
    shared = ["--bf16", "false", "--per_device_train_batch_size", "8"]
    assert sft(tmp_path / "one", *shared) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hft"]
    files = ["--config", "recipes/tiny/sft.yaml", "recipes/methods/hft.yaml"]
    flags = f"--model_name_or_path {tiny} --dataset_name {data} --output_dir {tmp_path / 'two'} --report_to none"
    flags += " --max_steps 4 --save_steps 2 --eval_strategy no --eval_on_start false"
    command = [*launch, "sft", *files, *flags.split(), *shared]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("verify passed") == 1
    assert "global batch 16 = 8 rows x 2 processes x 1 accumulation" in run.stdout

    one, two = Manifest.load(tmp_path / "one"), Manifest.load(tmp_path / "two")
    assert one.frozen == two.frozen
    checkpoints = [tmp_path / name / "checkpoint-4" for name in ("one", "two")]
    assert losses(checkpoints[1]) == pytest.approx(losses(checkpoints[0]), rel=1e-5)
    ours, theirs = map(tensors, checkpoints)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)
        assert name not in one.frozen or identical(ours[name], tensor)
