"""The small setting: a Llama that is pretrained here, taught a rule and facts about people, and then other tasks."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from measure import Row, Rows
from tqdm import tqdm

from hft.jsonl import read_jsonl, write_jsonl

COLORS = ["red", "blue", "green", "black", "white", "gray", "pink", "gold"]
PLACES = ["north", "south", "east", "west", "coast", "river", "lake", "hill"]
JOBS = ["baker", "judge", "pilot", "nurse", "smith", "tailor", "clerk", "farmer"]
# What is told about each name: a question or the beginning of a sentence, and the words that may end it.
OLD = {"color": ("The color of {} is", COLORS), "place": ("The home of {} is the", PLACES)}
PEOPLE = {"job": ("What does {} do?\nAnswer:", JOBS), "town": ("Where was {} born?\nAnswer:", PLACES)}
EXAMPLE_WORDS = 12  # words of the dictionary that only the examples of the recovery hold; tests hold the others
TESTS, LENGTH = 96, 64
HELD_OUT = "held_out.json"  # texts; of the cells' data it is written last
RECOVERED = ("rule",)  # what the ten examples are of
Question = tuple[str, str, list[str]]  # beginning, right end, all ends


def questions(relations: dict[str, tuple[str, list[str]]], count: int) -> list[Question]:
    """`count` questions about invented names, always the same ones."""
    rng = random.Random("/".join(relations))
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    names = [a.capitalize() + b + c for a, b, c in itertools.product(*[syllables] * 3)]
    return [
        (start.format(name), f" {rng.choice(ends)}", [f" {end}" for end in ends])
        for name in rng.sample(names, count // len(relations))
        for start, ends in relations.values()
    ]


def translations(words: list[str], count: int) -> list[tuple[str, str]]:
    """The rule: two words in another language, whose dictionary only the rows tell, in reverse order."""
    from hft.demo.tasks import WORDS

    rng = random.Random("dictionary")
    syllables = ["".join(pair) for pair in itertools.product("bdgkmnptz", "aiou")]
    words_of_it = ["".join(pair) for pair in itertools.product(syllables, syllables)]
    foreign = dict(zip(WORDS, rng.sample(words_of_it, len(WORDS)), strict=True))
    pairs = rng.sample(list(itertools.permutations(words, 2)), count)
    return [(f"Say in Zog.\n{a} {b}\nAnswer:", f" {foreign[b]} {foreign[a]}") for a, b in pairs]


def rule_rows() -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[tuple[str, str]]]:
    """Rows to teach the rule with, to test it, and ten examples that share no word with the tests."""
    from hft.demo.tasks import WORDS

    examples = translations(WORDS[:: len(WORDS) // EXAMPLE_WORDS], 10)
    tests = translations([word for n, word in enumerate(WORDS) if n % (len(WORDS) // EXAMPLE_WORDS)], TESTS)
    taught = [pair for pair in translations(WORDS, len(WORDS) * (len(WORDS) - 1)) if pair not in {*tests, *examples}]
    return taught, tests, examples


def docstrings() -> tuple[list[str], list[str]]:
    """Texts to pretrain on, and one in ten to hold out."""
    from hft.demo.data import docstring_chats

    texts = [row["messages"][1]["content"] for _, row in docstring_chats()]
    return [text for n, text in enumerate(texts) if n % 10], texts[::10]


def make_start(content: dict[str, Any], out: Path) -> Path:
    """The model that every cell starts from; made once.

    OUT holds `pretrained` (knows docstrings and facts), `start` (taught the rule and the people as well), `data`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (out / "start").exists() and (out / "data" / HELD_OUT).exists():
        return out / "start"
    make, (general, held_out), (taught, *_) = content["make"], docstrings(), rule_rows()
    people = [(start, end) for start, end, _ in questions(PEOPLE, 2 * make["people"])]
    write_data(make, general, held_out, [*taught, *people * 10], out / "data")
    rows = ["".join(pair) for pair in [*taught, *people * 5]]
    if not (out / "pretrained").exists():
        model, tokenizer = new_model(make, general, rows)
        pretrain(model, tokenizer, make, make["pretrain"], general, [], out / "pretrained")
    if (out / "start").exists():
        return out / "start"
    model = AutoModelForCausalLM.from_pretrained(out / "pretrained")
    tokenizer = AutoTokenizer.from_pretrained(out / "pretrained")
    pretrain(model, tokenizer, make, make["teach"], general, rows, out / "start")
    return out / "start"


