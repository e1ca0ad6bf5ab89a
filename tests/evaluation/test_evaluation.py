"""Scores: known answers, lm-eval's own tasks on the same rows, and what plain torch computes."""

import json
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft.cli import main
from hft.evaluation import evaluate as module
from hft.evaluation.evaluate import Settings, evaluate
from hft.evaluation.rows import answer_rows, general_texts, held_out_rows, replay_texts
from hft.evaluation.suites import SUITES
from hft.evaluation.tasks.quick import facts
from hft.record.scores import Scores
from tests.conftest import error_of, finished_run, write_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, data) -> Path:
    """A finished run, scored on the quick suite."""
    out = finished_run("sft", tmp_path_factory.mktemp("run"), model=tiny, data=data)
    assert main(["eval", str(out), "--limit", "6"]) == 0
    return out


def test_quick_saves_every_score_with_what_it_depends_on(run, tiny):
    scores = Scores.load(run / "scores/quick.json")
    assert {(score.task, score.metric) for score in scores.scores} >= {
        ("facts", "acc_centered"),
        ("facts_capitals", "acc"),
        ("drift", "loss"),
        ("task", "loss"),
        ("kl", "kl"),
    }
    assert all(score.stderr is not None and score.n == (18 if score.task == "facts" else 6) for score in scores.scores)
    assert scores.find("facts", "choice_loss").higher_is_better is False
    assert scores.dtype == "float32"
    assert scores.settings["limit"] == 6
    assert scores.versions["lm_eval"] == "0.4.13" or scores.versions["lm_eval"]
    assert len(scores.model_sha256) == 64
    assert set(scores.data) == {"facts", "drift", "task", "kl"}


