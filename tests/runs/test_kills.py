"""A run that is killed anywhere and started again by the same command ends with the bits of an undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hft.record.checkpoints import last_checkpoint
from tests import faults
from tests.conftest import command, identical, tensors
from tests.model.test_architectures import small

# Before the first step, in a save, in a step, in the write of the final weights, and in verify.
MOMENTS = ["write config.tmp", "write checkpoint-2/optimizer.pt", "moved 3", "write model.safetensors", "verify ."]


def words(stage: str, out: Path, tiny: Path, rows: Path, processes: int = 1) -> list[str]:
    """A run of four steps that is evaluated and saved every second one."""
    flags = ["--eval_strategy", "steps", "--eval_on_start", "true", "--eval_steps", "2", "--bf16", "false"]
    flags += ["--global_batch_size", "8", "--per_device_train_batch_size", str(4 // processes)]
    return command(stage, out, *flags, model=tiny, data=rows)


def left(out: Path) -> dict[str, object]:
    """What a run leaves behind, but for times and memory."""
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    state = ("trainer_state.json", "README.md", "results.json", "training_args.bin", "config.yaml")
    state += ("hft_masks.safetensors",)  # whose shapes are in no order; the manifest has their checksums
    kept = {str(path): content for path, content in files.items() if path.name not in state}
    results = json.loads((out / "results.json").read_text())
    return kept | {"results": results | {"tokens_per_second": None, "peak_memory_gb": None}}


def same(out: Path, straight: Path, *more: str) -> None:
    """Compare the files that two runs wrote; `more` are checkpoints that only the first one has."""
    ours = {name: content for name, content in left(out).items() if not name.startswith(more)}
    theirs = left(straight)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name] != theirs[name]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny, data, pairs):
    """The folder `out` of a run that nothing disturbed, by objective and number of processes; each is made once."""
    made = {}

    def run(stage: str, processes: int = 1) -> Path:
        key = stage, processes
        if key not in made:
            out = tmp_path_factory.mktemp(f"straight-{stage}-{processes}") / "out"
            line = words(stage, out, tiny, data if stage == "sft" else pairs, processes)
            assert not any(faults.run(line, out, trace=True, processes=processes)), faults.printed(out)
            made[key] = out
        return made[key]

    return run


def test_a_killed_run_ends_with_the_same_bits(tmp_path, straight, tiny, data):
    faults.killed_at(MOMENTS, words("sft", tmp_path / "out", tiny, data), tmp_path / "out")
    same(tmp_path / "out", straight("sft"))


def test_a_killed_run_whose_experts_train_in_part_ends_with_the_same_bits(tmp_path, tiny, data):
    """Its base stores one expert per tensor; saved is what trained."""
    base, out, straight = tmp_path / "base", tmp_path / "out", tmp_path / "straight" / "out"
    straight.parent.mkdir()
    small("mixtral").save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(base)
    faults.killed_at(["moved 3"], [*words("sft", out, base, data), "--save_only_trained", "true"], out)
    assert faults.run([*words("sft", straight, base, data), "--save_only_trained", "true"], straight) == [0]
    same(out, straight)


def test_a_signal_saves_a_checkpoint_and_the_same_command_resumes(tmp_path, straight, tiny, data):
    out = tmp_path / "out"
    line = words("sft", out, tiny, data)
    assert faults.run(line, out, at="optimizer 0", does="terminate") == [143]
    last = faults.printed(out).splitlines()[-1]
    sentence = "hft: stopped by SIGTERM after step 1; run the same command again to resume from"
    assert last == f"{sentence} {out / 'checkpoint-1'}"
    assert faults.run(line, out) == [0]
    assert f"resuming from {out / 'checkpoint-1'}" in faults.printed(out)
    same(out, straight("sft"), "checkpoint-1/")


def test_a_signal_saves_a_checkpoint_that_is_not_the_best(tmp_path, tiny, data):
    """Where only better ones are saved: the loss that is evaluated falls, and the largest is asked for."""
    out = tmp_path / "out"
    best = ["--save_strategy", "best", "--metric_for_best_model", "loss", "--greater_is_better", "true"]
    line = [*words("sft", out, tiny, data), *best, "--eval_steps", "1"]
    assert faults.run(line, out, at="optimizer 1", does="interrupt") == [130]
    assert f"stopped by SIGINT after step 2; run the same command again to resume from {out / 'checkpoint-2'}" in (
        faults.printed(out)
    )
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(out / "checkpoint-1")
    assert [row["step"] for row in state["log_history"] if "eval_loss" in row] == [0, 1, 2]


def test_a_run_that_went_back_is_not_taken_for_the_one_before(tmp_path, straight, tiny, data):
    out = tmp_path / "out"
    shutil.copytree(straight("sft"), out)
    back = [*words("sft", out, tiny, data), "--max_grad_norm", "1e-6", "--save_steps", "1"]
    named = ["--resume_from_checkpoint", str(out / "checkpoint-2")]
    assert faults.run([*back, *named], out, at="optimizer 2", does="terminate") == [143]
    printed = faults.printed(out)
    assert f"NOTE: {out} holds a finished run, which this one replaces" in printed
    assert f"NOTE: checkpoint-4 in {out} will be removed" in printed
    assert "NOTE: resuming with other settings than before: " in printed
    assert f"again with --resume_from_checkpoint auto to resume from {out / 'checkpoint-3'}" in printed
    assert not (out / "checkpoint-4").exists()
    assert not (out / "model.safetensors").exists()
    assert faults.run(back, out) == [0]
    assert f"resuming from {out / 'checkpoint-3'}" in faults.printed(out)
    ours, theirs = (tensors(folder / "checkpoint-4") for folder in (out, straight("sft")))
    assert not all(identical(ours[name], theirs[name]) for name in theirs)  # as gradients were clipped


def test_a_full_disk_leaves_the_last_complete_checkpoint(tmp_path, straight, tiny, data):
    out = tmp_path / "out"
    line = words("sft", out, tiny, data)
    assert faults.run(line, out, at="step 3", does="fill") == [2]
    last = faults.printed(out).splitlines()[-1]
    assert last.startswith("hft: no room on the disk to write ")
    assert last.endswith("free some and run the same command again: it resumes from what was complete before")
    assert last_checkpoint(out) == str(out / "checkpoint-2")
    assert faults.run(line, out) == [0]
    same(out, straight("sft"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_run_is_killed_at_every_moment(tmp_path, straight, tiny, data, pairs, stage):
    line = words(stage, tmp_path / "out", tiny, data if stage == "sft" else pairs)
    faults.killed_at(faults.moments(straight(stage)), line, tmp_path / "out")
    same(tmp_path / "out", straight(stage))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_processes_are_killed_at_ten_random_moments(tmp_path, straight, tiny, data, pairs, stage):
    every = faults.moments(straight(stage, 2))
    other = every.index("wrote checkpoint-2/rng_state_0.pth")
    drawn = sorted({other, *random.Random(0).sample(range(len(every)), 10)})
    # The second process dies too, in the only file of its own, while the first one may go on to the trainer's state.
    moments = [every[index] if index != other else "1: write checkpoint-2/rng_state_1.pth" for index in drawn]
    faults.killed_at(
        moments, words(stage, tmp_path / "out", tiny, data if stage == "sft" else pairs, 2), tmp_path / "out", 2
    )
    same(tmp_path / "out", straight(stage, 2))


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(tmp_path, straight, tiny, data):
    """Though only the second one gets the signal."""
    out = tmp_path / "out"
    line = words("sft", out, tiny, data, 2)
    assert faults.run(line, out, at="1: moved 0", does="terminate", processes=2) == [143, 143]
    assert last_checkpoint(out) == str(out / "checkpoint-1")
    assert faults.run(line, out, processes=2) == [0, 0]
    same(out, straight("sft", 2), "checkpoint-1/")


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_a_checkpoint(tmp_path, tiny, data):
    out = tmp_path / "out"
    line = [*words("sft", out, tiny, data, 2), "--max_steps", "1000", "--num_processes", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": os.environ | {"PYTHONUNBUFFERED": "1"}}
    run = subprocess.Popen([sys.executable, "-m", "hft", *line, "--logging_steps", "1"], text=True, **pipes)
    next(printed for printed in run.stdout if "'loss'" in printed)
    run.send_signal(signal.SIGTERM)
    *_, last = run.stdout
    assert run.wait() == 143
    assert f"resume from {last_checkpoint(out)}" in last
