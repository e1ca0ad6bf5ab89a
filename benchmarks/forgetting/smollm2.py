"""The setting on real text: SmolLM2-135M learns word problems (reasoning_gym's gsm_symbolic, arXiv 2505.24760)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from measure import Row, Rows
from tqdm import tqdm

from hft.jsonl import read_jsonl, write_jsonl

TRAIN_ROWS, TEST_ROWS = 4000, 64
SHORT = 400  # characters of the problems that DPO learns from
RECOVERED = ()  # it is not taught anything first


def make_start(content: dict[str, Any], out: Path) -> Path:
    """The released model, with the cells' rows in OUT/data; they are made once."""
    if not (out / "data" / "tests-pairs.jsonl").exists():
        import reasoning_gym

        problems = reasoning_gym.create_dataset("gsm_symbolic", size=TRAIN_ROWS + TEST_ROWS, seed=0)
        rows = [
            {
                "messages": [
                    {"role": "user", "content": problem["question"]},
                    {"role": "assistant", "content": problem["metadata"]["answer_cot"]},
                ]
            }
            for problem in tqdm(problems, desc="word problems")
        ]
        (out / "data").mkdir(parents=True, exist_ok=True)
        write_jsonl(out / "data" / "new.jsonl", rows[TEST_ROWS:])
        write_jsonl(out / "data" / "tests.jsonl", rows[:TEST_ROWS])
        compared = [preference(row, n) for n, row in enumerate(rows) if length(row) < SHORT]
        write_jsonl(out / "data" / "new-pairs.jsonl", compared[TEST_ROWS:])
        write_jsonl(out / "data" / "tests-pairs.jsonl", compared[:TEST_ROWS])
    (out / "start").mkdir(exist_ok=True)
    return Path(content["model"]).resolve()


def length(row: dict[str, Any]) -> int:
    return sum(len(message["content"]) for message in row["messages"])


def preference(row: dict[str, Any], seed: int) -> dict[str, Any]:
    """A problem with its answer, and with the answer in which one digit is another."""
    question, answer = row["messages"]
    text, rng = answer["content"], random.Random(seed)
    at = rng.choice([n for n, letter in enumerate(text) if letter.isdigit()])
    wrong = text[:at] + rng.choice("123456789".replace(text[at], "")) + text[at + 1 :]
    return {"prompt": [question], "chosen": [answer], "rejected": [answer | {"content": wrong}]}


def references(start: Path) -> dict[str, Path]:
    return {"start": start}


def data_keys(out: Path, replay: float, objective: str) -> dict[str, Any]:
    if replay:
        raise SystemExit("replay is an arm of the mini size only")
    name = "new.jsonl" if objective == "sft" else "new-pairs.jsonl"
    return {"dataset_name": str(out / "data" / name), "dataset_test_split": None}


def keys_of(methods: list[str], out: Path) -> dict[str, Any]:
    return {}


def tokenizer_of(content: dict[str, Any], start: Path) -> Any:
    """The model's tokenizer with the chat template that the cells train on."""
    from transformers import AutoTokenizer

    from hft.runs.config import find_template

    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = Path(find_template(content["train"]["chat_template_path"])).read_text()
    return tokenizer


def row_of(tokenizer: Any, context: str, answer: str, *others: str) -> Row:
    before = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
    ids = [[*before, *tokenizer(text)["input_ids"]] for text in (answer, *others)]
    return Row(ids[0], len(before), ids[1:])


def probes(content: dict[str, Any], start: Path, out: Path) -> tuple[Rows, list[Row]]:
    """Held-out problems, general texts and facts: the rows of `hft eval --suite quick`."""
    from hft.evaluation.rows import answer_rows, general_texts
    from hft.evaluation.tasks.quick import facts

    tokenizer, limit = tokenizer_of(content, start), content["limit"]
    texts, problems = general_texts()[:limit], read_jsonl(out / "data" / "tests.jsonl")[:limit]
    questions = [q for make in (facts.capitals, facts.currencies, facts.elements) for q in list(make()["test"])[:limit]]
    rows = {
        "new": [row_of(tokenizer, its["context"], its["answer"]) for its in answer_rows(problems, tokenizer)],
        "text": [row_of(tokenizer, "", text) for text in texts],
        "facts": [],
    }
    for question in questions:
        ends = [f" {choice}" for choice in question["choices"]]
        rows["facts"].append(row_of(tokenizer, question["prompt"], ends.pop(question["label"]), *ends))
    return rows, []


def pairs(content: dict[str, Any], start: Path, out: Path) -> list[Row]:
    """Held-out problems, each with its right answer and a wrong one."""
    from hft.evaluation.rows import answer_rows

    tokenizer, rows = tokenizer_of(content, start), read_jsonl(out / "data" / "tests-pairs.jsonl")
    chosen = answer_rows(rows, tokenizer)
    rejected = answer_rows([row | {"chosen": row["rejected"]} for row in rows], tokenizer)
    return [
        row_of(tokenizer, its["context"], its["answer"], other["answer"])
        for its, other in zip(chosen, rejected, strict=True)
    ]