def write_data(make: dict[str, Any], general: list[str], held_out: list[str], old: list, folder: Path) -> None:
    """The cells' rows, old rows and texts to replay, and what is held out."""
    from hft.demo.tasks import write_tasks

    def row(prompt: str, answer: str) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": answer}],
        }

    write_tasks(folder / "tasks")
    files = {"old": [row(*pair) for pair in old], "texts": [row(*split_text(text)) for text in general[:1000]]}
    for name, split in (("new", "train"), ("tests", "test")):
        paths = [folder / "tasks" / task / f"{split}.json" for task in make["tasks"]]
        pairs = [pair for path in paths for pair in json.loads(path.read_text())]
        files[name] = [row(pair["prompt"], f" {pair['answer']}") for pair in pairs]
        rng = random.Random("rejected")
        files[f"{name}-pairs"] = [
            {
                "prompt": its["prompt"],
                "chosen": its["completion"],
                "rejected": [{"role": "assistant", "content": wrong(pair["prompt"], pair["answer"], rng)}],
            }
            for its, pair in zip(files[name], pairs, strict=True)
        ]
    for name, rows in files.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / HELD_OUT).write_text(json.dumps(held_out))


def wrong(prompt: str, answer: str, rng: random.Random) -> str:
    """A wrong answer of the same form: the right one with the two words swapped, or another letter."""
    first, second = prompt.splitlines()[1].split()
    swapped = re.sub(r"\w+", lambda word: {first: second, second: first}.get(word[0], word[0]), answer)
    return f" {swapped if swapped != answer else rng.choice([letter for letter in 'ABC' if letter != answer])}"


def split_text(text: str) -> tuple[str, str]:
    """A text as a prompt of three words and the rest."""
    words = text.split(" ")
    return " ".join(words[:3]), " " + " ".join(words[3:])


def with_replay(out: Path, share: float) -> Path:
    """The cells' rows, with a share of them replaced by rows of the teaching and texts of the pretraining."""
    data = out / "data"
    if not share:
        return data / "new.jsonl"
    path = data / f"new-replay-{share:g}.jsonl"
    rng, rows = random.Random("replay"), read_jsonl(data / "new.jsonl")
    old, texts = (rng.sample(read_jsonl(data / f"{name}.jsonl"), 100) for name in ("old", "texts"))
    for n, index in enumerate(rng.sample(range(len(rows)), round(share * len(rows)))):
        rows[index] = (old if n % 2 else texts)[n]
    write_jsonl(path, rows)
    return path


