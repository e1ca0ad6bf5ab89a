"""`hft compare` on saved rows: what differs significantly, what does not, and what it refuses."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from hft.cli import main
from hft.record.scores import Score, Scores, save_rows
from hft.reporting.collect import collect
from hft.reporting.columns import KNOWLEDGE
from hft.reporting.compare import Comparison, compare
from tests.conftest import error_of

METRICS = {"task": "loss", "facts": "acc", "drift": "loss", "nq_open": "exact_match", "triviaqa": "exact_match"}
METRICS |= {"hotpotqa": "exact_match"}


def scored(folder: Path, values: dict[str, np.ndarray], *, rows: bool = True, key: str = "", **config) -> Path:
    """A run's folder as far as reports read it: its config, and scores with the rows behind them."""
    folder.mkdir(exist_ok=True)
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump({"model_name_or_path": "x/tiny"} | config))
    for task, some in values.items():
        metric, suite = METRICS[task], "quick" if task in ("task", "facts", "drift") else "knowledge"
        loss = metric == "loss"
        score = Score(task, metric, some.mean(), 0.1, len(some), "nats/token" if loss else "%", not loss)
        about = Scores(suite, "x/tiny", folder.name, "float32", {"limit": None}, {task: "a"}, {}, [score])
        about.settings |= {"chat": True} if key == "chat" else {}
        about.versions |= {"peft": "0.18"} if key == "peft" else {}
        if rows:
            ids = [f"{task}{number}" for number in range(len(some))]
            save_rows(pd.DataFrame({"row": ids, "task": task, metric: some, "answer": None}), about.path(folder, task))
        about.save(folder)
    return folder


