"""Code tasks: an answer is read as its reader would, in the prompts of the paper's evaluations."""

import json
import shutil
from textwrap import indent

import pytest
import torch
from lm_eval.api.model import LM
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from hft.cli import main
from hft.evaluation.engine import Reader
from hft.evaluation.evaluate import Settings, evaluate
from hft.evaluation.tasks.code.code import pass_at, with_instructions
from hft.record.scores import rows_of, scores_of
from tests.conftest import write_jsonl

PROBLEMS = [
    {
        "task_id": "HumanEval/0",
        "prompt": "from typing import List\n\n\ndef running_best(scores: List[int]) -> List[int]:\n"
        '    """ The best score so far, after each game.\n    >>> running_best([3, 1, 4])\n    [3, 3, 4]\n    """\n',
        "canonical_solution": "    best = []\n    for score in scores:\n"
        "        best.append(max(best[-1:] + [score]))\n    return best\n",
        "entry_point": "running_best",
        "test": "def check(candidate):\n    assert candidate([3, 1, 4]) == [3, 3, 4]\n    assert candidate([]) == []\n",
        "instruction": "Write a Python function `running_best(scores: List[int]) -> List[int]` to solve the problem.",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": "def is_even(n):\n    return n % 2 == 0\n\n\ndef count_even(numbers):\n"
        "    '''How many numbers are even, by is_even.\n    >>> count_even([1, 2, 4])\n    2\n    '''\n",
        "canonical_solution": "    return sum(map(is_even, numbers))\n",
        "entry_point": "count_even",
        "test": "def check(candidate):\n    assert candidate([1, 2, 4]) == 2\n    assert candidate([]) == 0\n",
        "instruction": "Write a Python function `count_even(numbers)` to solve the problem.",
    },
]
MBPP = [
    {
        "task_id": 11,
        "text": "Write a function to join words with a dash.",
        "code": "def join_words(words):\n    return '-'.join(words)",
        "test_list": ["assert join_words(['a', 'b']) == 'a-b'", "assert join_words([]) == ''"],
    },
    {
        "task_id": 12,
        "text": "Write a function to halve a number.",
        "code": "def halve(number):\n    return number / 2",
        "test_list": ["assert halve(3) == 1.5"],
    },
]
HELPERS = (
    "import math\nfrom typing import List\n\n\ndef same(x):\n    return x if LIMIT else None\n\n\n"
    "LIMIT = len(\n    [3]\n)\n\n\n"
)
AFTER = "\nThis loops once.\nComplexity: O(n)\n\nDone"
# An answer from the head of a function, its body, and the code that has neither around it.
STYLES = {
    "continuation": lambda head, body: body,
    "continuation that closes its block": lambda head, body: f"{body}```\n{AFTER}\n```python\nprint(1)\n```",
    "block in a list": lambda head, body: f"1. Like this:\n   ```\n{indent(head + body, '   ')}   ```",
    "whole function": lambda head, body: head + body,
    "block": lambda head, body: f"```python\n{head}{body}```",
    "after a lead-in": lambda head, body: f"Here is the completed function:\n\n{head}{body}",
    "block with imports and helpers": lambda head, body: (
        f" Sure!\n\n```python\n{HELPERS}{head}{body}```\n{AFTER}\n```python\nprint(1)\n```"
    ),
    "text after": lambda head, body: f"\n{HELPERS}@same\n{head}{body}{AFTER}",
}
# task: its suite and the number of answers to each row
TASKS = {"humaneval": ("general", 20), "humaneval_greedy": ("recent", 1), "mbpp": ("recent", 1)}


@pytest.fixture
def rows(tmp_path):
    write_jsonl(tmp_path / "humaneval.jsonl", PROBLEMS)
    write_jsonl(tmp_path / "mbpp_test.jsonl", MBPP)
    return tmp_path


