"""`hft keep`: the line from a base to a run, scored, and the model that it writes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from hft.cli import main
from hft.evaluation.suites import SUITES
from hft.keep import search
from hft.record.scores import scores_of
from hft.reporting.collect import collect
from tests.conftest import command, error_of, identical, tensors


def keep(run: Path, out: Path, *words: str) -> dict:
    assert main(["keep", str(run), "--out", str(out), "--limit", "2", *words]) == 0
    return json.loads((out / "keep.json").read_text())


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory) -> Path:
    """All the way: everything may be lost."""
    out = tmp_path_factory.mktemp("keep") / "whole"
    keep(finished, out, "--budget", "drift=9", "facts=100")
    return out


def test_a_run_that_may_lose_anything_stays_as_it_is(whole, finished, tiny):
    content = json.loads((whole / "keep.json").read_text())
    assert [point["alpha"] for point in content["points"]] == [n / 10 for n in range(11)]
    assert (content["alpha"], content["method"]) == (1, "hft")
    assert all(identical(tensor, tensors(finished)[name]) for name, tensor in tensors(whole).items())
    first, *_, last = [point["scores"] for point in content["points"]]
    assert first["kl/kl"] == 0 < last["kl/kl"]
    assert first["task/loss"] > last["task/loss"]


def test_the_budget_chooses_and_the_frozen_half_stays(whole, finished, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hft.keep.ALPHAS", [0.0, 0.3, 0.4, 0.5])
    monkeypatch.setattr("hft.keep.SUITES", {"quick": SUITES["quick"][2:]})  # task and kl
    points = {one["alpha"]: one["scores"] for one in json.loads((whole / "keep.json").read_text())["points"]}
    out = tmp_path / "some"
    content = keep(finished, out, "--budget", f"kl={(points[0.4]['kl/kl'] + points[0.5]['kl/kl']) / 2}")
    assert content["alpha"] == 0.4
    printed = capsys.readouterr().out
    assert re.search(r"^-> +0\.4 ", printed, re.MULTILINE)
    assert "verify passed" in printed
    base, tuned, made = tensors(tiny), tensors(finished), tensors(out)
    frozen = json.loads((out / "hft_manifest.json").read_text())["frozen_checksums"]
    assert frozen
    for name, tensor in made.items():
        line = (base[name].float() + 0.4 * (tuned[name].float() - base[name].float())).to(tensor.dtype)
        assert identical(tensor, base[name]) if name in frozen else torch.allclose(tensor, line, rtol=1e-2, atol=1e-6)
    # What was scored in place is what was written.
    assert main(["eval", str(out), "--limit", "2", "--task_data", str(finished)]) == 0
    scores = scores_of(out)["quick"]
    for key, value in points[0.4].items():
        assert scores.find(*key.split("/")).value == pytest.approx(value, abs=1e-6), key
    # It is a recipe of hft merge, and no run of its method.
    assert main(["merge", "--config", str(out / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert all(identical(tensor, made[name]) for name, tensor in tensors(tmp_path / "again").items())
    assert not collect([out]).groups[0].first.is_ratio
    assert main(["report", str(out), str(finished), "--out", str(tmp_path / "report")]) == 0
    assert "| some | wise-ft |" in (tmp_path / "report" / "report.md").read_text()


def test_block_by_block_a_full_run_goes_further(tmp_path, tiny, data, whole, monkeypatch):
    monkeypatch.setattr("hft.keep.ALPHAS", [0.0, 0.6, 0.8, 1.0])
    monkeypatch.setattr("hft.keep.SUITES", {"quick": SUITES["quick"][2:]})  # task and kl
    run = tmp_path / "fft"
    assert main(command("sft", run, method="fft", model=tiny, data=data)) == 0
    points = {one["alpha"]: one["scores"] for one in json.loads((whole / "keep.json").read_text())["points"]}
    most = points[0.9]["kl/kl"]
    content = keep(run, tmp_path / "out", "--budget", f"kl={most}", "--by_block", "true")
    assert set(content["alpha"]) == {"attention", "mlp", "norm", "outside"}
    *line, chosen = [point["scores"] for point in content["points"]]
    assert chosen["kl/kl"] <= most < line[-1]["kl/kl"]
    assert chosen["task/loss"] < min(one["task/loss"] for one in line if one["kl/kl"] <= most)
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_the_block_that_teaches_most_goes_first():
    """All blocks lose alike, and the MLP teaches most: what one alpha for all leaves of the budget goes to it."""
    teaches = {"attention": 1.0, "mlp": 3.0, "norm": 0.5}

    def score(alpha) -> dict[str, float]:
        alphas = alpha if isinstance(alpha, dict) else dict.fromkeys(teaches, alpha)
        learned = sum(teaches[block] * alphas[block] for block in teaches)
        return {
            "task/loss": 5 - learned,
            "drift/loss": 3 + sum(alphas.values()),
            "facts/acc": 50 - sum(alphas.values()),
        }

    points, chosen = search(score, {"drift": 1.41}, {"a": "mlp", "b": "norm", "c": "attention"})
    assert chosen == {"attention": 0.4, "mlp": 0.6, "norm": 0.4}
    assert points[-1] == (chosen, score(chosen))
    assert search(score, {"facts": 1.41, "drift": 9}, {})[1] == 0.4


def test_what_cannot_be_kept_is_said(finished, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hft.keep.ALPHAS", [0.0, 0.1])
    without = tmp_path / "without"
    shutil.copytree(finished, without, ignore=shutil.ignore_patterns("results.json", "checkpoint*"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    out, drift = ["--out", str(tmp_path / "out")], ["--budget", "drift=0.05"]
    for words, message in (
        ([finished, *drift], "give one run and a new folder: hft keep RUN"),
        ([finished, *out], "--budget takes NAME=NUMBER, NAME one of drift, kl, facts; got none"),
        ([*drift, *out], "give one run and a new folder: hft keep RUN"),
        ([finished, *out, "--budget", "mmlu=2"], "drift, kl, facts; got mmlu=2"),
        ([finished, *out, "--budget", "drift=-1"], "drift, kl, facts; got drift=-1"),
        ([finished, *out, *drift, "--dtype", "float99"], "dtype: expected 'bfloat16', 'float16', 'float32' or 'auto'"),
        ([finished, *out, *drift, "--task_data", "test"], "task_data test does not exist, did you mean 'tests'?"),
        ([finished, *out, "--budget", "drift"], "drift, kl, facts; got drift"),
        ([tiny, *out, *drift], "does not say what it was trained on; name its base with --base"),
        ([adapter, *out, *drift], "`hft merge --method adapter --models"),
        ([without, *out, *drift], "has no held-out rows to say what it learned; name a run that has with --task_data"),
        ([finished, *out, "--budget", "kl=0", "--limit", "1"], "every step from the base loses more than the budget"),
    ):
        assert main(["keep", *map(str, words)]) == 2
        assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_merge_by_block_is_asked_for_every_block(finished, tiny, tmp_path, capsys):
    merging = {"method": "wise-ft", "models": [str(finished)], "base": str(tiny), "alpha": {"mlp": 0.5}}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(merging))
    assert main(["merge", "--config", str(tmp_path / "merge.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "alpha must have a value for each of attention, mlp, norm, outside, got {'mlp': 0.5}" in error_of(capsys)
