"""The path of the 8-GPU recipes, accelerate's FSDP2, on CPU processes against one process."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import hft
from hft.cli import main
from hft.record.manifest import Manifest
from tests.conftest import ROOT, command, error_of, identical, losses, tensors, write_jsonl
from tests.model.test_architectures import small
from tests.processes import torchrun
from tests.training.fsdp2_on_cpu import FAULTS, follow_sharded

SETTINGS = {"max_steps": 4, "save_steps": 2, "eval_strategy": "no", "eval_on_start": False, "report_to": "none"}
SETTINGS |= {"bf16": True, "global_batch_size": 8, "logging_steps": 1}
# Of the projected gradients the largest; at this rate they conflict in each step, clearly.
GEM = {"policy": "category", "strategy": "gem", "strategy_data": "memory.jsonl", "learning_rate": 1e-4}
# Runs that follow each other in one launch: objective, method, further settings.
RUNS = {
    "sft": ("sft", "hft", {}),
    "random-element": ("sft", "random-element", {}),
    "lisa": ("sft", "lisa", {"switch_every": 1}),
    # Evaluated between switches.
    "badam": ("sft", "badam", {"switch_every": 1, "eval_strategy": "steps", "eval_steps": 1, "eval_rows": 4}),
    "mofo": ("sft", "mofo", {"bf16": False}),  # whatever the launcher's config says
    "gem": ("sft", "gmt", GEM),
    "experts": ("sft", "hft", {}),
}
ONLY_TRAINED = ("sft", "hft", {"save_only_trained": True})  # on two processes only; what it saves are the bits of sft
RESUMED = ("sft", "lisa", "only-trained", "random-element", "experts")


def flags(processes: int) -> list[str]:
    settings = SETTINGS | {"per_device_train_batch_size": 8 // processes}
    return [word for key, value in settings.items() for word in (f"--{key}", str(value).lower())]


@pytest.fixture(scope="module")
def launched(tmp_path_factory, tiny, data, pairs, rows):
    """The folder of `folder`, and what a failed process said if one did."""
    os.chdir(ROOT)
    folder = tmp_path_factory.mktemp("fsdp2")
    try:
        launch(folder, tiny, data, pairs, rows)
    except AssertionError as failed:
        return folder, str(failed)
    return folder, ""


@pytest.fixture
def folder(launched) -> Path:
    """Runs of two processes in `two`, of one in `one`; and a run of two that four took over, in `four`."""
    folder, failed = launched
    if failed:
        pytest.skip("a run failed; test_every_run_ends says why")
    return folder


def test_every_run_ends(launched):
    _, failed = launched
    assert not failed, failed


def memory_of(rows: list[dict]) -> list[dict]:
    """Five rows to remember, one process has one more than the other, whose loss each step on the data would raise."""
    questions = [row["messages"][0]["content"] for row in rows[:5]]
    return [{"prompt": question, "completion": "z" * 60, "task": "0"} for question in questions]


def launch(folder: Path, tiny: Path, data: Path, pairs: Path, rows: list[dict]) -> None:
    """Make the runs."""
    base = folder / "mixtral"
    small("mixtral").to(torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(base)
    memory = write_jsonl(folder / "memory.jsonl", memory_of(rows))

    def listed(processes: int, names: dict[str, tuple[str, str, dict]]) -> dict[str, dict]:
        runs = {}
        for name, (objective, method, more) in names.items():
            out = folder / ("two" if processes == 2 else "one") / name
            values = {"model_name_or_path": str(base if name == "experts" else tiny), "output_dir": str(out)}
            values |= SETTINGS | more | {"dataset_name": str(data)}
            values["per_device_train_batch_size"] = 8 // processes
            values |= {"strategy_data": str(memory)} if "strategy_data" in more else {}
            files = [f"recipes/tiny/{objective}.yaml", f"recipes/methods/{method}.yaml"]
            runs[name] = {"objective": objective, "files": files, "flags": values}
        return runs

    for run in listed(1, RUNS).values():
        assert hft.train(hft.make_plan(hft.load_config(run["objective"], *run["files"], **run["flags"]))).ok
    assert main(command("dpo", folder / "one" / "dpo", *flags(1), model=tiny, data=pairs)) == 0
    two = listed(2, RUNS | {"only-trained": ONLY_TRAINED, "refused": RUNS["sft"]})
    refused = two.pop("refused")
    runs = [*(refused | {"fault": fault} for fault in FAULTS), *two.values()]
    for name in RESUMED:
        out = str(folder / "two" / f"{name}-resumed")
        runs.append({"copy": [str(folder / "two" / name / "checkpoint-2"), out]})
        runs.append(two[name] | {"flags": two[name]["flags"] | {"output_dir": out}})
    runs.append({"words": command("dpo", folder / "two" / "dpo", *flags(2), model=tiny, data=pairs)})
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun(2, follow_sharded, folder / "runs.json")
    runs = []
    for name in ("sft", "experts"):
        out = folder / "four" / name
        out.mkdir(parents=True)
        (out / "checkpoint-2").symlink_to(folder / "two" / name / "checkpoint-2")
        again = {"output_dir": str(out), "per_device_train_batch_size": 2}
        runs.append(two[name] | {"flags": two[name]["flags"] | again})
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun(4, follow_sharded, folder / "runs.json")


def moved(folder: Path, other: Path, base: Path) -> float:
    """The distance between two models, relative to how far the first has moved from its base."""
    ours, theirs, start = tensors(folder / "checkpoint-4"), tensors(other / "checkpoint-4"), tensors(base)

    def distance(a: dict, b: dict) -> float:
        return math.sqrt(sum(float((a[name].double() - b[name].double()).square().sum()) for name in a))

    return distance(ours, theirs) / distance(ours, {name: start[name] for name in ours})


@pytest.mark.parametrize("name", [*RUNS, "dpo"])
def test_two_processes_of_fsdp2_compute_what_one_process_does(folder, tiny, name):
    one, two = folder / "one" / name, folder / "two" / name
    # Rounding may send a token to another expert.
    tolerance = 3e-3 if name == "experts" else 1e-3
    assert losses(two / "checkpoint-4") == pytest.approx(losses(one / "checkpoint-4"), rel=tolerance)
    ours, theirs = tensors(one), tensors(two)
    assert {key: (t.dtype, t.shape) for key, t in ours.items()} == {
        key: (t.dtype, t.shape) for key, t in theirs.items()
    }
    if name == "mofo":
        assert moved(one, two, tiny) < 1e-2
    elif name != "experts":  # whose files are not named as its parameters are
        assert moved(one, two, tiny) < 0.1  # bf16 rounds otherwise, and AdamW's first steps are of one size


@pytest.mark.parametrize("name", [*RUNS, "dpo"])
def test_every_frozen_bit_stays_under_fsdp2(folder, name):
    out = folder / "two" / name
    assert main(["verify", str(out)]) == 0
    one, two = (Manifest.load(folder / where / name) for where in ("one", "two"))
    assert one.frozen_checksums == two.frozen_checksums
    assert (one.masks, one.schedule) == (two.masks, two.schedule)
    assert json.loads((out / "results.json").read_text())["verify"]["not_finite"] == 0


def test_a_fifth_of_each_gradient_reaches_the_moments_under_fsdp2(folder):
    state = torch.load(folder / "two" / "gem" / "checkpoint-2" / "optimizer.bin")["state"].values()
    fractions = [moments["exp_avg"].count_nonzero() / moments["exp_avg"].numel() for moments in state]
    assert 0.1 < max(fractions) <= 0.41  # a fifth in each of two steps


def test_what_trained_is_put_back_into_the_base_under_fsdp2(folder, tmp_path):
    run = str(folder / "two" / "only-trained")
    assert main(["verify", run]) == 0
    assert main(["merge", "--method", "delta", "--models", run, "--out", str(tmp_path / "new")]) == 0
    ours, theirs = tensors(tmp_path / "new"), tensors(folder / "two" / "sft")
    assert ours.keys() == theirs.keys()
    assert all(identical(ours[name], theirs[name]) for name in theirs)


def test_dpo_starts_at_the_reference_in_fp32(folder):
    history = json.loads((folder / "two" / "dpo" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    first = next(row for row in history if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=5e-4)
    assert [first[f"rewards/{side}"] for side in ("chosen", "rejected", "margins")] == pytest.approx([0] * 3, abs=5e-4)
    alone = json.loads((folder / "one" / "dpo" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    theirs = next(row for row in alone if "loss" in row)
    assert first["logps/chosen"] == pytest.approx(theirs["logps/chosen"], rel=1e-3)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_at_the_same_bits(folder, name):
    straight, resumed = (tensors(folder / "two" / out / "checkpoint-4") for out in (name, f"{name}-resumed"))
    assert all(identical(straight[key], resumed[key]) for key in straight)


def test_another_number_of_processes_takes_a_run_over(folder, tiny, data, tmp_path, capsys):
    for name in ("sft", "experts"):
        two, four = folder / "two" / name, folder / "four" / name
        assert losses(four / "checkpoint-4") == pytest.approx(losses(two / "checkpoint-4"), rel=1e-3)
        assert moved(two, four, tiny if name == "sft" else two / "checkpoint-2") < 0.1
        assert main(["verify", str(four)]) == 0
    two = folder / "two" / "sft"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-2").symlink_to(two / "checkpoint-2")
    capsys.readouterr()
    assert main(command("sft", tmp_path / "out", *flags(1), model=tiny, data=data)) == 2
    assert "its optimizer state was saved under fsdp2; add --engine fsdp2" in error_of(capsys)
