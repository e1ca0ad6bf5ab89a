"""Each benchmark beside the paper sends the prompt of its original, and reads answers as its original does.

originals/*.json has the prompts of the rows below, with a chat template ("chat") and without ("base"). general.json is
made by the code of allenai/open-instruct f342459 (eval/*/run_eval.py, in the chat format of TULU 2), recent.json by the
templates and parsers of opencompass 0.5.4 (opencompass/configs/datasets/), whose chats the model's template renders.
"""

import json
import random
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from lm_eval.api.model import LM
from transformers import AutoTokenizer

from hft.evaluation.evaluate import Settings, evaluate
from hft.evaluation.rows import draw_rows
from tests.conftest import ROOT, write_jsonl

ORIGINALS = {path.stem: json.loads(path.read_text()) for path in sorted(Path(__file__).parent.glob("originals/*.json"))}
CASES = [(suite, benchmark) for suite, originals in ORIGINALS.items() for benchmark in originals]
QUESTION = {"question": "Which?", "choices": ["p", "q", "r", "s"], "answer": 2, "subject": "high_school_biology"}
NAVIGATE = "If you follow these instructions, do you return to the starting point? Turn left.\nOptions:\n- Yes\n- No"
CHOICES = {"choices": ["Yes.", "No."], "labels": [1, 0]}
BERN = {"context": "Bern is far.", "question": "What is far?", "answers": ["The Bern"]}
ROME = {"context": "Rome is near.", "question": "What is near?", "answers": ["Rome"]}
ROWS = {
    "gsm8k_test": [{"question": "What is 6 * 200?", "answer": "6 * 200 = 1,200\n#### 1,200"}],
    "mmlu_test": [QUESTION],
    "mmlu_dev": [QUESTION | {"question": f"Shot {i}?", "answer": i % 4} for i in range(5)],
    "bbh": [
        {"task": "date_understanding", "input": "Today?\nOptions:\n(A) 1\n(B) 2", "target": "(B)"},
        {"task": "navigate", "input": NAVIGATE, "target": "No"},
        {"task": "sports_understanding", "input": 'Is the following sentence plausible? "X ran."', "target": "yes"},
    ],
    "tydiqa_dev": [
        {"language": "en", **BERN},
        {"language": "ko", "context": "베른은 멀다.", "question": "무엇이 멀까?", "answers": ["베른"]},
    ],
    "tydiqa_train": [
        {"language": "en", **ROME},
        {"language": "ko", "context": "로마는 가깝다.", "question": "무엇이?", "answers": ["로마"]},
    ],
    "truthfulqa_mc": [{"question": "Is it?", "mc1_targets": CHOICES, "mc2_targets": CHOICES}],
    "hellaswag": [{"query": "Baking: He takes: flour", "choices": ["and w.", "x.", "y.", "z."], "label": 2}],
    "nq_open": [{"question": "who wrote faust", "answers": ["The Goethe", "J. W."]}],
    "triviaqa_dev": [{"question": "Who wrote Faust", "answers": ["Goethe"]}],
    "math": [{"problem": "What is $1/2$?", "solution": "It is $\\boxed{\\frac{1}{2}}$."}],
    "execution": [{"code": "def f(x):\n    return [x]", "input": "f(x = 1)", "output": "[1]"}],
}


