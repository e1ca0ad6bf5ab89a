"""DeepSpeed's ZeRO-3, hft/accelerate/zero3.yaml, on CPU processes against one process without it."""

import json
import math
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hft.cli import main
from hft.record.manifest import Manifest
from tests.conftest import ROOT, command, identical, losses, tensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs `pip install -e '.[deepspeed]'`"),
]

SCRIPT = ROOT / "tests" / "training" / "zero3_on_cpu.py"


def launch(processes: int, *words: object) -> subprocess.CompletedProcess:
    """Run the script's words on some processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    every = [sys.executable, *torchrun, str(SCRIPT), *map(str, words)]
    return subprocess.run(every, capture_output=True, text=True, check=False, cwd=ROOT, env=env)


def flags(processes: int) -> list[str]:
    rows = ["--global_batch_size", "8", "--per_device_train_batch_size", str(8 // processes), "--logging_steps", "1"]
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "4", "--eval_on_start", "true"]
    return [*rows, *evaluation, "--save_steps", "1", "--weight_decay", "0.1", "--use_cpu", "false"]


def resumed(folder: Path, name: str, checkpoint: Path, processes: int, tiny: Path, data: Path) -> str:
    """Resume from a copy of a checkpoint in a new folder; what was printed."""
    out = folder / name / "sft"
    shutil.copytree(checkpoint, out / checkpoint.name)
    done = launch(processes, *command("sft", out, *flags(processes), model=tiny, data=data))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def evaluations(checkpoint: Path) -> list[float]:
    """The held-out losses that a checkpoint's trainer logged."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [row["eval_loss"] for row in history if "eval_loss" in row]


def optimizer_states(checkpoint: Path) -> list[dict]:
    """The state of the optimizer in each process that saved a checkpoint."""
    paths = sorted(checkpoint.glob("global_step*/*optim_states.pt"))
    return [torch.load(path, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"] for path in paths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny, data, pairs):
    """Runs of two processes in `two`, of one without ZeRO in `one`; in `resumed` one resumed after two steps."""
    os.chdir(ROOT)
    folder = tmp_path_factory.mktemp("zero3")
    datasets = {"sft": data, "dpo": pairs}
    for objective, dataset in datasets.items():
        same = {"model": tiny, "data": dataset}
        alone = command(objective, folder / "one" / objective, *flags(1)[:-2], "--bf16", "true", **same)
        assert main(alone) == 0
        done = launch(2, *command(objective, folder / "two" / objective, *flags(2), **same))
        assert done.returncode == 0, done.stderr[-3000:]
    resumed(folder, "resumed", folder / "two" / "sft" / "checkpoint-2", 2, tiny, data)
    return folder


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_two_processes_of_zero3_compute_what_one_process_does(folder, name):
    one, two = folder / "one" / name, folder / "two" / name
    assert losses(two / "checkpoint-4") == pytest.approx(losses(one / "checkpoint-4"), rel=1e-3)
    ours, theirs = (evaluations(out / "checkpoint-4") for out in (two, one))
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=1e-3)
    if name == "dpo":
        assert losses(two / "checkpoint-4")[0] == pytest.approx(math.log(2), abs=5e-4)
    ours, theirs = ({key: (t.dtype, t.shape) for key, t in tensors(out).items()} for out in (one, two))
    assert ours == theirs


@pytest.mark.parametrize("name", ["two/sft", "two/dpo", "resumed/sft"])
def test_every_frozen_bit_stays_under_zero3(folder, name):
    assert main(["verify", str(folder / name)]) == 0
    one = Manifest.load(folder / "one" / Path(name).name)
    assert Manifest.load(folder / name).frozen_checksums == one.frozen_checksums


def test_only_what_trains_has_optimizer_state_under_zero3(folder):
    model = tensors(folder / "two" / "sft")
    trained = sum(model[name].numel() for name in Manifest.load(folder / "two" / "sft").trained_parameters)
    states = optimizer_states(folder / "two" / "sft" / "checkpoint-4")
    held = sum(state["exp_avg"].numel() for part in states for state in part["state"].values())
    assert trained <= held < 1.01 * trained  # DeepSpeed pads


def test_a_run_resumed_under_zero3_ends_at_the_same_bits(folder):
    straight, resumed = (tensors(folder / where / "sft" / "checkpoint-4") for where in ("two", "resumed"))
    assert all(identical(straight[key], resumed[key]) for key in straight)


def test_zero3_refuses_another_number_of_processes_and_masks(folder, tiny, data, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(folder / "two" / "sft" / "checkpoint-2", checkpoint)
    done = launch(1, *command("sft", tmp_path / "out", *flags(1), model=tiny, data=data))
    assert f"cannot resume from {checkpoint}: ZeRO-3 resumes on as many processes as saved it" in done.stderr
    words = command("sft", tmp_path / "masks", *flags(1), method="random-element", model=tiny, data=data)
    assert "masks of elements do not fit" in launch(1, *words).stderr
