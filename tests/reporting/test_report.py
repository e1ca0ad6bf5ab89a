"""Reports of real small runs: what they say, and what they look like in a browser."""

import json
import os
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml

from hft.cli import main
from hft.continual.matrix import Matrix
from hft.evaluation.suites import PROTOCOLS
from hft.jsonl import write_jsonl
from hft.planning.forecast import flops_to_fft
from hft.record.scores import Score, Scores, save_rows
from hft.reporting.collect import collect
from hft.reporting.columns import DRIFT, FACTS, TASK_LOSS
from hft.reporting.figures import frontier, heatmap
from hft.reporting.page import Table
from hft.reporting.sections import frontiers, scores
from tests.conftest import ROOT, command, error_of
from tests.reporting.test_compare import scored
from tests.test_recipes import commands

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SMALL = ["--max_length", "32", "--global_batch_size", "4", "--per_device_train_batch_size", "4"]
LOSSES = {"task": ("loss", 128), "drift": ("loss", 40), "kl": ("kl", 128)}
PAPER = {  # LLAMA 2-7B in Tables 1 and 2
    "general": {"mmlu_0shot": 41.6, "gsm8k": 12.0, "bbh": 39.9, "tydiqa": 48.4, "truthfulqa": 38.5, "humaneval": 26.2},
    "knowledge": {"nq_open": 12.9, "triviaqa": 40.2, "hotpotqa": 15.6},
}
METRICS = {"mmlu_0shot": "acc", "truthfulqa": "acc", "tydiqa": "f1", "humaneval": "pass@10"}


def quick(folder: Path, task: float, drift: float, kl: float, facts: float, model: str = "x/tiny") -> Path:
    """Save scores as `hft eval --suite quick` does, with rows of which each is as much above or below the mean."""
    scores = [Score("facts", "acc", 50 + facts, 1.9, 684), Score("facts", "acc_centered", facts, 2.1, 684)]
    for name, value in (("task", task), ("drift", drift), ("kl", kl)):
        scores.append(Score(name, LOSSES[name][0], value, 0.01, LOSSES[name][1], "nats/token", False))
    about = Scores("quick", model, "0" * 64, "float32", scores=scores)
    rows = [{"row": n, "task": s.task, s.metric: s.value + (-1) ** n, "answer": None} for s in scores for n in range(8)]
    save_rows(pd.DataFrame(rows).groupby(["task", "row"], as_index=False).first(), about.path(folder, "facts"))
    about.save(folder)
    return folder


def benchmarks(folder: Path, more: float, model: str) -> Path:
    """Save the paper's scores of Llama-2-7B, moved by `more`, under both suites."""
    for suite, tasks in PAPER.items():
        scores = [Score(t, METRICS.get(t, "exact_match"), value + more, 1.0, 200) for t, value in tasks.items()]
        settings = {"protocol": PROTOCOLS[suite]}
        Scores(suite, model, "0" * 64, "bfloat16", settings, scores=scores).save(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, data) -> dict[str, Path]:
    """A scored base, FFT, two seeds of HFT with a scored checkpoint, a Half-Reset, and `hft diff` of them."""
    folder = tmp_path_factory.mktemp("report")
    flags = {"fft": ("fft", SMALL), "hft-a": ("hft", SMALL), "hft-b": ("hft", [*SMALL, "--selection_seed", "1"])}
    for name, (method, more) in flags.items():
        assert main(command("sft", folder / name, *more, method=method, model=tiny, data=data)) == 0
    words = ["--tuned", folder / "fft", "--base", tiny, "--out", folder / "reset"]
    assert main(["reset", *map(str, words)]) == 0
    assert main(["diff", *map(str, (tiny, folder / "fft", folder / "hft-a", "--out", folder / "diff"))]) == 0
    quick(folder / "tiny", 1.5, 2.8, 0, 20)
    quick(folder / "fft", 1.1, 3.1, 0.4, 14)
    quick(folder / "hft-a" / "checkpoint-2", 1.3, 2.85, 0.1, 18)
    quick(folder / "hft-a", 1.0, 2.9, 0.2, 17)
    quick(folder / "hft-b", 1.1, 3.0, 0.3, 16)
    quick(folder / "reset", 1.05, 3.0, 0.3, 15)
    return {path.name: path for path in folder.iterdir()}