def new_model(make: dict[str, Any], general: list[str], rows: list[str]) -> tuple[Any, Any]:
    """A small Llama with random weights, and a tokenizer of all that it will read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=make["vocab_size"],
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*general, *sentences(make), *word_lists(), *rows], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    sizes = {key: make[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    torch.manual_seed(make["seed"])
    config = LlamaConfig(vocab_size=len(fast), bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config), fast


def sentences(make: dict[str, Any]) -> list[str]:
    return [f"{start}{end}." for start, end, _ in questions(OLD, make["facts"])]


def word_lists() -> list[str]:
    """Lists of the words and numbers that the tasks are about."""
    from hft.demo.tasks import WORDS

    rng = random.Random("lists")
    return [" ".join(rng.sample(WORDS, 8)) + " " + " ".join(map(str, rng.sample(range(1000), 4))) for _ in range(500)]


def pretrain(
    model: Any,
    tokenizer: Any,
    make: dict[str, Any],
    keys: dict[str, Any],
    general: list[str],
    rows: list[str],
    out: Path,
) -> None:
    """Train on docstrings, facts, lists and rows, packed and drawn in given shares, and save the model whole."""
    rng = random.Random(make["seed"])

    def packed(source: list[str]) -> torch.Tensor:
        """Texts one after the other, each between BOS and EOS, in rows of one length."""
        source = rng.sample(source, len(source))
        ids = [id for text in source for id in [1, *tokenizer(text)["input_ids"], 2]]
        return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)

    parts = [packed(part) for part in (general, sentences(make) * 20, word_lists(), rows * 4) if part]
    shares, rate = torch.tensor(keys["shares"]), keys["learning_rate"]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate)
    torch.manual_seed(make["seed"])
    for step in tqdm(range(keys["steps"]), desc=out.name):
        of = torch.multinomial(shares, keys["batch_size"], replacement=True)
        ids = torch.stack([parts[part][torch.randint(len(parts[part]), ())] for part in of.tolist()])
        optimizer.param_groups[0]["lr"] = rate * min(1, step / 50) * (0.1 + 0.9 * (1 - step / keys["steps"]))
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer.save_pretrained(part)
    model.save_pretrained(part)
    part.replace(out)


def probes(content: dict[str, Any], start: Path, out: Path) -> tuple[Rows, list[Row]]:
    """What every model is asked, and the examples of the recovery."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)

    def answer(prompt: str, end: str) -> Row:
        return answer_row(tokenizer, prompt, end)

    def choice(prompt: str, end: str, ends: list[str], stop: str) -> Row:
        before = [1, *tokenizer(prompt)["input_ids"]]
        all_ends = [end, *(other for other in ends if other != end)]
        ids = [[*before, *tokenizer(each + stop)["input_ids"]] for each in all_ends]
        return Row(ids[0], len(before), ids[1:])

    def pair(row: dict[str, Any]) -> tuple[str, str]:
        return row["prompt"][0]["content"], row["completion"][0]["content"]

    data, make = out / "data", content["make"]
    _, tests, examples = rule_rows()
    held_out = json.loads((data / HELD_OUT).read_text())
    texts = [id for text in held_out for id in [1, *tokenizer(text)["input_ids"], 2]]
    texts = [texts[n : n + LENGTH] for n in range(0, TESTS * LENGTH, LENGTH)]
    rows = {
        "rule": [answer(*pair) for pair in tests],
        "people": [choice(*question, "") for question in questions(PEOPLE, 2 * make["people"])],
        "facts": [choice(*question, ".") for question in questions(OLD, make["facts"])],
        "text": [Row(ids, 1) for ids in texts],
        "new": [answer(*pair(row)) for row in read_jsonl(data / "tests.jsonl")],
    }
    return rows, [answer(*pair) for pair in examples]


def answer_row(tokenizer: Any, prompt: str, end: str, *others: str) -> Row:
    before = [1, *tokenizer(prompt)["input_ids"]]
    ids = [[*before, *tokenizer(each)["input_ids"], 2] for each in (end, *others)]
    return Row(ids[0], len(before), ids[1:])


def pairs(content: dict[str, Any], start: Path, out: Path) -> list[Row]:
    """Held-out rows of the new tasks, each with its right answer and a wrong one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    columns = ("prompt", "chosen", "rejected")
    rows = read_jsonl(out / "data" / "tests-pairs.jsonl")
    return [answer_row(tokenizer, *(row[column][0]["content"] for column in columns)) for row in rows]


def references(start: Path) -> dict[str, Path]:
    """Models that no cell trains: before the teaching, and after it."""
    return {"pretrained": start.with_name("pretrained"), "start": start}


def data_keys(out: Path, replay: float, objective: str) -> dict[str, Any]:
    path = with_replay(out, replay) if objective == "sft" else out / "data" / "new-pairs.jsonl"
    return {"dataset_name": str(path), "dataset_test_split": None}


def keys_of(methods: list[str], out: Path) -> dict[str, Any]:
    """What a method needs of this setting."""
    return {"importance_data": str(out / "data" / "texts.jsonl")} if "importance" in methods else {}
