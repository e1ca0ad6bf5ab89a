"""The papers' tables as data: what they say of themselves, and our scores beside them."""

import re
import runpy
import statistics
from pathlib import Path

import pytest

from hft.cli import main
from hft.config import read_yaml
from hft.continual.matrix import Matrix
from hft.errors import HFTError
from hft.evaluation.alpaca import ALPACA, COLUMNS, TASK
from hft.evaluation.suites import PROTOCOLS, SUITES
from hft.record.scores import Score, Scores
from hft.reporting.collect import collect
from hft.reporting.columns import columns_of as scored_columns
from hft.reporting.paper import DATA, find_table, measure_row, tables
from hft.reporting.sections import scores as score_tables
from hft.reporting.sections import sequences
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
# Tables with columns that no score of ours is the counterpart of: runtimes, CPI-FT's, and matrices, which have rounds.
NOT_SCORED = {"10", "cpi-1", *map(str, range(24, 43))}


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
                digits = max(
                    len(str(each.values[table.columns.index(column)]).partition(".")[2]) for each in table.rows
                )
                off = abs(statistics.fmean(values[member] for member in members) - values[column])
                assert off <= 0.5 * 10**-digits + 1e-9 or "average" in row.note  # rounding is said too
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
    settings = {"protocol": PROTOCOLS.get(suite, "hft")} | (settings or {})
    Scores(suite, str(folder), "sha", "bfloat16", settings, scores=scores).save(folder)
    if not (folder / "config.yaml").exists():
        (folder / "config.yaml").write_text("model_name_or_path: meta-llama/Llama-2-7b-hf\n")


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
    measured, _ = measure_row(table, hft, runs)
    assert measured.keys() == {"NaturalQuestion", "TriviaQA"}  # no average without all of its columns
    one = measured["NaturalQuestion"]
    assert (one.value, one.spread, one.n) == (7.0, 1.0, 3)
    mean = measure_row(table, fft, runs)[0]["Overall"]
    assert (mean.value, mean.n) == (15.0, 1)
    assert mean.spread == pytest.approx(3 / 3**0.5)
    assert measure_row(table, table.rows[0], runs) == ({}, [])


def test_a_seed_with_a_row_of_its_own_is_not_pooled(runs):
    table = find_table("14")
    first, second = (measure_row(table, row, runs)[0]["NaturalQuestion"] for row in table.rows[:2])
    assert (first.value, first.n) == (7.0, 2)  # seeds 0 and 2-seed=3
    assert (second.value, second.n) == (7.0, 1)


def test_a_checkpoint_has_scores_of_its_own(tmp_path):
    table = find_table("20")
    row = table.rows[0]
    (tmp_path / row.run).mkdir(parents=True)
    (tmp_path / row.run / "config.yaml").write_text("model_name_or_path: meta-llama/Llama-3.1-8B\n")
    save(tmp_path / row.run, "recent", nq__contains=27.0)
    assert row.run.endswith("/checkpoint-448")
    assert measure_row(table, row, tmp_path)[0]["NQ"].value == 27.0
    assert measure_row(table, table.rows[1], tmp_path) == ({}, [])


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
    assert "* scored under other conditions than the benchmark's or most of ours: limit 100" in text
    save(tmp_path / run, "knowledge", **numbers)  # other settings are another file, and all rows win
    assert main(["paper", "2", "--model", "llama2-7b", "--runs", str(tmp_path)]) == 0
    assert "*" not in capsys.readouterr().out