def report(out: Path, *folders: Path) -> tuple[str, str]:
    """The HTML and the Markdown of some folders."""
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    return (out / "report.html").read_text(), (out / "report.md").read_text()


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory) -> tuple[str, str]:
    """The report of all of them."""
    os.chdir(ROOT)
    return report(tmp_path_factory.mktemp("whole"), *runs.values())


def table(markdown: str, caption: str) -> dict[str, dict[str, str]]:
    """The cells of a Markdown table, by first cell and heading."""
    lines = markdown.split(f"\n{caption}\n\n")[1].partition("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip([name.split(" (")[0] for name in head], row, strict=True)) for row in rows}


def scores_of(*folders: Path) -> dict[str, dict[str, str]]:
    """The cells of the only table of scores of some folders, likewise."""
    (only,) = scores(collect(folders))
    head, *rows = [[cell if isinstance(cell, str) else cell.text for cell in row] for row in (only.head, *only.rows)]
    for row, cells in zip(rows, only.rows, strict=True):
        row[2:] = [f"{cell.text} ({', '.join(cell.notes)})" if cell.notes else cell.text for cell in cells[2:]]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def copied(source: Path, folder: Path, **settings) -> Path:
    """A run's records without its weights, under other settings."""
    folder.mkdir()
    for name in ("hft_manifest.json", "results.json", "config.json"):
        shutil.copy(source / name, folder / name)
    config = yaml.safe_load((source / "config.yaml").read_text()) | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_runs_that_differ_in_their_seed_are_one_row(whole, runs):
    text = whole[1]
    rows = table(text, "tiny: quick")
    assert list(rows) == ["base", "fft", "hft", "half-reset"]
    spread = statistics.stdev([1.0, 1.1])
    assert rows["hft"]["task loss"] == f"1.050 ± {spread:.3f} (-0.050 to fft)"
    assert rows["hft"]["facts, centered"] == "16.5 ± 0.7 (+2.5 to fft)"
    assert rows["hft"]["n"] == "2"
    assert rows["fft"]["drift"] == "3.100 (se 0.010)"
    assert rows["half-reset"]["facts, centered"] == "15.0 (se 2.1, +1.0 to fft)"
    assert rows["base"]["KL to base"] == "0.000 (se 0.010, -0.400 to fft)"
    cost = table(text, "tiny")
    assert (cost["fft"]["trains, % of layers"], cost["hft"]["trains, % of layers"]) == ("100.0", "50.0")
    assert cost["fft"]["FLOPs, of fft"] == "1.000"
    assert float(cost["hft"]["FLOPs, of fft"]) == round(flops_to_fft(runs["hft-a"]), 3) < 1
    sizes = {name: float(row["optimizer state, MB"].split()[0]) for name, row in cost.items()}
    assert sizes["hft"] < 0.75 * sizes["fft"]


def test_only_what_rows_tell_apart_has_a_color_and_only_like_scores_are_compared(tmp_path):
    generator = np.random.default_rng(0)
    loss, facts = generator.normal(3, 1, 80), 100.0 * generator.integers(0, 2, 80)

    def made(name, method, moved, some, **more):
        return scored(tmp_path / name, {"task": moved, "facts": some}, method=method, **more)

    fft = made("fft", "fft", loss, facts)
    manifest = {"selection": {"policy": "all"}, "trained_units": [], "frozen_units": [], "trained_parameters": []}
    manifest |= {"base": "x/tiny", "frozen_checksums": {}, "trainable_fraction": {"layers": 1.0, "model": 1.0}}
    (fft / "hft_manifest.json").write_text(json.dumps(manifest))
    lost = made("lost", "hft", loss + 0.3 + generator.normal(0, 0.1, 80), facts)
    won = made("won", "lora", loss - 0.3 + generator.normal(0, 0.1, 80), facts)
    same = made("same", "lisa", loss + generator.normal(0, 0.1, 80), facts)
    chat = made("chat", "mixout", loss, facts, key="chat")
    part = made("part", "mofo", loss[:40] - 1, facts[:40])
    html, text = report(tmp_path / "out", fft, lost, won, same, chat, part)
    kinds = re.findall(r'<small class="(\w*)">([^<]*) to fft( on 40 rows)?</small>', html)
    assert [kind for kind, change, _ in kinds if float(change) == pytest.approx(0.3, abs=0.05)] == ["worse"]
    assert [kind for kind, change, _ in kinds if float(change) == pytest.approx(-0.3, abs=0.05)] == ["better"]
    assert ("better", "-1.000", " on 40 rows") in kinds
    assert {kind for kind, *_ in kinds} == {"", "better", "worse"}
    row = table(text, "tiny: quick")["mixout"]
    assert "not compared with fft: scored under other conditions (chat None and True)" in row["task loss"]
    assert not re.search(r"[+-]\d", row["task loss"])


def test_every_section_is_there_when_its_data_is(runs, tmp_path):
    folders = [
        runs["hft-a"],
        runs["fft"],
        runs["diff"],
        benchmarks(tmp_path / "models--meta-llama--Llama-2-7b-hf", 0.5, "meta/Llama-2-7b-hf"),
    ]
    for fraction, name in ((0.25, "a"), (0.75, "b")):
        folders.append(copied(runs["hft-b"], tmp_path / name, method="hft-ratio", attention_fraction=fraction))
        manifest = json.loads((tmp_path / name / "hft_manifest.json").read_text())
        manifest["trainable_fraction"]["layers"] = fraction
        (tmp_path / name / "hft_manifest.json").write_text(json.dumps(manifest))
        quick(tmp_path / name, 1.1, 2.9, 0.2, 16)
    sequence = tmp_path / "llama2-chat-7b-trace-hft-seqft"
    sequence.mkdir()
    rows = [[50.1, 20.2], [70.3, None], [60.4, 45.5]]
    matrix = Matrix(["FOMC", "Py150"], ["accuracy", "edit_similarity"], ["start", "FOMC", "Py150"], rows)
    matrix.save(sequence)
    html, text = report(tmp_path / "out", *folders, sequence)
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == [
        "What trains",
        "Learned and kept",
        "Scores",
        "Abilities",
        "Trainable fraction",
        "Change of the parameters",
        "Cost",
        "Sequences",
        "Over the steps",
        "Runs",
    ]
    assert titles == re.findall(r"<h2>(.*)</h2>", html)
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert sorted(pictures) == sorted(path.name for path in (tmp_path / "out").glob("*.svg"))
    for name in pictures:
        ElementTree.parse(tmp_path / "out" / name)
    assert 'aria-label="tiny: drift over the steps"' in html
    assert ">60.4<" in html
    assert ">start<" in html
    assert "| llama2-chat-7b-trace-hft-seqft | 53.0 | -4.9 |" in text  # two tasks are not the paper's eight
    assert "hft-ratio attention 0.25" in table(text, "tiny: quick")
    assert "| hft-a | hft | 4 | passed, 18 frozen | quick (float32) |" in text
    reset = shutil.copytree(runs["reset"], tmp_path / "reset", ignore=shutil.ignore_patterns("scores"))
    text = report(tmp_path / "out", reset)[1]  # nothing was scored or trained there
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["What trains", "Runs"]
    assert "reset: what trained" in text


def test_a_learning_rate_is_compared_with_fft_at_the_same_one(runs, tmp_path):
    folders = [runs["fft"], runs["hft-a"]]
    folders += [copied(runs[name], tmp_path / f"{name}-hot", learning_rate=0.01) for name in ("fft", "hft-a")]
    quick(tmp_path / "fft-hot", 2.0, 4.0, 1.0, 5)
    quick(tmp_path / "hft-a-hot", 1.5, 3.5, 0.5, 8)
    (tmp_path / "unlike").mkdir()
    folders += [copied(runs["hft-a"], tmp_path / "unlike" / "hft", max_length=48)]
    quick(folders[-1], 1.2, 2.9, 0.2, 16)
    rows = scores_of(*folders)
    assert list(rows) == [
        "fft 1e-3",
        "fft 1e-2",
        "hft 1e-3",
        "hft max length 48 1e-3",
        "hft 1e-2",
    ]
    assert rows["hft 1e-2"]["task loss"] == "1.500 (se 0.010, -0.500 to fft)"
    assert rows["hft max length 48 1e-3"]["task loss"] == "1.200 (se 0.010)"  # no FFT of its recipe


def test_what_was_made_of_a_run_has_its_seed_group_and_learning_rate(runs, tmp_path):
    """As `make forgetting` makes them: Half-Resets of FFT with two seeds at two learning rates, and other data."""
    folders = [runs["hft-a"], runs["hft-b"]]
    for rate, seed, drift in ((0.001, 0, 3.0), (0.001, 1, 3.2), (0.01, 0, 4.0)):
        folders.append(copied(runs["fft"], tmp_path / f"fft-{rate}-seed={seed}", learning_rate=rate, seed=seed))
        folders.append(quick(tmp_path / f"reset-{rate}-seed={seed}", 1.2, drift, 0.3, 15))
        shutil.copy(runs["reset"] / "hft_manifest.json", folders[-1] / "hft_manifest.json")
        config = {"tuned": str(folders[-2]), "base": "x/tiny", "method": "hft", "selection_seed": seed}
        (folders[-1] / "config.yaml").write_text(yaml.safe_dump(config))
        quick(folders[-2], 1.1, drift + 0.5, 0.4, 14)
    folders.append(copied(runs["fft"], tmp_path / "replay", dataset_name="x/general"))
    quick(folders[-1], 1.1, 3.0, 0.2, 16)
    rows = scores_of(*folders)
    assert list(rows) == [
        "fft 1e-3",
        "fft dataset name general 1e-3",
        "fft 1e-2",
        "hft",
        "half-reset 1e-3",
        "half-reset 1e-2",
    ]
    assert rows["half-reset 1e-3"]["n"] == "2"
    assert rows["half-reset 1e-3"]["drift"] == "3.100 ± 0.141 (-0.500 to fft)"
    assert rows["half-reset 1e-2"]["drift"] == "4.000 (se 0.010, -0.500 to fft)"
    arms = [group.arm for group in collect(folders).groups]
    assert arms == ["fft", "fft dataset name general", "fft", "hft", "half-reset", "half-reset"]


def test_up_and_right_is_better(runs):
    groups = collect([runs["fft"], runs["hft-a"]]).groups
    (axes,) = frontier(groups, TASK_LOSS, DRIFT).axes
    assert (axes.xaxis_inverted(), axes.yaxis_inverted()) == (True, True)
    (axes,) = frontier(groups, TASK_LOSS, FACTS).axes
    assert (axes.xaxis_inverted(), axes.yaxis_inverted()) == (True, False)
    assert frontier(groups[:1], TASK_LOSS, DRIFT) is None


def test_a_score_that_is_no_number_is_not_drawn():
    (axes,) = heatmap({"tasks": ["a", "b"], "rounds": ["a", "b"], "scores": [[50, float("nan")], [40, 60]]}).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.texts] == ["50.0", "40.0", "60.0"]


@pytest.mark.parametrize(
    "name",
    [
        "results.json",
        "hft_manifest.json",
        "config.yaml",
        "scores/quick/facts.json",
        "checkpoint-4/trainer_state.json",
        "diff.json",
        "matrix.json",
    ],
)
def test_a_file_that_is_not_valid_is_named(runs, tmp_path, capsys, name):
    run = shutil.copytree(runs["hft-a"], tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors", "*.pt"))
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text('{"a": ')
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 2
    assert f"{run / name}" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_and_where_nothing_can_be_written_is_told(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(runs["fft"]), str(tmp_path / "empty")]) == 2
    assert f"{tmp_path}/empty holds no run and no scores; give folders of runs" in error_of(capsys)
    (tmp_path / "file").write_text("")
    assert main(["report", str(runs["tiny"]), "--out", str(tmp_path / "file")]) == 2
    assert "give another path" in error_of(capsys)
    assert main(["report", str(runs["fft"]), "--out", str(runs["fft"])]) == 2
    assert "holds files other than a report; name another folder with --out" in error_of(capsys)


class Page(HTMLParser):
    """What a page refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links = [], re.findall(r"url\(([^)]*)\)", text)
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe", "img", "image")
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "xlink:href", "src", "srcset", "action")]


def test_the_page_is_whole_and_the_same_every_time(runs, whole, tmp_path, capsys):
    html, _ = whole
    page = Page(html)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[0] for link in page.links} == {"#"}
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert report(tmp_path, *runs.values()) == whole
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/report.html", f"{tmp_path}/report.md"]


def test_answers_stand_side_by_side_and_a_speed_beyond_its_flops_is_marked(runs, tmp_path):
    folders = [copied(runs[name], tmp_path / name) for name in ("fft", "hft-a", "hft-b")]
    for folder, factor in zip(folders, (1, 1.01, 9), strict=True):
        result = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps(result | {"tokens_per_second": 1000.0 * factor}))
    for folder, answer in zip(folders[:2], ("Lyon\n<b>", "Paris | it is"), strict=True):
        row = {"prompt": [{"role": "user", "content": "Capital?"}], "reference": None, "base_answer": "Rome"}
        write_jsonl(folder / "scores/answers.jsonl", [row | {"answer": answer}])
    html, text = report(tmp_path / "out", *folders[:2])
    assert "| prompt | base | fft | hft-a |" in text
    assert "| Capital? | Rome | Lyon<br>\\<b\\> | Paris \\| it is |" in text
    assert "<td>Lyon\n&lt;b&gt;</td>" in html
    assert table(text, "tiny")["hft"]["tokens/s"] == "1,010 (1.01 of fft)"
    _, text = report(tmp_path / "out", folders[0], folders[2])
    assert table(text, "tiny")["hft"]["tokens/s"] == "9,000 (9.00 of fft, not the same machine state)"
    (folders[0] / "scores/answers.jsonl").write_text("{}")
    assert main(["report", str(folders[0]), "--out", str(tmp_path / "out")]) == 2


def test_names_are_escaped(runs, tmp_path):
    html, text = report(tmp_path / "out", copied(runs["hft-a"], tmp_path / "a<b>&|c"))
    assert "a<b>" not in html
    assert html.count("a&lt;b&gt;&amp;|c") >= 2
    assert "| a\\<b\\>\\&\\|c |" in text
    assert "a<b>" not in text


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_nothing_overflows_on_a_phone_or_a_desktop_and_nothing_is_fetched(runs, tmp_path):
    wide = benchmarks(tmp_path / ("a-very-long-name-" * 8), 1, "meta/Llama-2-7b-hf")
    html, _ = report(tmp_path / "out", *runs.values(), wide)
    escaped = html.replace("&", "&amp;").replace('"', "&quot;")
    frames = "".join(f'<iframe style="width:{width}px;border:0" srcdoc="{escaped}"></iframe>' for width in (400, 1400))
    script = """
    const look = ({contentWindow: w}) => ({
      width: w.innerWidth,
      content: w.document.documentElement.scrollWidth,
      fetched: w.performance.getEntriesByType("resource").length,
      figures: [...w.document.querySelectorAll("svg")].map(figure => figure.getBoundingClientRect().width),
    })
    onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(look)) }
    """
    page = tmp_path / "frames.html"
    page.write_text(f"<!doctype html><title></title>{frames}<script>{script}</script>")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=600, check=True)
    phone, desktop = json.loads(re.search(r"<title>(.*)</title>", done.stdout)[1].replace("&quot;", '"'))
    assert (phone["width"], desktop["width"]) == (400, 1400)
    for seen in (phone, desktop):
        assert seen["content"] <= seen["width"]
        assert seen["fetched"] == 0
        assert all(350 < width <= seen["width"] for width in seen["figures"])


@pytest.fixture
def sweep(runs, tmp_path) -> list[Path]:
    """FFT and HFT at three rates with two seeds each, and a base: HFT is FFT at half its rate, and keeps 0.3 more."""
    generator, folders = np.random.default_rng(0), [tmp_path / "tiny"]
    hard = {task: generator.normal(3, 1, 60) for task in ("task", "drift")}
    scored(folders[0], hard)
    for method, factor in (("fft", 1), ("hft", 0.5)):
        for rate in (1e-4, 2e-4, 4e-4):
            for seed in (0, 1):
                learned, folder = factor * rate / 4e-4, tmp_path / f"{method}-{rate}-seed={seed}"
                copied(runs["fft" if method == "fft" else "hft-a"], folder, learning_rate=rate, seed=seed)
                moves = {"task": -learned, "drift": learned - (0.3 if method == "hft" else 0)}
                values = {task: hard[task] + by + generator.normal(0, 0.05, 60) for task, by in moves.items()}
                folders.append(scored(folder, values))
    return folders


def test_methods_are_compared_at_equal_learning(sweep, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    points = [{"alpha": a, "scores": {"task/loss": 3 - a, "drift/loss": 3 + a}} for a in (0, 0.5, 1)]
    (kept / "config.yaml").write_text(yaml.safe_dump({"method": "wise-ft", "models": [str(sweep[-1])], "alpha": 0.5}))
    (kept / "keep.json").write_text(json.dumps({"method": "hft", "points": [*points, {"alpha": {}, "scores": {}}]}))
    html, text = report(tmp_path / "out", *sweep, kept)
    assert html.count("hft to its base") == 1  # drawn where both of its scores are
    (caption,) = re.findall("^tiny: drift against task loss; .*", text, re.MULTILINE)
    worst = re.search("; reference point: the base's task loss and the worst drift, (.*) nats/token above", caption)
    assert float(worst[1]) == pytest.approx(1, abs=0.02)
    rows = table(text, caption)
    assert list(rows) == ["fft", "hft"]
    assert rows["hft"]["n"] == "3 rates, 2 seeds, 60 and 60 rows"
    found = re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", rows["hft"]["kept more than fft at equal learning"])
    value, low, high = map(float, found.groups())
    assert value == pytest.approx(0.3, abs=0.05)
    assert 0.2 < low < value < high < 0.4
    assert f'<small class="better">{low:+.3g} to {high:+.3g}</small>' in html
    assert rows["fft"]["kept more than fft at equal learning"] == ""
    # By hand, for learned 1/8, 1/4, 1/2 and drift of 0.3 less than that.
    area = 1 / 8 * 1.175 + 1 / 8 * 1.05 + 1 / 4 * 0.8
    assert float(rows["hft"]["hypervolume"].split()[0]) == pytest.approx(area, abs=0.03)
    tables = [part for part in frontiers(collect(sweep[1:])) if isinstance(part, Table)]
    assert "the base shows what was forgotten: score it (hft eval BASE --task_data RUN)" in tables[0].rows[0][0]
    # One rate each: points, and no frontier.
    few = frontiers(collect([sweep[0], *(folder for folder in sweep if "0.0001" in folder.name)]))
    assert not any(part.rows for part in few if isinstance(part, Table))


def test_the_page_goes_to_wandb_as_an_artifact(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["report", *map(str, sweep), "--out", str(tmp_path / "out"), "--report_to", "wandb"]) == 0
    assert "wandb is offline (no API key); upload later with `wandb sync" in capsys.readouterr().out
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (page,) = run.glob("files/media/html/report*.html")
    assert page.read_text() == (tmp_path / "out" / "report.html").read_text()
    (log,) = run.glob("*.wandb")
    content = log.read_bytes()
    assert b"tiny: drift against task loss/hft/hypervolume" in content  # in the summary
    assert b"report.md" in content  # of the artifact's files
    assert re.search(rb"report-\w+", content)


def test_make_report_passes_runs_and_arguments_on():
    assert commands("report", "RUNS=runs/a runs/b", ARGS="--out x") == ["hft report runs/a runs/b --out x"]
