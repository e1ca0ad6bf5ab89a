"""The setting on real text: SmolLM2-135M learns word problems (reasoning_gym's gsm_symbolic, arXiv 2505.24760)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from measure import Row, Rows
from tqdm import tqdm

from hft.jsonl import read_jsonl, write_jsonl

TRAIN_ROWS, TEST_ROWS = 4000, 64
RECOVERED = ()  # it is not taught anything first


def make_start(content: dict[str, Any], out: Path) -> Path:
    """The released model, with the cells' rows in OUT/data; they are made once."""
    if not (out / "data" / "tests.jsonl").exists():
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
    (out / "start").mkdir(exist_ok=True)
    return Path(content["model"]).resolve()


def references(start: Path) -> dict[str, Path]:
    return {"start": start}


def data_keys(out: Path, replay: float, objective: str) -> dict[str, Any]:
    if replay:
        raise SystemExit("replay is an arm of the mini size only")
    return {"dataset_name": str(out / "data" / "new.jsonl"), "dataset_test_split": None}


def keys_of(methods: list[str], out: Path) -> dict[str, Any]:
    return {}


def probes(content: dict[str, Any], start: Path, out: Path) -> tuple[Rows, list[Row]]:
    """Held-out problems, general texts and facts: the rows of `hft eval --suite quick`."""
    from transformers import AutoTokenizer

    from hft.evaluation.rows import answer_rows, general_texts
    from hft.evaluation.tasks.quick import facts
    from hft.runs.config import find_template

    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = Path(find_template(content["train"]["chat_template_path"])).read_text()
    limit = content["limit"]

    def row(context: str, answer: str, *others: str) -> Row:
        before = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
        ids = [[*before, *tokenizer(text)["input_ids"]] for text in (answer, *others)]
        return Row(ids[0], len(before), ids[1:])

    texts, problems = general_texts()[:limit], read_jsonl(out / "data" / "tests.jsonl")[:limit]
    questions = [q for make in (facts.capitals, facts.currencies, facts.elements) for q in list(make()["test"])[:limit]]
    rows = {
        "new": [row(its["context"], its["answer"]) for its in answer_rows(problems, tokenizer)],
        "text": [row("", text) for text in texts],
        "facts": [],
    }
    for question in questions:
        ends = [f" {choice}" for choice in question["choices"]]
        rows["facts"].append(row(question["prompt"], ends.pop(question["label"]), *ends))
    return rows, []
