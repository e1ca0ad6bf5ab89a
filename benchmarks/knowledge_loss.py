"""Loss of models on a task and on closed-book questions: python knowledge_loss.py DATA MODEL [MODEL ...].

DATA is a folder with gsm8k_test.jsonl (question, answer), triviaqa.jsonl (question, answers) and wikidata_cloze.jsonl
(prompt, answers). Each loss is the mean over rows of the mean negative log-likelihood of the answer's tokens.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft.runs.config import find_template

TEMPLATE = Path(find_template("smollm2.jinja")).read_text()


def rows(path: Path, count: int) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")][:count]


def pieces(data: Path, tokenizer, counts: dict[str, int]) -> dict[str, list[tuple[list[int], int]]]:
    """Token ids of each row with the number of tokens of its prompt."""
    found = {"task": [], "trivia": [], "wikidata": []}
    for row in rows(data / "gsm8k_test.jsonl", counts["task"]):
        user = [{"role": "user", "content": row["question"]}]
        both = [*user, {"role": "assistant", "content": row["answer"]}]
        options = {"chat_template": TEMPLATE, "tokenize": True, "return_dict": True}
        prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, **options)["input_ids"]
        found["task"].append((tokenizer.apply_chat_template(both, **options)["input_ids"], len(prompt)))
    questions = [
        (f"Question: {row['question']}\nAnswer:", row["answers"][0], "trivia")
        for row in rows(data / "triviaqa.jsonl", counts["trivia"])
    ]
    questions += [
        (row["prompt"], row["answers"][0], "wikidata")
        for row in rows(data / "wikidata_cloze.jsonl", counts["wikidata"])
    ]
    for prompt, answer, kind in questions:
        start = tokenizer(prompt)["input_ids"]
        found[kind].append((start + tokenizer(f" {answer}")["input_ids"], len(start)))
    return found


@torch.no_grad()
def losses(model, examples: list[tuple[list[int], int]], pad: int, name: str) -> torch.Tensor:
    """The mean loss of each row's answer."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    result = torch.zeros(len(examples))
    for start in tqdm(range(0, len(order), 16), desc=name, leave=False):
        batch = order[start : start + 16]
        length = max(len(examples[i][0]) for i in batch)
        ids = torch.tensor([examples[i][0] + [pad] * (length - len(examples[i][0])) for i in batch])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).logits
        each = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        for row, i in enumerate(batch):
            tokens, prompt = examples[i]
            result[i] = each[row, prompt - 1 : len(tokens) - 1].mean()
    return result


parser = argparse.ArgumentParser()
parser.add_argument("data", type=Path)
parser.add_argument("models", nargs="+")
parser.add_argument("--counts", nargs=3, type=int, default=[150, 500, 750])
arguments = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(arguments.models[0])
examples = pieces(arguments.data, tokenizer, dict(zip(("task", "trivia", "wikidata"), arguments.counts, strict=True)))
first: dict[str, torch.Tensor] = {}
print("| model | " + " | ".join(f"{kind} (n = {len(found)})" for kind, found in examples.items()) + " |")
print("| --- |" + " --- |" * len(examples))
for name in arguments.models:
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    cells = []
    for kind, found in examples.items():
        loss = losses(model, found, tokenizer.pad_token_id or 0, f"{name}, {kind}")
        change = loss - first.setdefault(kind, loss)
        error = change.std() / math.sqrt(len(change))
        cells.append(f"{loss.mean():.3f} ({change.mean():+.3f} ± {error:.3f})")
    print(f"| {Path(name).name} | " + " | ".join(cells) + " |", flush=True)
