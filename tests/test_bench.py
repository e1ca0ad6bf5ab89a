"""`make bench`, on the tiny model."""

import re
import runpy
import sys

import pytest

from tests.conftest import ROOT


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of every table row by its first cell; of rows of one name the last."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): cells for cells in lines}


def bench(monkeypatch, out, model, *words: str) -> str:
    """What the bench writes about one step of each arm."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    small = ["--rounds", "1", "--steps", "1", "--rows", "1", "--length", "32"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "--model", str(model), *small, "--out", str(out), *words])
    runpy.run_path(str(ROOT / "benchmarks" / "bench.py"), run_name="__main__")
    return out.read_text()


def test_the_bench_measures_what_the_plan_says(tmp_path, tiny, monkeypatch):
    text = bench(monkeypatch, tmp_path / "bench.md", tiny, "--parts", "sft")
    rows = rows_of(text)
    *_, together, planned = rows["hft"]
    assert together == planned
    bounds = {name: float(cells[8]) for name, cells in rows.items() if re.fullmatch(r"[\d.]+", cells[-1])}
    assert bounds["fft"] == 1 > bounds["hft"] > bounds["bottom half"] > 0.5
    assert "the first step's loss is the same." in text
    assert 'make bench ARGS="--parts dpo"' in text  # which was not run


@pytest.mark.parametrize(
    ("none", "most", "count"), [(9, 5, 0), (10, 5, 0), (15, 5, 15), (15, 10, 30), (20, 12, 30), (15, 15, 30)]
)
def test_as_few_layers_are_checkpointed_as_come_down_to_the_budget(monkeypatch, none, most, count):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    assert runpy.run_path(str(ROOT / "benchmarks" / "bench.py"))["fewest_layers"](10, none, most, 30) == count


@pytest.mark.slow
def test_the_bench_at_equal_memory_and_for_dpo(tmp_path, tiny, monkeypatch):
    text = bench(monkeypatch, tmp_path / "bench.md", tiny, "--parts", "equal", "checkpointing", "sft", "dpo")
    rows = rows_of(text)  # "hft" is SFT's and "fft" is DPO's
    shared, full = (rows[f"hft, {which} reference"] for which in ("shared", "full"))
    assert float(shared[-2]) < float(full[-2])  # bytes of the reference; nothing is planned in the last column
    # The backward pass is two forward passes in FFT, and the reference is one more.
    assert float(rows["fft"][8]) == pytest.approx(4 / (3 * float(rows["hft"][8]) + 1), rel=0.02)
    assert int(shared[5]) == pytest.approx(2 * 32 / float(shared[1].split()[0]), rel=0.1)  # two answers of 32 tokens
    assert re.search(r"the FLOP bound is 0\.\d{3}", text)
