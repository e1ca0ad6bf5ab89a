"""A sequence that is killed anywhere, and one in two processes, end with the same matrix."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hft.demo.tasks import write_tasks
from tests import faults
from tests.conftest import ROOT, identical, tensors

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SETTINGS = {"report_to": "none", "bf16": "false", "max_steps": 20, "save_steps": 5, "test_rows": 16}
SETTINGS |= {"global_batch_size": 8, "max_answer_length": 16}
FSDP2 = ROOT / "tests" / "training" / "fsdp2_on_cpu.py"
METRICS = ["--metrics", "{First: edit_similarity, Swap: edit_similarity}"]


GEM = ("--strategy", "gem", "--memory_rows", "4")
SELF_REPLAY = ("--strategy", "self-replay", "--replay_texts", "24", "--replay_batch", "9", "--replay_tokens", "24")


def sequence(tiny, tasks, out, *strategy: str, processes: int = 1) -> list[str]:
    """The words of `hft continual` on two tasks, of twenty steps each."""
    paths = {"model_name_or_path": tiny, "trace_dir": tasks, "output_dir": out}
    settings = SETTINGS | paths | {"per_device_train_batch_size": 8 // processes}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    files = ["--config", "recipes/tiny/trace.yaml", "recipes/methods/hft.yaml", "--tasks", "First", "Swap", *METRICS]
    return ["continual", *files, *flags, *strategy]


def words(*args, processes: int = 1, sharded: bool = False) -> list[str]:
    """The command of a sequence in one process or several, under DDP or FSDP2."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    program = [str(FSDP2)] if sharded else ["-m", "hft"]
    return [sys.executable, *(launch if processes > 1 else []), *program, *sequence(*args, processes=processes)]


# While a sequence prepares, scores, trains, saves and verifies.
MOMENTS = [
    "write recipe.tmp",
    "write data/02-Swap.jsonl",
    "rename start/scores/trace/{saved}.tmp",
    "mkdir 01-First/checkpoint-5",
    "write 01-First/checkpoint-15/optimizer.pt",
    "write 01-First/model.safetensors",
    "verify 01-First",
    "rename 01-First/results.tmp",
    "write 01-First/scores/trace/{saved}.tmp",
    "optimizer 12",
    "write 02-Swap/hft_manifest.tmp",
    "write matrix.tmp",
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny):
    """The folder of a sequence that nothing disturbed, and its tasks."""
    folder = tmp_path_factory.mktemp("straight")
    write_tasks(folder / "tasks")
    subprocess.run(words(tiny, folder / "tasks", folder / "out", *GEM), check=True, cwd=ROOT, env=ENVIRONMENT)
    return folder / "out", folder / "tasks"


@pytest.mark.slow
def test_a_sequence_that_is_killed_ends_with_the_same_matrix(straight, tiny, tmp_path):
    whole, tasks = straight
    out = tmp_path / "out"
    saved = next((whole / "start/scores/trace").glob("First-*.json")).stem
    moments = [moment.format(saved=saved) for moment in MOMENTS]
    faults.killed_at(moments, sequence(tiny, tasks, out, *GEM), out)
    for name in ("01-First", "02-Swap"):
        ours, theirs = tensors(out / name), tensors(whole / name)
        assert all(identical(ours[key], theirs[key]) for key in theirs), name
    assert matrix(out) == matrix(whole)


def matrix(out: Path) -> dict:
    """The matrix of a sequence, without its name."""
    content = json.loads((out / "matrix.json").read_text())
    return content | {"about": content["about"] | {"run": None}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "sharded"), [(GEM, False), (GEM, True), (SELF_REPLAY, False)], ids=["gem", "gem-fsdp2", "self-replay"]
)
def test_two_processes_agree_with_one(straight, tiny, tmp_path, strategy, sharded):
    more = ["--lr_scheduler_type", "constant", "--learning_rate", "1e-3", "--bf16", "false"]
    for processes in (1, 2):
        two = {"processes": processes, "sharded": sharded and processes == 2}
        run = words(tiny, straight[1], tmp_path / str(processes), *strategy, *more, **two)
        # In fp32, as rounding decides which constraints of GEM's problem hold with equality.
        subprocess.run(run, check=True, cwd=ROOT, env=ENVIRONMENT | {"ACCELERATE_MIXED_PRECISION": "no"})
    one, two = (tensors(tmp_path / name / "02-Swap") for name in "12")
    start = tensors(tiny)
    for key, tensor in one.items():
        moved = (tensor.float() - start[key].float()).norm()
        assert (tensor.float() - two[key].float()).norm() <= 0.02 * moved, key
    ours, theirs = (matrix(tmp_path / name)["scores"] for name in "12")
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, abs=2)
