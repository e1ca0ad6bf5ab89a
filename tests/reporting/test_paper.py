"""The papers' tables as data: what they say of themselves, and our scores beside them."""

import re
import statistics
from pathlib import Path

import pytest

from hft.cli import main
from hft.errors import HFTError
from hft.evaluation.alpaca import ALPACA, COLUMNS, TASK
from hft.evaluation.suites import SUITES
from hft.record.scores import Score, Scores
from hft.reporting.paper import find_table, measure_row, rows_of_run, tables
from tests.conftest import error_of

# Averages that are not what the paper's own row gives: table, row, column.
WRONG_AVERAGES = {
    ("1", "LLAMA 2-7B-SFT", "Overall"),
    ("8", "FFT", "Overall"),
    ("9", "Layer-level Half-Reset", "Knowledge"),
    ("9", "Layer-level Half-Reset", "Overall"),
    ("13", "FFT (linear, 1e-5)", "General"),
    ("13", "FFT (linear, 1e-5)", "Overall"),
    ("13", "FFT (linear, 2e-5)", "General"),
}
ROUNDING = 0.06
# Tables with columns that `hft eval` has no score for: TRACE's own, runtimes, AlpacaEval, CPI-FT's.
NOT_SCORED = {"10", "15", "figure-3b", "cpi-1", *map(str, range(24, 43))}


def columns_of(table, row) -> dict[str, float]:
    return dict(zip(table.columns, row.values, strict=True))


def test_every_table_of_the_paper_is_there():
    assert list(tables()) == [*map(str, range(1, 43)), "figure-1", "figure-3a", "figure-3b", "cpi-1"]
    assert all(len(row.values) == len(table.columns) for table in tables().values() for row in table.rows)


def test_averages_are_those_of_their_rows_but_for_known_ones():
    wrong, checked = set(), 0
    for table in tables().values():
        for row in table.rows:
            values = columns_of(table, row)
            for column, members in table.means.items():
                checked += 1
                if abs(statistics.fmean(values[member] for member in members) - values[column]) > ROUNDING:
                    wrong.add((table.name, row.label, column))
                    assert "average" in row.note
    assert wrong == WRONG_AVERAGES
    assert checked > 130


@pytest.mark.parametrize("number", range(24, 43))
def test_a_trace_matrix_gives_its_op_and_bwt(number):
    """Equation 5: OP is the mean over the tasks so far, BWT the mean change since each was learned, over all eight."""
    *tasks, op, bwt = (row.values for row in find_table(str(number)).rows)
    assert len(tasks) == 8
    for last in range(8):
        assert all((tasks[task][last] is None) == (task > last) for task in range(8))
        assert statistics.fmean(tasks[task][last] for task in range(last + 1)) == pytest.approx(op[last], abs=ROUNDING)
    assert sum(tasks[task][7] - tasks[task][task] for task in range(7)) / 8 == pytest.approx(bwt[7], abs=ROUNDING)
    assert bwt[:7] == (None,) * 7


def test_tables_agree_on_the_runs_that_they_share():
    seen, shared = {}, 0
    for table in tables().values():
        for row in table.rows:
            values = columns_of(table, row)
            if table.columns[-1] == "8":  # a TRACE matrix: what Tables 3, 4 and 7 have is after its last round
                values = {row.label: values["8"]}
            named = {table.means.get(column, column): value for column, value in values.items()}
            for column, value in named.items() if row.run else ():
                key = row.run if "/checkpoint" in row.run else re.split("-save_strategy|/", row.run)[0], column
                shared += key in seen
                assert seen.setdefault(key, value) == value, (table.name, row.label, column)
    assert shared > 150


def test_every_column_is_a_score_that_the_evaluation_saves():
    saved = {(suite, one.name, metric) for suite, found in SUITES.items() for one in found for metric in one.metrics}
    saved |= {("trace", "op", "op"), ("trace", "bwt", "bwt")}  # by a sequence (tests/continual/test_sequence.py)
    saved |= {(ALPACA, TASK, metric) for metric in COLUMNS}
    for table in tables().values():
        assert set(table.scores.values()) <= saved, table.name
        assert table.name in NOT_SCORED or not (set(table.columns) - set(table.means) - set(table.scores))


def test_runtimes_and_their_differences_agree():
    for row in find_table("10").rows:
        trained, runtime, difference = row.values
        assert difference == pytest.approx(runtime - 100)
        assert float(row.label.removesuffix("%")) == trained


def save(folder: Path, suite: str, settings: dict | None = None, **values: float) -> None:
    """Scores of some tasks with a standard error of 3; a metric follows its task after two underscores."""
    scores = [Score(*name.split("__"), value, stderr=3.0, n=100) for name, value in values.items()]
    Scores(suite, str(folder), "sha", "bfloat16", settings or {}, scores=scores).save(folder)