def compared(*folders, capsys) -> str:
    assert main(["compare", *map(str, folders)]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    right = np.array([1] * 40 + [0] * 60) * 100.0
    flipped = np.array([1] * 37 + [0] * 3 + [1] * 14 + [0] * 46) * 100.0
    drift = generator.normal(3, 1, 100)
    moved, still = (drift + generator.normal(shift, 0.05, 100) for shift in (0.1, 0))
    return {"right": right, "flipped": flipped, "drift": drift, "moved": moved, "still": still}


def test_two_models_are_compared_row_by_row(tmp_path, values, capsys):
    base = scored(tmp_path / "base", {"facts": values["right"], "drift": values["drift"]})
    tuned = scored(tmp_path / "tuned", {"facts": values["flipped"], "drift": values["moved"]}, method="fft")
    same = scored(tmp_path / "same", {"drift": values["still"][:80]}, method="hft")
    out = compared(base, tuned, same, capsys=capsys)
    _, drift, facts = out[out.index("unit  ") :].splitlines()[:3]  # an import may print a line before the table
    assert {"40.00", "51.00", "+11.00", "14/3", f"{stats.binomtest(14, 17).pvalue:.2g}", "100"} <= set(facts.split())
    test = stats.ttest_rel(values["moved"], values["drift"])
    low, high = test.confidence_interval(0.95)
    assert f"{low:+.4f} to {high:+.4f}" in drift
    assert f"{test.pvalue:.2g}" in drift.split()
    assert "facts: fft is better than base by 11 points (95% interval" in out
    assert f"drift: fft is worse than base by {(values['moved'] - values['drift']).mean():.3g} nats/token" in out
    last = out.splitlines()[-2]
    assert last.startswith("drift: no significant difference (95% interval")
    assert out.splitlines()[-4].endswith("80 of 100   1, 1")
    delta = stats.sem(values["still"][:80] - values["drift"][:80])
    power = (stats.t.ppf(0.975, 79) + stats.t.ppf(0.8, 79)) * delta
    assert f"with 80% power this n detects {power:.2g} nats/token" in last


def test_seeds_widen_an_interval_and_shared_batches_narrow_it(tmp_path, values, capsys):
    """Groups of runs that differ in seed, in any order."""
    generator = np.random.default_rng(1)
    shifts = generator.normal(0, 0.3, 3)
    for method, more in (("fft", 0.1), ("hft", 0.0)):
        for seed in (0, 1, 2):
            noise = generator.normal(shifts[seed] + more, 0.01, 100)
            scored(tmp_path / f"{method}{seed}", {"drift": values["drift"] + noise}, method=method, seed=seed)
    folders = [tmp_path / name for name in ("fft0", "fft1", "fft2", "hft2", "hft0", "hft1")]
    out = compared(*folders, capsys=capsys)
    assert "hft is better than fft by" in out
    assert out.splitlines()[1].endswith("3, 3")
    for seed in (0, 1, 2):
        scored(tmp_path / f"hft{seed}", {}, method="hft", seed=seed + 3)
    assert "drift: no significant difference" in compared(*folders, capsys=capsys)
    # Two seeds of one method, when nothing else is given.
    assert "fft1 is" in compared(*folders[:2], capsys=capsys)


def test_a_mean_of_tasks_has_their_rows_independent(tmp_path):
    generator, tasks = np.random.default_rng(2), {"nq_open": 40, "triviaqa": 60, "hotpotqa": 80}
    rows = [{task: 100.0 * generator.integers(0, 2, n) for task, n in tasks.items()} for _ in "ab"]
    folders = [scored(tmp_path / name, some, method=name) for name, some in zip(("fft", "hft"), rows, strict=True)]
    found = compare(*collect(folders).groups, KNOWLEDGE)
    assert isinstance(found, Comparison)
    deltas = [rows[1][task] - rows[0][task] for task in tasks]
    assert found.difference.mean == pytest.approx(np.mean([delta.mean() for delta in deltas]))
    assert found.difference.se == pytest.approx(np.sqrt(sum(stats.sem(delta) ** 2 for delta in deltas)) / 3)
    assert found.difference.rows == 180
    assert found.difference.gained is None


def test_what_cannot_be_compared_is_said(tmp_path, values, capsys):
    both = {"facts": values["right"], "drift": values["drift"]}
    base = scored(tmp_path / "base", both)
    chat = scored(tmp_path / "chat", {"drift": values["moved"]}, key="chat", method="fft")
    out = compared(base, chat, capsys=capsys)
    assert out.strip() == "drift: no difference, scored under other conditions (chat None and True)"
    adapter = scored(tmp_path / "adapter", {"drift": values["moved"]}, key="peft", method="lora")
    assert "drift: lora is worse than base" in compared(base, adapter, capsys=capsys)
    without = scored(tmp_path / "without", both, rows=False, method="fft")
    out = compared(base, without, capsys=capsys)
    assert "drift: no difference, the rows of without were not kept; score it again with --log_samples true" in out
    other = scored(tmp_path / "other", {"nq_open": values["right"]}, method="fft")
    for words, message in (
        ([base, other], "have no score in common; run hft eval on both"),
        ([base, base], "one model was given twice, or a copy of it; give each once"),
        ([base, chat, base], "one model was given twice, or a copy of it; give each once"),
        ([base], "give two models or more"),
        ([base, tmp_path / "nowhere"], "holds no run and no scores"),
    ):
        assert main(["compare", *map(str, words)]) == 2
        assert message in error_of(capsys)
    (tmp_path / "copy").mkdir()
    for path in (tmp_path / "base" / "scores").rglob("*.*"):
        (tmp_path / "copy" / path.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / path.relative_to(base)).write_bytes(path.read_bytes())
    assert main(["compare", str(base), str(tmp_path / "copy")]) == 2
    assert "one model was given twice, or a copy of it" in error_of(capsys)


def test_a_model_of_the_hub_is_found_where_its_scores_are(tmp_path, values, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    scored(tmp_path / "runs" / "models--x--tiny", {"facts": values["right"]})
    scored(tmp_path / "tuned", {"facts": values["flipped"]}, method="fft")
    assert "facts: fft is better than base" in compared("x/tiny", "tuned", capsys=capsys)