def fake(folder: Path, table, row, number: int) -> dict[str, float]:
    """Scores of a row that tell every row and column apart, saved as an evaluation does; by column."""
    folder.mkdir(parents=True, exist_ok=True)
    if not row.run.startswith("models--"):
        (folder / "config.yaml").write_text(f"model_name_or_path: org/{row.base}\n")
    if table.is_matrix:
        if not (folder / "matrix.json").exists():
            rows = [[20.0 * t + task if task <= t else None for task in range(8)] for t in range(8)]
            about = {"dtype": "bfloat16", "versions": {}}
            rounds = ["start", *table.tasks]
            matrix = Matrix(table.tasks, ["accuracy"] * 8, rounds, [[1.0] * 8, *rows], counts=[9] * 8, about=about)
            matrix.save(folder)
            matrix.totals(Scores("trace", f"org/{row.base}", "sha", "bfloat16"), None).save(folder)
        if row.label == "OP":
            return {str(t + 1): statistics.fmean(20.0 * t + task for task in range(t + 1)) for t in range(8)}
        if row.label == "BWT":
            return {"8": sum(20.0 * (7 - task) for task in range(8)) / 8}
        return {str(t + 1): 20.0 * t + number for t in range(number, 8)}
    settings, values = {"tasks": find_table("24").tasks}, {}
    for column, key in table.scores.items():
        values[key] = 20.0 * number + table.columns.index(column)
    for suite in {suite for suite, *_ in values}:
        for task in {key[1] for key in values if key[0] == suite}:
            found = [Score(*key[1:], value, None, 9) for key, value in values.items() if key[:2] == (suite, task)]
            others = [Score(task, "another metric", 99.0, None, 9)]
            about = settings if suite == "trace" else {"protocol": PROTOCOLS.get(suite, "hft")}
            Scores(suite, f"org/{row.base}", "sha", "bfloat16", about, {task: "a"}, scores=found + others).save(folder)
    means = {column: [values[key] for key in table.keys(column)] for column in table.columns}
    return {column: statistics.fmean(some) for column, some in means.items() if some}


