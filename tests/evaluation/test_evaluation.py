"""Scores: known answers, lm-eval's own tasks on the same rows, and what plain torch computes."""

import json
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft.cli import main
from hft.evaluation import evaluate as module
from hft.evaluation.evaluate import Settings, evaluate
from hft.evaluation.rows import answer_rows, general_texts, held_out_rows, replay_texts
from hft.evaluation.sandbox import passes
from hft.evaluation.tasks.code.code import pass_at
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
    write_jsonl(tmp_path / "gsm8k_test.jsonl", [{"question": "6*7?", "answer": "#### 42"}] * 3)
    write_jsonl(tmp_path / "mmlu_test.jsonl", [_mmlu("anatomy", 2), _mmlu("virology", 1)])
    write_jsonl(tmp_path / "mmlu_dev.jsonl", [_mmlu(s, 0) for s in ("anatomy", "virology") for _ in range(5)])
    write_jsonl(tmp_path / "bbh.jsonl", [{"task": "navigate", "input": "Turn left.", "target": "No"}] * 2)
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
    mbpp = {"task_id": 11, "text": "Return 1.", "code": "", "test_list": ["assert one() == 1"], "test_setup_code": ""}
    write_jsonl(tmp_path / "mbpp_test.jsonl", [mbpp])
    return tmp_path


def _mmlu(subject: str, answer: int) -> dict:
    return {"question": "Which?", "choices": ["p", "q", "r", "s"], "answer": answer, "subject": subject}


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
        ("gsm8k", "general", "6 * 7 = 42. The answer is 42.", 100),
        ("gsm8k", "general", "", 0),
        ("bbh", "general", "So the answer is No.", 100),
        ("mmlu_0shot", "general", "C", 50),
        ("humaneval", "general", "    return 1\n", 100),
        ("humaneval", "general", "    return 2\n", 0),
        ("mbpp", "recent", "def one():\n    return 1\n", 100),
        ("mbpp", "recent", "import sys; sys.exit(0)", 0),
    ],
)
def test_a_model_that_always_says_one_thing(task, suite, answer, value, tiny, rows_of_ours, monkeypatch):
    score, _ = score_of(task, suite, answer, tiny, rows_of_ours, monkeypatch)
    assert score.value == pytest.approx(value)


def test_shots_come_from_the_same_subject_and_a_subset_is_one_of_each_task(tiny, rows_of_ours, monkeypatch):
    write_jsonl(rows_of_ours / "mmlu_test.jsonl", [_mmlu("anatomy", 2)] * 3 + [_mmlu("virology", 1)] * 3)
    score, _ = score_of("mmlu_5shot", "general", "C", tiny, rows_of_ours, monkeypatch, limit=2)
    assert score.n == 4
    write_jsonl(rows_of_ours / "gsm8k_test.jsonl", [{"question": f"{i}?", "answer": "#### 1"} for i in range(250)])
    score, model = score_of("gsm8k", "general", "1", tiny, rows_of_ours, monkeypatch, paper_subsets=True)
    assert score.n == len(model.prompts) == 200


def test_a_failed_generation_is_an_error_and_never_a_zero(tiny, rows_of_ours, monkeypatch):
    def fail(prompt):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        score_of("triviaqa", "knowledge", fail, tiny, rows_of_ours, monkeypatch)


def test_scores_equal_those_of_lm_evals_own_tasks(tiny, tmp_path):
    """Ours read other files; prompts, filters and metrics must stay lm-eval's."""
    folder = tmp_path / "rows"
    folder.mkdir()
    own = tmp_path / "own"
    own.mkdir()
    words = ["Paris", "Rome", "Oslo", "Bern"]
    closed = [
        {"question": f"Which city is number {i}", "answers": [word, word.lower()]} for i, word in enumerate(words)
    ]
    write_jsonl(folder / "triviaqa.jsonl", closed)
    write_jsonl(own / "triviaqa.jsonl", [{**r, "answer": {"aliases": r["answers"]}} for r in closed])
    endings = [[f"{word} is far.", "No.", f"He goes to {word}.", "We sing."] for word in words]
    hellaswag = [{"query": f"Travel: {word} is", "choices": endings[i], "label": i} for i, word in enumerate(words)]
    write_jsonl(folder / "hellaswag.jsonl", hellaswag)
    write_jsonl(
        own / "hellaswag.jsonl",
        [
            {"activity_label": "Travel", "ctx_a": f"{word} is", "ctx_b": "", "endings": e, "label": str(i)}
            for i, (word, e) in enumerate(zip(words, endings, strict=True))
        ],
    )
    gsm8k = [{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(4)]
    write_jsonl(folder / "gsm8k_test.jsonl", gsm8k)
    write_jsonl(own / "gsm8k.jsonl", gsm8k)

    tasks = Path(lm_eval.__file__).parent / "tasks"
    sources = {
        "triviaqa": ("triviaqa/default.yaml", "validation"),
        "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
        "gsm8k": ("gsm8k/gsm8k-cot.yaml", "test"),
    }
    for name, (path, split) in sources.items():
        text = (
            f"include: {tasks / path}\ntask: own_{name}\ndataset_path: json\ndataset_name: null\ntraining_split: null\n"
        )
        files = f"dataset_kwargs: {{data_files: {{{split}: {own / f'{name}.jsonl'}}}}}\nnum_fewshot: 0\n"
        (own / f"{name}.yaml").write_text(text + files)
    lm = HFLM(pretrained=str(tiny), dtype="float32", device="cpu", batch_size=4)
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=[f"own_{name}" for name in sources],
        task_manager=TaskManager(include_path=str(own), include_defaults=False),
        gen_kwargs={"max_gen_toks": 8},
        bootstrap_iters=100,
    )["results"]
    ours = {
        name: evaluate(str(tiny), suite, Settings(tasks=(name,), data=str(folder), chat=False, max_gen_toks=8, **more))
        for name, suite, more in (("triviaqa", "knowledge", {}), ("hellaswag", "recent", {}), ("gsm8k", "general", {}))
    }
    keys = {"triviaqa": "exact_match,remove_whitespace", "hellaswag": "acc_norm,none"}
    for name, key in keys.items():
        score = ours[name].find(name)
        assert score.value == pytest.approx(100 * results[f"own_{name}"][key])
        assert score.stderr == pytest.approx(100 * results[f"own_{name}"][key.replace(",", "_stderr,")])


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


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "while True: pass",
        "x = 'a' * 2**31",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import subprocess; subprocess.run(['true'])",
        "open('big', 'wb').write(bytes(2**22))",
    ],
)
def test_a_program_that_fails_or_does_what_it_may_not_does_not_pass(program):
    assert not passes(f"try_it = 1\n{program}", seconds=1)


def test_a_program_that_runs_to_its_end_passes():
    assert passes("print('no newline at the end', end='')\nassert sorted([2, 1]) == [1, 2]")


def test_pass_at_k_is_the_unbiased_estimate():
    programs = ["assert True"] * 2 + ["assert False"] * 3
    assert pass_at(programs, (1, 2, 10)) == pytest.approx({"pass@1": 2 / 5, "pass@2": 1 - 3 / 10})


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