@pytest.fixture
def runs(tmp_path) -> Path:
    """Three seeds of HFT with two of three knowledge tasks, one with all; and other runs that are none of them."""
    run = "llama2-7b-sft-hft"
    for name, nq in ((run, 6.0), (f"{run}-selection_seed=1", 7.0), (f"{run}-selection_seed=2-seed=3", 8.0)):
        save(tmp_path / name, "knowledge", nq_open__exact_match=nq, triviaqa__exact_match=30.0)
    save(tmp_path / f"{run}-selection_seed=1", "general", gsm8k__exact_match=31.5, mmlu_0shot__acc=50.0)
    for name in (
        "-ratio-attention_fraction=0.5-mlp_fraction=0.333",
        "-learning_rate=1e-05",
        "-selection_seed=4-max_steps=9",
    ):
        save(tmp_path / (run + name), "knowledge", nq_open__exact_match=99.0)
    every = {"nq_open__exact_match": 4.0, "triviaqa__exact_match": 25.0, "hotpotqa__exact_match": 16.0}
    save(tmp_path / "llama2-7b-sft-fft", "knowledge", **every)
    return tmp_path


def test_ours_are_the_mean_and_spread_over_seeds(runs):
    table = find_table("2")
    [hft] = [row for row in table.rows if row.run == "llama2-7b-sft-hft"]
    [fft] = [row for row in table.rows if row.run == "llama2-7b-sft-fft"]
    measured = measure_row(table, hft, runs)
    assert measured.keys() == {"NaturalQuestion", "TriviaQA"}  # no average without all of its columns
    one = measured["NaturalQuestion"]
    assert (one.value, one.spread, one.n) == (7.0, 1.0, 3)
    mean = measure_row(table, fft, runs)["Overall"]
    assert (mean.value, mean.n) == (15.0, 1)
    assert mean.spread == pytest.approx(3 / 3**0.5)
    assert measure_row(table, table.rows[0], runs) == {}


def test_a_seed_with_a_row_of_its_own_is_not_pooled(runs):
    table = find_table("14")
    first, second = (measure_row(table, row, runs)["NaturalQuestion"] for row in table.rows[:2])
    assert (first.value, first.n) == (7.0, 2)  # seeds 0 and 2-seed=3
    assert (second.value, second.n) == (7.0, 1)


def test_a_checkpoint_has_scores_of_its_own(tmp_path):
    table = find_table("20")
    row = table.rows[0]
    save(tmp_path / row.run, "recent", nq__contains=27.0)
    assert row.run.endswith("/checkpoint-448")
    assert measure_row(table, row, tmp_path)["NQ"].value == 27.0
    assert measure_row(table, table.rows[1], tmp_path) == {}


def test_the_command_prints_commands_the_papers_numbers_and_ours(runs, capsys):
    assert main(["paper", "2", "--model", "llama2-7b", "--runs", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("make sft-hft MODEL=llama2-7b")
    assert lines[at + 1].split()[-4:] == ["6.2", "32.8", "15.4", "18.1"]
    assert lines[at + 2].split() == ["ours,", "n", "=", "3", "7.0±1.0", "30.0±0.0"]
    assert not [line for line in lines if "13b" in line]
    assert main(["paper", "5", "--runs", str(runs), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "| LoRA | `make sft-lora MODEL=llama2-7b` | 46.8 | 18.0 |" in text
    assert "| ours, n = 1 to 3 |  | 50.0±3.0 | 31.5±3.0 |" in text
    assert "QLoRA: Looks like a broken run" in text
    assert "One standard error on 200 questions is 3.1 points" in text


def test_scores_of_some_rows_only_are_marked(tmp_path, capsys):
    run = "llama2-7b-sft-hft"
    numbers = {"nq_open__exact_match": 7.0, "triviaqa__exact_match": 30.0}
    save(tmp_path / run, "knowledge", settings={"limit": 100}, **numbers)
    assert main(["paper", "2", "--model", "llama2-7b", "--runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "7.0±3.0*" in text
    assert "* on some of the rows only (--limit)" in text
    save(tmp_path / run, "knowledge", **numbers)  # other settings are another file, and all rows win
    assert main(["paper", "2", "--model", "llama2-7b", "--runs", str(tmp_path)]) == 0
    assert "*" not in capsys.readouterr().out


def test_the_command_lists_all_tables(capsys):
    assert main(["paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(tables())
    assert lines[7].split()[0] == "8"
    assert lines[7].endswith("[llama3-8b]")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["figure-2"], "unknown table 'figure-2', did you mean figure-1? `hft paper` lists all"),
        (["Table 43"], "did you mean 4?"),
        (["8", "--model", "llama3"], "table 8 has no rows of 'llama3', did you mean llama3-8b?"),
        (["--update", "nothing.md"], "cannot read nothing.md"),
        (["--update", "CONTRIBUTING.md"], "CONTRIBUTING.md has no place for the commands"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    assert main(["paper", *words]) == 2
    assert sentence in error_of(capsys)


def test_scores_that_cannot_be_read_are_an_error(runs):
    (runs / "llama2-7b-sft-fft/scores/knowledge.json").write_text("{")
    table = find_table("2")
    with pytest.raises(HFTError, match=r"knowledge\.json holds no valid scores"):
        measure_row(table, rows_of_run("llama2-7b-sft-fft")[1][1], runs)


def test_the_readme_of_the_recipes_is_up_to_date(tmp_path):
    text = Path("recipes/README.md").read_text()
    copy = tmp_path / "README.md"
    copy.write_text(text.replace("42.9", "42.8"))
    assert main(["paper", "--update", str(copy)]) == 0
    assert copy.read_text() == text, "run `hft paper --update recipes/README.md`"