@pytest.mark.parametrize("name", [name for name in tables() if name != "10"])
def test_every_cell_of_ours_stands_beside_its_own_of_the_papers(name, tmp_path, capsys):
    table = find_table(name)
    rows = [row for row in table.rows if row.run]
    expected = [fake(tmp_path / row.run, table, row, number) for number, row in enumerate(rows)]
    assert main(["paper", name, "--runs", str(tmp_path), "--markdown"]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    for row, mine in zip(rows, expected, strict=True):
        ours = lines[[line[:1] for line in lines].index([row.label]) + 1]
        printed = dict(zip(table.columns, ours[2:], strict=True))
        assert {c: float(cell) for c, cell in printed.items() if cell} == pytest.approx(mine, abs=0.051)
    # The report, where each run stands by itself.
    for row, mine in zip(rows, expected, strict=True):
        if table.is_matrix and row.label not in ("OP", "BWT"):
            continue
        papers = dict(zip(table.columns, row.values, strict=True))
        found = collect([tmp_path / row.run])
        if table.is_matrix:
            (last,) = [part for part in sequences(found) if hasattr(part, "rows")]
            cells = {"8": (last.rows[0][1 + (row.label == "BWT")], papers["8"])}
        else:
            keys = {table.keys(column): column for column in table.columns if table.keys(column)}
            suites = zip(scored_columns(found.groups).values(), score_tables(found), strict=True)
            pairs = [pair for columns, part in suites for pair in zip(columns, part.rows[0][2:], strict=True)]
            cells = {keys[c.keys]: (cell, papers[keys[c.keys]]) for c, cell in pairs if c.keys in keys}
            assert cells.keys() >= table.scores.keys()
            others = [cell.notes for c, cell in pairs if c.keys[0][2] == "another metric"]
            assert not any("paper" in note for notes in others for note in notes)
            assert others or not table.scores
        for column, (cell, paper) in cells.items():
            assert cell.text == f"{mine[column]:.1f}", (row.label, column)
            assert ([*cell.notes] == [f"paper {paper:.1f}"]) if paper is not None else not cell.notes


def test_only_the_papers_own_model_stands_beside_its_numbers(runs, capsys):
    """A folder that is only called as one of the paper's runs, and scores of another protocol."""
    (runs / "llama2-7b-sft-fft/config.yaml").write_text("model_name_or_path: models/tiny\n")
    save(runs / "llama2-7b-sft-lora", "general", {"protocol": "another"}, gsm8k__exact_match=50.0)
    assert main(["paper", "5", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert "50.0" not in out.split("LoRA")[1].splitlines()[1]
    assert f"{runs}/llama2-7b-sft-lora: scores of general by another protocol or tasks are not shown" in out
    assert main(["paper", "2", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert out.count("ours, n =") == 1
    assert f"{runs}/llama2-7b-sft-fft is not shown: it goes back to tiny, the paper's to Llama-2-7b-hf" in out
    (only,) = score_tables(collect([runs / "llama2-7b-sft-fft"]))
    assert not any("paper" in note for cell in only.rows[0][2:] for note in cell.notes)


def test_a_mean_is_over_like_scores_only(tmp_path, capsys):
    folder = tmp_path / "llama2-7b-sft-hft"
    save(folder, "knowledge", nq_open__exact_match=7.0, triviaqa__exact_match=30.0)
    save(folder, "knowledge", {"limit": 50}, hotpotqa__exact_match=15.0)
    assert main(["paper", "2", "--model", "llama2-7b", "--runs", str(tmp_path)]) == 0
    ours = next(line for line in capsys.readouterr().out.splitlines() if "ours" in line)
    assert ours.split()[4:] == ["7.0±3.0", "30.0±3.0", "15.0±3.0*"]
    (table,) = score_tables(collect([folder]))
    assert list(table.rows[0][-1].notes) == ["no mean: limit None and 50"]
    assert list(table.rows[0][-2].notes) == ["limit 50", "se 3.0", "paper 15.4"]
    for name in ("llama2-7b-sft-fft", "llama2-7b-sft-fft-reset", "llama2-7b-dpo-fft"):
        save(tmp_path / name, "knowledge", {"chat": name != "llama2-7b-sft-fft"}, nq_open__exact_match=7.0)
    assert main(["paper", "2", "--model", "llama2-7b", "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[4] for line in out.splitlines() if "ours, n" in line] == [
        "7.0±3.0*",
        "7.0±3.0",
        "7.0±3.0",
        "7.0±3.0",
    ]
    assert "most of ours: chat False, limit 50" in out


def test_the_bases_are_those_of_the_recipes():
    for model, base in read_yaml(DATA / "bases.yaml").items():
        found = {
            re.search(r"^model_name_or_path: *(\S+)", p.read_text(), re.M)[1]
            for p in Path("recipes", model).glob("*.yaml")
            if p.stem in ("sft", "trace", "cpi")
        }
        assert {name.rpartition("/")[2] for name in found} == {base}


def test_the_command_lists_all_tables(capsys):
    assert main(["paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(tables())
    assert lines[7].split()[0] == "8"
    assert lines[7].endswith("[llama3-8b]")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["figure-2"], "unknown table 'figure-2', did you mean 'figure-1'? `hft paper` lists all"),
        (["Table 43"], "unknown table 'Table 43', did you mean '4'? `hft paper` lists all"),
        (["8", "--model", "llama3"], "table 8 has no rows of 'llama3', only of llama3-8b"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    assert main(["paper", *words]) == 2
    assert sentence in error_of(capsys)


def test_scores_that_cannot_be_read_are_an_error(runs):
    (runs / "llama2-7b-sft-fft/scores/knowledge/nq_open.json").write_text("{")
    table = find_table("2")
    with pytest.raises(HFTError, match=r"nq_open\.json holds no valid scores"):
        measure_row(table, next(row for row in table.rows if row.run == "llama2-7b-sft-fft"), runs)


def test_the_readme_of_the_recipes_is_up_to_date(tmp_path):
    text = Path("recipes/README.md").read_text()
    copy = tmp_path / "README.md"
    copy.write_text(text.replace("42.9", "42.8"))
    runpy.run_path("docs/paper_runs.py")["update"](copy)
    assert copy.read_text() == text, "run `python docs/paper_runs.py`"