class Chat(LM):
    """A model that renders chats by a template, keeps what it is asked and always gives the same answer."""

    tokenizer_name = "tulu"

    def __init__(self, tokenizer, answer: str):
        super().__init__()
        self.tokenizer, self.answer, self.requests = tokenizer, answer, []

    def apply_chat_template(self, chat, add_generation_prompt=True):
        more = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat, tokenize=False, **more)

    @property
    def prompts(self) -> list[str]:
        return list(dict.fromkeys(request[0] for request in self.requests))

    def generate_until(self, requests):
        self.requests += [request.args for request in requests]
        return [self.answer] * len(requests)

    def loglikelihood(self, requests):
        self.requests += [request.args for request in requests]
        return [(10.0 * (request.args[1] == self.answer), True) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


@pytest.fixture(scope="module")
def tokenizer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = (ROOT / "hft/demo/templates/tulu.jinja").read_text()
    return tokenizer


@pytest.fixture
def ask(tiny, tokenizer, tmp_path, monkeypatch):
    """Score a stub on a benchmark as `hft eval` does; returns the scores and the stub."""

    def run(suite: str, benchmark: str, answer: str = "", rows: dict | None = None, model=tiny, **settings):
        for name, own in (ROWS | (rows or {})).items():
            write_jsonl(tmp_path / f"{name}.jsonl", own)
        stub = Chat(tokenizer, answer)
        monkeypatch.setattr("hft.evaluation.engine.open_lm", lambda *_: stub)
        settings = {"tasks": (benchmark,), "data": str(tmp_path), "chat": True} | settings
        return evaluate(str(model), suite, Settings(**settings)), stub

    return run


@pytest.mark.parametrize(("suite", "benchmark"), CASES)
def test_a_prompt_is_its_originals(suite, benchmark, ask):
    original = ORIGINALS[suite][benchmark]
    _, base = ask(suite, benchmark, chat=False)
    _, chat = ask(suite, benchmark)
    expected = original["chat"]
    if suite == "recent":
        expected = [chat.apply_chat_template(messages) for messages in expected]
    else:  # open-instruct's tokenizer adds the BOS token; TULU's template strips a message, open-instruct's does not
        expected = ["<s>" + prompt.replace("\n\n<|assistant|>", "\n<|assistant|>") for prompt in expected]
    assert base.prompts == original["base"]
    assert chat.prompts == expected


@pytest.mark.parametrize(
    ("suite", "benchmark", "chat", "base"),
    [
        ("general", "gsm8k", ([], 512), (["\n"], 512)),
        ("general", "bbh", (["\n\n"], 512), (["\n\n"], 512)),
        ("general", "tydiqa", ([], 50), (["\n"], 50)),
        ("recent", "triviaqa", ([], 50), ([], 50)),
        ("recent", "bbh", ([], 512), ([], 512)),
        ("recent", "mmlu", ([], 1024), ([], 1024)),
    ],
)
def test_an_answer_ends_where_its_originals_does(suite, benchmark, chat, base, ask):
    for templated, (until, tokens) in ((True, chat), (False, base)):
        _, model = ask(suite, benchmark, chat=templated)
        assert model.requests[0][1] == {"until": until, "max_gen_toks": tokens, "do_sample": False}


@pytest.mark.parametrize(
    ("suite", "benchmark", "answer", "values"),
    [
        ("general", "gsm8k", "6 * 200 is 1,200. So the answer is 1,200.", [100]),
        ("general", "gsm8k", "It is -1200 of 3 and 4 then 1200", [100]),  # the last number, whatever its sign
        ("general", "gsm8k", "1200, that is 2 * 600", [0]),
        ("general", "gsm8k", "1200.0", [0]),  # the period goes, the zero stays
        ("general", "gsm8k", "twelve hundred", [0]),
        ("general", "bbh", "Let's think. So the answer is no.", [100 / 3]),
        ("general", "bbh", "NO!", [100 / 3]),  # the whole text, blind to case and punctuation
        ("general", "bbh", "The answer is (b). The answer is no.", [100 / 3]),
        ("general", "bbh", "The answer is no", [0]),  # no period ends it, and the text is another
        ("general", "tydiqa", " a Bern. ", [50, 50]),
        ("general", "tydiqa", "Bern city", [100 / 3, 0]),
        ("general", "tydiqa", "베른", [50, 50]),
        ("general", "mmlu_0shot", " C", [100]),
        ("general", "mmlu_0shot", " B", [0]),
        ("general", "truthfulqa", " Yes.", [99.99546]),
        ("recent", "mmlu", "C", [100]),
        ("recent", "mmlu", "The answer is (C) because A is wrong.", [100]),
        ("recent", "mmlu", "**Answer:** C. r", [0]),  # bold is not a cue; the first capital is the A of "Answer"
        ("recent", "mmlu", "answer: b\nThe correct answer is C", [100]),
        ("recent", "mmlu", "Both A and C, but it must be B", [0]),
        ("recent", "mmlu", "r", [0]),
        ("recent", "hellaswag", "C. y.", [100]),
        ("recent", "hellaswag", "I would choose \\boxed{C}", [100]),
        ("recent", "hellaswag", "A", [0]),
        ("recent", "gsm8k", "Step 5.\nThe answer is 1200\nQuestion: 7?", [100]),
        ("recent", "gsm8k", "1200.0", [100]),
        ("recent", "gsm8k", "1,200", [0]),  # no commas in the answer
        ("recent", "gsm8k", "-1200", [0]),
        ("recent", "bbh", "So the answer is (B).", [100 / 3]),
        ("recent", "bbh", "B", [100 / 3]),
        ("recent", "bbh", "So the answer is No.", [100 / 3]),
        ("recent", "bbh", "the answer is **yes**, the answer is no", [100 / 3]),
        ("recent", "bbh", "the answer is no.", [0]),
        ("recent", "nq", "It was written by Johann Wolfgang von Goethe in 1808.", [100]),
        ("recent", "nq", "Schiller, no: the answer is Goethe.", [100]),
        ("recent", "nq", "Schiller\nGoethe", [0]),  # another line
        ("recent", "nq", "Schiller. Goethe", [0]),  # after a period
        ("recent", "triviaqa", "The answer is the great Goethe.", [100]),
        ("recent", "triviaqa", "A: Goethe", [100]),
        ("recent", "triviaqa", "Goethe? The answer is Schiller", [0]),
        ("recent", "livecodebench", "assert f(x = 1) == [1]\n[/ANSWER]", [100]),
        ("recent", "livecodebench", "[ 1 ]", [100]),
        ("recent", "livecodebench", "[PYTHON]\nassert f(x = 1) == [1][/PYTHON]", [100]),
        ("recent", "livecodebench", "f(x = 1)", [0]),
        ("recent", "livecodebench", "list((1,))", [0]),  # no literal
        ("recent", "math", "Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", [100]),
        ("recent", "math", "So $x = 3$ and $\\boxed{0.5}$.", [100]),
        ("recent", "math", "$\\boxed{2}$", [0]),
    ],
)
def test_an_answer_counts_as_in_its_original(suite, benchmark, answer, values, ask):
    scores, _ = ask(suite, benchmark, answer)
    assert [score.value for score in scores.scores] == pytest.approx(values, abs=1e-4)
    assert scores.settings["protocol"] == {"general": "open-instruct", "recent": "opencompass"}[suite]


def test_the_rows_that_open_instruct_draws():
    """random.seed(42), then random.sample of the rows, of TyDiQA's for one language after the other."""
    (gsm8k,) = draw_rows({"gsm8k": 1319}, 200, random.Random(42)).values()
    assert gsm8k[:8] == [1309, 228, 51, 563, 501, 457, 285, 209]
    random.seed(42)
    assert gsm8k == random.sample(range(1319), 200)
    tydiqa = draw_rows({"tydiqa_goldp_bn": 113, "tydiqa_goldp_ar": 921}, 100, random.Random(42))
    random.seed(42)
    assert tydiqa == {
        name: random.sample(range(n), 100) for name, n in (("tydiqa_goldp_ar", 921), ("tydiqa_goldp_bn", 113))
    }
    assert tydiqa["tydiqa_goldp_ar"][:5] == [654, 114, 25, 759, 281]


def test_a_paper_subset_is_scored_on_the_rows_drawn(ask):
    rows = {"gsm8k_test": [{"question": f"Row {i}", "answer": f"#### {i}"} for i in range(1319)]}
    scores, model = ask("general", "gsm8k", rows=rows, paper_subsets=True, limit=3)
    asked = [prompt.split("Question: Row ")[1].split("\n")[0] for prompt in model.prompts]
    assert asked == ["51", "228", "1309"]  # the first three that are drawn
    assert scores.find("gsm8k").n == 3


def test_a_mean_is_over_questions_or_subjects(ask):
    wrong = {"subject": "virology", "answer": 1}
    rows = {"mmlu_test": [QUESTION] * 3 + [QUESTION | wrong], "mmlu_dev": [*ROWS["mmlu_dev"], *[QUESTION | wrong] * 5]}
    assert ask("general", "mmlu_5shot", " C", rows)[0].scores[0].value == 75
    assert ask("recent", "mmlu", "C", rows)[0].scores[0].value == 50


def test_tydiqa_draws_its_example_after_its_rows_and_cuts_passages(ask, tokenizer):
    long = "Bern is far. " * 400
    dev = [{"language": "en", **BERN, "question": f"Row {i}?"} for i in range(150)]
    dev[0]["context"] = long
    train = [{"language": "en", **ROME, "question": f"Shot {i}?"} for i in range(30)]
    rows = {"tydiqa_dev": dev, "tydiqa_train": train}
    generator = random.Random(42)
    drawn, (shot,) = generator.sample(range(150), 100), generator.sample(range(30), 1)
    scores, subset = ask("general", "tydiqa", rows=rows, paper_subsets=True)
    assert scores.find("tydiqa").n == len(subset.prompts) == 100
    assert all(f"Question: Shot {shot}?" in prompt for prompt in subset.prompts)
    assert {int(prompt.split("Row ")[1].split("?")[0]) for prompt in subset.prompts} == set(drawn)
    _, model = ask("general", "tydiqa", rows=rows, limit=1)
    (first,) = random.Random(42).sample(range(30), 1)
    cut = tokenizer.decode(tokenizer.encode(long)[:512])
    assert f"Question: Shot {first}?\nAnswer: Rome\n\nPassage: {cut}\nQuestion: Row 0?" in model.prompts[0]
    assert len(cut) < len(long)


def test_a_template_without_words_is_no_chat_format(ask, tiny, tokenizer, tmp_path):
    """What TRACE trains on is the prompt and the answer, so a question is put as to a base model."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    for name, originals in (("raw", "base"), ("tulu", "chat")):
        (model / "chat_template.jinja").write_text((ROOT / f"hft/demo/templates/{name}.jinja").read_text())
        scores, stub = ask("general", "gsm8k", model=model, chat=None)
        assert scores.settings["chat"] == (originals == "chat")
        assert stub.prompts[0].removeprefix("<s>") == ORIGINALS["general"]["gsm8k"][originals][0]


LANGUAGES = ("arabic", "bengali", "english", "finnish", "indonesian", "korean", "russian", "swahili", "telugu")
PASSAGES = [{"id": f"{name}-1", "title": "", **BERN, "answers": {"text": ["Bern"]}} for name in LANGUAGES]
BAKING = {
    "activity_label": "Baking",
    "ctx_a": "He takes",
    "ctx_b": "flour",
    "endings": ["a", "b", "c", "d"],
    "label": "2",
}
HUB = {  # what the datasets on the Hub, or files elsewhere, have
    "cais/mmlu": {"test": ROWS["mmlu_test"], "dev": ROWS["mmlu_dev"]},
    "SaylorTwift/bbh": {"test": [{"input": "Which?", "target": "No"}]},
    "google-research-datasets/tydiqa": {"validation": PASSAGES, "train": PASSAGES},
    "EleutherAI/hendrycks_math": {"test": ROWS["math"], "train": ROWS["math"]},
    "openai/gsm8k": {"test": ROWS["gsm8k_test"]},
    "truthfulqa/truthful_qa": {"validation": ROWS["truthfulqa_mc"]},
    "Rowan/hellaswag": {"validation": [BAKING], "train": [BAKING]},
    "livecodebench/execution-v2": {"test": ROWS["execution"]},
    "csv": {"test": [{"question": "who wrote faust", "answers": "['Bern', \"Goethe's\"]"}]},
}


@pytest.mark.parametrize(
    ("suite", "benchmark", "answer", "n", "value"),
    [
        ("general", "mmlu_0shot", " C", 57, 100),
        ("general", "gsm8k", "1200", 1, 100),
        ("general", "bbh", "No", 27, 100),
        ("general", "tydiqa", "Bern", 9, 100),
        ("general", "truthfulqa", " Yes.", 1, 99.99546),
        ("recent", "hellaswag", "C", 1, 100),
        ("recent", "gsm8k", "1200", 1, 100),
        ("recent", "bbh", "No", 27, 100),
        ("recent", "nq", "Erfurt", 1, 0),  # has letters of the right answers
        ("recent", "triviaqa", "Bern", 1, 100),
        ("recent", "livecodebench", "[1]", 1, 100),
        ("recent", "math", "$\\boxed{1/2}$", 7, 100),
    ],
)
def test_rows_of_the_hub_are_read(suite, benchmark, answer, n, value, ask, monkeypatch):
    def load_dataset(path, **_):
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in HUB[path].items()})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    scores, _ = ask(suite, benchmark, answer, data=None)
    assert scores.scores[0].n == n
    assert scores.scores[0].value == pytest.approx(value)
