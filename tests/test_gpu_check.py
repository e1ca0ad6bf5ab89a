"""`make gpu-check`, rehearsed on the tiny model: what it runs and writes, not what it measures."""

import json
import re
import runpy
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture
def rehearse(monkeypatch, tmp_path, tiny):
    """Rehearse some parts; the page."""

    def run(*words: str) -> str:
        out = tmp_path / "gpu"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which the script changes
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--rehearse", str(tiny), "--out", str(out), *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "benchmarks" / "gpu_check.py"), run_name="__main__")
        assert ended.value.code == 0
        (page,) = out.glob("*.md")
        return page.read_text()

    return run


def test_a_part_is_measured_once_and_the_others_are_named(rehearse, tmp_path):
    text = rehearse("--parts", "7b")
    planned, measured, ratio = map(float, re.search(r"\| hft, 2 x 32 tokens \| (.*) \| (.*) \| (.*) \|", text).groups())
    assert planned > 0.01
    assert ratio == pytest.approx(measured / planned, rel=0.5)  # of rounded values
    assert '- Frozen bits: `make gpu-check ARGS="--parts frozen"`' in text
    assert "- Several GPUs: `make gpu-check NUM_GPUS=8`" in text
    (log,) = (tmp_path / "gpu").glob("*.jsonl")
    before = log.read_text()
    assert [json.loads(line)["part"] for line in before.splitlines()] == ["7b"]
    assert rehearse("--parts", "7b") == text
    assert log.read_text() == before


@pytest.mark.slow
def test_every_part_on_one_device(rehearse):
    text = rehearse()
    for line in ("| hft, kto |", "| hft, mixtral-tiny |", "x the bound", "the compiled loss of step 3 is"):
        assert line in text
    assert len(re.findall("- yes: .* leaves the frozen bits alone", text)) == 4
    assert "- NO: " not in re.sub("- NO: the peak of .*", "", text)  # of a process, which no plan is about
    assert text.count("make gpu-check ") == 1


@pytest.mark.slow
def test_two_processes_against_one(rehearse):
    text = rehearse("--num_gpus", "2")
    assert "- NO: " not in text
    for name in ("fsdp2", "fsdp2, resumed", "ddp", "ddp, resumed"):
        assert f"- yes: the losses of {name} are those of one process" in text
        assert f"- yes: {name} leaves the frozen bits alone" in text
    assert re.search(r"\| ddp, resumed \| 1 \|", text)