class Answers(LM):
    """A model that knows the solution of each row, right or wrong, and answers two rows in each style."""

    tokenizer_name = "none"

    def __init__(self, styles, right):
        super().__init__()
        self.styles, self.right, self.prompts = list(styles), right, []

    def generate_until(self, requests):
        self.prompts += [request.args[0] for request in requests]
        return [self.answer(request.doc, self.styles[request.doc_id // 2]) for request in requests]

    def answer(self, row, style):
        if "code" in row:
            head, body = row["code"].splitlines(keepends=True)
        else:
            head, body = row["prompt"][row["prompt"].index(f"def {row['entry_point']}") :], row["canonical_solution"]
        if not self.right:
            body = "    pass\n"
        if "code" in row and style == "continuation":
            return f" '{head}{body}' \n"
        if "code" in row and style == "continuation that closes its block":
            return f"Sure.\n[BEGIN]\n '{head}{body}' \n[DONE]\n{AFTER}".replace("_", "\\_")
        return STYLES[style](head, body)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return "".join(f"<{message['role']}>{message['content']}" for message in chat_history)

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def score_of(task, lm, tiny, rows, monkeypatch, out=None, **settings):
    monkeypatch.setattr("hft.evaluation.engine.open_lm", lambda *_: lm)
    settings = Settings(tasks=(task,), data=str(rows), allow_code=True, **settings)
    return evaluate(str(tiny), TASKS[task][0], settings, out).find(task)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_right_answers_score_100_in_every_style_and_wrong_ones_0(task, chat, tiny, rows, monkeypatch):
    monkeypatch.setattr("hft.evaluation.sandbox.passes", runs_quickly)
    write_jsonl(rows / "humaneval.jsonl", PROBLEMS * len(STYLES))
    write_jsonl(rows / "mbpp_test.jsonl", MBPP * len(STYLES))
    for right in (True, False):
        lm = Answers(STYLES, right)
        score_of(task, lm, tiny, rows, monkeypatch, rows, chat=chat)
        scored = rows_of(rows, TASKS[task][0], task)
        assert scored["pass@1"].tolist() == [100 * right] * 2 * len(STYLES)
        assert len(lm.prompts) == len(scored) * TASKS[task][1]
        shutil.rmtree(rows / "scores")


def runs_quickly(program: str) -> bool:
    """What the sandbox decides, for code of this test."""
    try:
        exec(program, {})
    except (AssertionError, SyntaxError, NameError, TypeError):
        return False
    return True


def test_the_sandbox_decides(tiny, rows, monkeypatch):
    for right in (True, False):
        score = score_of("humaneval_greedy", Answers(["block"], right), tiny, rows, monkeypatch, chat=True)
        assert score.value == 100 * right


@pytest.fixture(scope="module")
def reader(tiny) -> Reader:
    return Reader(pretrained=str(tiny), device="cpu", dtype="float32")


def prompts_of(task, tiny, rows, monkeypatch, reader, chat) -> list[str]:
    """What a model with TULU's template is asked, with the first row first."""
    asked = []

    def generate_until(requests):
        asked.extend(request.args[0] for request in requests)
        return [""] * len(requests)

    monkeypatch.setattr(reader, "generate_until", generate_until)
    monkeypatch.setattr("hft.evaluation.engine.open_lm", lambda *_: reader)
    settings = Settings(tasks=(task,), data=str(rows), chat=chat, allow_code=True, limit=1)
    evaluate(str(tiny), TASKS[task][0], settings)
    return asked


def test_prompts_are_those_of_open_instruct_and_opencompass(tiny, rows, monkeypatch, reader):
    problem = PROBLEMS[0]
    ask = lambda task, chat: prompts_of(task, tiny, rows, monkeypatch, reader, chat)[0]  # noqa: E731
    assert ask("humaneval", False) == problem["prompt"]
    start = "Here is the function:\n\n```python\n" + problem["prompt"]
    assert ask("humaneval", True) == f"<s><|user|>\n{problem['instruction']}\n<|assistant|>\n{start}"

    read = (
        "Read the following function signature and docstring, and fully implement the function described. "
        "Your response should only contain the code for this function.\n"
    )
    assert ask("humaneval_greedy", False) == read + problem["prompt"]
    assert ask("humaneval_greedy", True) == f"<s><|user|>\n{(read + problem['prompt']).strip()}\n<|assistant|>\n"

    question = (
        "You are an expert Python programmer, and here is your task: Write a function to join words with a dash. "
        "Your code should pass these tests:\n\n assert join_words(['a', 'b']) == 'a-b'\nassert join_words([]) == ''  \n"
    )
    bare, chat = ask("mbpp", False), ask("mbpp", True)
    assert bare.endswith(f"\n[DONE] \n\n \n{question}\n[BEGIN]\n")
    assert bare.count("[BEGIN]\n 'import math\r\ndef is_not_prime(n):\r\n") == 1
    assert bare.count("here is your task") == 4
    assert chat.endswith(f"<|user|>\n{question.strip()}\n<|assistant|>\n")
    assert [chat.count(f"<|{role}|>") for role in ("user", "assistant")] == [4, 4]


def test_a_row_without_an_instruction_is_asked_to_complete_the_function(tiny, rows, monkeypatch, reader):
    problem = {key: value for key, value in PROBLEMS[1].items() if key != "instruction"}
    write_jsonl(rows / "humaneval.jsonl", [problem])
    prompt = prompts_of("humaneval", tiny, rows, monkeypatch, reader, chat=True)[0]
    asked = f"Complete the following python function.\n\n\n{problem['prompt']}".strip()
    assert prompt.startswith(f"<s><|user|>\n{asked}\n<|assistant|>\nHere is the function:")


def test_each_problem_gets_its_instruction_from_humanevalpack(tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    pack = [{"task_id": f"Python/{n}", "instruction": f"Do {n}."} for n in (1, 0)]
    problems = DatasetDict(test=Dataset.from_list([{"task_id": f"HumanEval/{n}"} for n in (0, 1)]))
    hub = {"json": Dataset.from_list(pack), "openai/openai_humaneval": problems}
    monkeypatch.setattr("datasets.load_dataset", lambda name, **_: hub[name])
    assert with_instructions(version=2)["test"]["instruction"] == ["Do 0.", "Do 1."]


def test_a_llama_tokenizer_keeps_the_indent_of_an_answer(tmp_path, rows):
    """Its decoder drops a blank where a text begins; a model that is right must score 100."""
    folder = tmp_path / "llama"
    read = "Read the following function signature and docstring, and fully implement the function described. "
    read += "Your response should only contain the code for this function.\n"
    pairs = [(start + row["prompt"], row["canonical_solution"]) for row in PROBLEMS for start in ("", read)]
    tokenizer = llama_tokenizer(["".join(pair) for pair in pairs])
    sequences = [tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id] for prompt, answer in pairs]
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt", padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(200):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert isinstance(AutoTokenizer.from_pretrained(folder), LlamaTokenizer)
    words = ["--data", str(rows), "--allow_code", "--max_gen_toks", "64"]
    for task, (suite, _) in list(TASKS.items())[:2]:
        assert main(["eval", str(folder), "--suite", suite, "--tasks", task, *words]) == 0
        assert scores_of(folder)[suite].find(task).value == 100


def llama_tokenizer(texts: list[str]) -> LlamaTokenizer:
    """Transformers' class with a vocabulary of a few hundred pieces, as SentencePiece would learn them."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    learned.train_from_iterator([text.replace(" ", "▁") for text in texts], trainer)
    pieces = json.loads(learned.to_str())["model"]
    merges = [tuple(pair) for pair in pieces["merges"]]
    return LlamaTokenizer(vocab=pieces["vocab"], merges=merges, pad_token="<unk>")


def test_an_answer_is_decoded_behind_its_prompt(reader):
    assert reader.tok_decode(reader.tokenizer.encode(" a b , c", add_special_tokens=False)) == " a b , c"
    assert reader.tok_decode(reader.eot_token_id, skip_special_tokens=False) == "</s>"


def test_a_forced_start_follows_a_template_that_ends_without_a_blank(reader, monkeypatch):
    template = "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    monkeypatch.setattr(reader.tokenizer, "chat_template", template)
    start = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A: \n"}]
    assert reader.apply_chat_template(start, add_generation_prompt=False) == "[INST]Q[/INST] A: \n"


def test_pass_at_k_is_the_unbiased_estimate():
    programs = ["assert True"] * 2 + ["assert False"] * 3
    assert pass_at(programs, (1, 2, 10)) == pytest.approx({"pass@1": 2 / 5, "pass@2": 1 - 3 / 10})