def test_losses_and_kl_are_what_torch_computes(run, tiny):
    scores = Scores.load(run / "scores/quick.json")
    tokenizer = AutoTokenizer.from_pretrained(run)
    tuned, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (run, tiny))

    def log_probabilities(model, row):
        ids = tokenizer(row["context"] + row["answer"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(ids).logits[0, -row["tokens"] - 1 : -1].log_softmax(-1), ids[0, -row["tokens"] :]

    losses, divergences = [], []
    rows = answer_rows(held_out_rows(run)[:6], tokenizer, tokenizer)
    for row in rows:
        q, ids = log_probabilities(tuned, row)
        p, _ = log_probabilities(base, row)
        losses.append(-q.gather(1, ids[:, None]).mean().item())
        divergences.append((p.exp() * (p - q)).sum(-1).mean().item())
    assert rows[0]["context"].startswith("<s><|user|>")
    assert rows[0]["answer"].endswith("</s>")
    assert scores.find("task").value == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert scores.find("kl").value == pytest.approx(sum(divergences) / 6, rel=1e-3)
    assert scores.find("kl").value > 0


def test_a_second_call_asks_nothing_again_but_another_setting_does(run, monkeypatch):
    before = (run / "scores/quick.json").read_bytes()
    monkeypatch.setattr(module, "open_lm", lambda *_: pytest.fail("the model was opened again"))
    assert main(["eval", str(run), "--limit", "6"]) == 0
    assert (run / "scores/quick.json").read_bytes() == before
    monkeypatch.setattr(module, "open_lm", lambda *_: Says(""))
    assert evaluate(str(run), "quick", Settings(limit=2, tasks=("facts",)), run.parent).find("facts").n == 6


class Says(LM):
    """A model that answers every prompt alike, or as a function says, and likes every choice alike."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer if callable(answer) else lambda prompt: answer
        self.prompts = []

    def generate_until(self, requests):
        self.prompts += [request.args[0] for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests):
        return [(float(self.answer(request.args[0]) == request.args[1].strip()), True) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


@pytest.fixture
def rows_of_ours(tmp_path) -> Path:
    """One folder with rows of the benchmarks in the documented forms."""
    questions = [("Who wrote Faust", ["Goethe"]), ("Where is ETH", ["Zürich", "Zurich"]), ("How many", ["1,234"])]
    closed = [{"question": question, "answers": answers} for question, answers in questions]
    for name in ("triviaqa", "nq_open", "hotpotqa"):
        write_jsonl(tmp_path / f"{name}.jsonl", closed)
    write_jsonl(
        tmp_path / "humaneval.jsonl",
        [
            {
                "task_id": "0",
                "prompt": "def one():\n",
                "entry_point": "one",
                "canonical_solution": "    return 1\n",
                "test": "def check(f):\n    assert f() == 1\n",
            }
        ],
    )
    return tmp_path


def score_of(task: str, suite: str, answer, tiny, rows, monkeypatch, **settings):
    model = Says(answer)
    monkeypatch.setattr(module, "open_lm", lambda *_: model)
    settings = Settings(tasks=(task,), data=str(rows), chat=False, allow_code=True, **settings)
    return evaluate(str(tiny), suite, settings).find(task), model


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("Goethe", 1),
        (" goethe", 1),  # leading space and case
        ("Zürich", 1),
        ("Zurich", 1),  # an alias
        ("1,234", 1),
        ("1234", 1),
        ("Bach", 0),
        ("", 0),
    ],
)
def test_closed_book_answers(answer, correct, tiny, rows_of_ours, monkeypatch):
    score, _ = score_of("triviaqa", "knowledge", answer, tiny, rows_of_ours, monkeypatch)
    assert score.value == pytest.approx(100 * correct / 3)
    assert score.n == 3


@pytest.mark.parametrize(
    ("task", "suite", "answer", "value"),
    [
        ("nq_open", "knowledge", "Goethe", 100 / 3),
        ("hotpotqa", "knowledge", "Goethe", 100 / 3),
    ],
)
def test_a_model_that_always_says_one_thing(task, suite, answer, value, tiny, rows_of_ours, monkeypatch):
    score, _ = score_of(task, suite, answer, tiny, rows_of_ours, monkeypatch)
    assert score.value == pytest.approx(value)


def test_a_failed_generation_is_an_error_and_never_a_zero(tiny, rows_of_ours, monkeypatch):
    def fail(prompt):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        score_of("triviaqa", "knowledge", fail, tiny, rows_of_ours, monkeypatch)


@pytest.mark.slow
def test_requests_scores_and_errors_equal_those_of_lm_evals_command(tiny, tmp_path, monkeypatch):
    """On 50 rows of each task that is lm-eval's own; ours read other files."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    closed = [{"question": f"Which city is number {i}", "answers": [f"{i}", "Bern"]} for i in range(50)]
    follow = {"instruction_id_list": ["punctuation:no_comma", "detectable_format:json_format"], "kwargs": [{}, {}]}
    instructions = [{"key": i, "prompt": f"Write {i} as JSON.", **follow} for i in range(50)]
    rows = {  # by benchmark: its suite, the split, rows as we document them and as lm-eval's dataset has them
        "triviaqa": ("knowledge", "validation", closed, [r | {"answer": {"aliases": r["answers"]}} for r in closed]),
        "nq_open": ("knowledge", "validation", closed, [r | {"answer": r["answers"]} for r in closed]),
        "ifeval": ("recent", "train", instructions, instructions),
    }
    for name, (_, split, local, original) in rows.items():
        write_jsonl(ours / f"{name}.jsonl", local)
        files = {"data_files": {split: str(write_jsonl(theirs / f"{name}.jsonl", original))}}
        (source,) = (Path(lm_eval.__file__).parent / "tasks" / name).glob("*.yaml")
        keys = {"include": str(source), "task": f"own_{name}", "dataset_path": "json", "dataset_name": None}
        keys |= {"dataset_kwargs": files, "training_split": None, "num_fewshot": 0}
        (theirs / f"{name}.yaml").write_text(yaml.safe_dump(keys))
    out, tasks = tmp_path / "out", [f"own_{name}" for name in rows]
    words = ["--model", "hf", "--model_args", f"pretrained={tiny},dtype=float32", "--device", "cpu", "--log_samples"]
    words += ["--tasks", ",".join(tasks), "--include_path", theirs, "--output_path", out, "--batch_size", "4"]
    subprocess.run([sys.executable, "-m", "lm_eval", "run", *words, "--gen_kwargs", "max_gen_toks=8"], check=True)
    (path,) = out.rglob("results_*.json")
    results, asked = json.loads(path.read_text())["results"], []
    generate = HFLM.generate_until
    monkeypatch.setattr(
        HFLM, "generate_until", lambda lm, all_: asked.extend(r.args for r in all_) or generate(lm, all_)
    )
    for name, (suite, *_) in rows.items():
        asked.clear()
        scores = evaluate(str(tiny), suite, Settings(tasks=(name,), data=str(ours), chat=False, max_gen_toks=8))
        (path,) = out.rglob(f"samples_own_{name}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        assert [prompt for prompt, _ in asked] == [sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples]
        assert [kwargs for _, kwargs in asked] == [sample["arguments"]["gen_args_0"]["arg_1"] for sample in samples]
        (benchmark,) = (one for one in SUITES[suite] if one.name == name)
        for metric, key in benchmark.metrics.items():
            score, error = scores.find(name, metric), results[f"own_{name}"][key.replace(",", "_stderr,")]
            assert score.n == len(samples) == 50
            assert score.value == pytest.approx(100 * results[f"own_{name}"][key])
            assert score.stderr == (None if error == "N/A" else pytest.approx(100 * error))


def test_facts_are_questions_with_one_right_answer_among_eight():
    for make in (facts.capitals, facts.currencies, facts.elements):
        rows = list(make()["test"])
        assert rows == list(make()["test"])
        assert len(rows) > 100
        assert all(len(set(row["choices"])) == 8 for row in rows)
        labels = [row["label"] for row in rows]
        assert max(labels.count(label) for label in range(8)) < 0.25 * len(rows)
    right = {row["prompt"]: row["choices"][row["label"]] for row in rows}
    assert right["The chemical symbol of gold is"] == "Au"
    right = {row["prompt"]: row["choices"][row["label"]] for row in facts.capitals()["test"]}
    assert right["The capital of France is"] == "Paris"


def test_texts_to_drift_on_and_to_replay_have_nothing_in_common():
    assert len(general_texts()) > 40
    assert len(replay_texts()) > 40
    assert not set(general_texts()) & set(replay_texts())


def test_code_runs_only_when_allowed(tiny, rows_of_ours, capsys, monkeypatch):
    monkeypatch.setattr(module, "open_lm", lambda *_: pytest.fail("nothing to ask"))
    assert main(["eval", str(tiny), "--suite", "general", "--tasks", "humaneval", "--data", str(rows_of_ours)]) == 0
    assert "humaneval is skipped: it runs generated code, which needs --allow_code" in capsys.readouterr().out


def test_another_backend_gets_the_model_and_its_own_arguments(tiny, rows_of_ours, monkeypatch):
    got = {}

    class Engine(Says):
        def __init__(self, **arguments):
            super().__init__("Goethe")
            got.update(arguments)

    monkeypatch.setattr("lm_eval.api.registry.get_model", {"vllm": Engine}.get)
    words = ["--suite", "knowledge", "--tasks", "nq_open", "--data", str(rows_of_ours), "--chat", "false"]
    assert main(["eval", str(tiny), *words, "--backend", "vllm", "--backend_args", '{"tensor_parallel_size": 2}']) == 0
    assert got["pretrained"] == str(tiny)
    assert got["tensor_parallel_size"] == 2
    assert Scores.load(tiny / "scores/knowledge.json").settings["backend"] == "vllm"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["none"], "none is neither a folder nor found on the Hub"),
        (["TINY", "--tasks", "gsm8k"], "suite quick has no gsm8k, only facts, drift, task, kl"),
        (
            ["TINY", "--suite", "knowledge", "--tasks", "triviaqa", "--data", "BAD"],
            "triviaqa.jsonl is not JSON Lines: line 2: ",
        ),
        (["TINY", "--suite", "knowledge", "--tasks", "nq_open", "--data", "BAD"], "lack the field 'question'"),
        (["EMPTY"], "has no weights to score"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, tiny, tmp_path, capsys):
    (tmp_path / "triviaqa.jsonl").write_text('{"question": "q"}\n{broken\n')
    (tmp_path / "nq_open.jsonl").write_text(json.dumps({"q": 1}) + "\n")
    (tmp_path / "empty").mkdir()
    names = {"TINY": str(tiny), "BAD": str(tmp_path), "EMPTY": str(tmp_path / "empty")}
    assert main(["eval", *(names.get(word, word) for word in words)]) == 2
    assert sentence in error_of(capsys)
