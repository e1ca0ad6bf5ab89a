"""The small setting: a Llama that is pretrained here, taught a rule and facts about people, and then other tasks."""

from __future__ import annotations

import itertools
import json
import random
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
TESTS = 96
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
    """The model that every cell starts from, with the cells' data beside it; made once.

    OUT holds `pretrained` (knows docstrings and facts), `start` (taught the rule and the people as well), `data`.
    """
    from hft.runs.config import load_config
    from hft.runs.plan import make_plan
    from hft.runs.train import train

    start = out / "start"
    if (start / "results.json").exists():
        return start
    general, held_out = docstrings()
    make, taught = content["make"], rule_rows()[0]
    write_data(make, general, held_out, taught, out / "data")
    pretrain(make, general, [text for pair in taught for text in pair], out / "pretrained")
    keys = (
        content["train"] | content["teach"] | {"model_name_or_path": str(out / "pretrained"), "output_dir": str(start)}
    )
    keys |= {"dataset_name": str(out / "data" / "teach.jsonl"), "dataset_test_split": None, "output_dir": str(start)}
    (out / "teach.json").write_text(json.dumps(keys))  # JSON is YAML
    train(make_plan(load_config("sft", out / "teach.json", "fft")))
    return start


def write_data(make: dict[str, Any], general: list[str], held_out: list[str], taught: list, folder: Path) -> None:
    """Rows to teach with, rows of the cells with and without old ones among them, and texts."""
    from hft.demo.tasks import write_tasks

    def row(prompt: str, answer: str) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": answer}],
        }

    people = [(start, end) for start, end, _ in questions(PEOPLE, 2 * make["people"])]
    teach = [row(*pair) for pair in taught + people * (len(taught) // len(people))]
    write_tasks(folder / "tasks")
    files = {"teach": teach, "texts": [row(*split_text(text)) for text in general[:1000]]}
    for name, split in (("new", "train"), ("tests", "test")):
        paths = [folder / "tasks" / task / f"{split}.json" for task in make["tasks"]]
        pairs = [pair for path in paths for pair in json.loads(path.read_text())]
        files[name] = [row(pair["prompt"], f" {pair['answer']}") for pair in pairs]
    for name, rows in files.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / "held_out.json").write_text(json.dumps(held_out))


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
    old, texts = (rng.sample(read_jsonl(data / f"{name}.jsonl"), 100) for name in ("teach", "texts"))
    for n, index in enumerate(rng.sample(range(len(rows)), round(share * len(rows)))):
        rows[index] = (old if n % 2 else texts)[n]
    write_jsonl(path, rows)
    return path


def pretrain(make: dict[str, Any], general: list[str], words: list[str], folder: Path) -> None:
    """A small Llama and its tokenizer, on docstrings, sentences of the facts, and lists of the tasks' words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from hft.demo.tasks import WORDS

    sentences = [f"{start}{end}." for start, end, _ in questions(OLD, make["facts"])]
    rng = random.Random(make["seed"])
    lists = [" ".join(rng.sample(WORDS, 8)) + " " + " ".join(map(str, rng.sample(range(1000), 4))) for _ in range(500)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=make["vocab_size"],
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*general, *sentences, *lists, *words], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    sizes = {key: make[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    torch.manual_seed(make["seed"])
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes))

    def packed(source: list[str]) -> torch.Tensor:
        """Texts one after the other, each between BOS and EOS, in rows of one length."""
        rng.shuffle(source)
        ids = [id for text in source for id in [1, *fast(text)["input_ids"], 2]]
        return torch.tensor(ids[: len(ids) // make["length"] * make["length"]]).view(-1, make["length"])

    parts, shares = [packed(general), packed(sentences * 20), packed(lists)], torch.tensor([0.6, 0.3, 0.1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=make["learning_rate"])
    for step in tqdm(range(make["steps"]), desc="pretraining"):
        of = torch.multinomial(shares, make["batch_size"], replacement=True)
        rows = torch.stack([parts[part][torch.randint(len(parts[part]), ())] for part in of.tolist()])
        rate = make["learning_rate"] * min(1, step / 50) * (0.1 + 0.9 * (1 - step / make["steps"]))
        optimizer.param_groups[0]["lr"] = rate
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    shutil.rmtree(folder, ignore_errors=True)
    fast.save_pretrained(folder)
    model.save_pretrained(folder)


def probes(content: dict[str, Any], start: Path, out: Path) -> tuple[Rows, list[Row]]:
    """What every model is asked, and the examples of the recovery."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)

    def answer(prompt: str, end: str) -> Row:
        before = [1, *tokenizer(prompt)["input_ids"]]
        return Row([*before, *tokenizer(end)["input_ids"], 2], len(before))

    def choice(prompt: str, end: str, ends: list[str], stop: str) -> Row:
        before = [1, *tokenizer(prompt)["input_ids"]]
        all_ends = [end, *(other for other in ends if other != end)]
        ids = [[*before, *tokenizer(each + stop)["input_ids"]] for each in all_ends]
        return Row(ids[0], len(before), ids[1:])

    def pair(row: dict[str, Any]) -> tuple[str, str]:
        return row["prompt"][0]["content"], row["completion"][0]["content"]

    data, make = out / "data", content["make"]
    _, tests, examples = rule_rows()
    held_out = json.loads((data / "held_out.json").read_text())
    texts = [id for text in held_out for id in [1, *tokenizer(text)["input_ids"], 2]]
    texts = [texts[n : n + 64] for n in range(0, TESTS * 64, 64)]
    rows = {
        "rule": [answer(*pair) for pair in tests],
        "people": [choice(*question, "") for question in questions(PEOPLE, 2 * make["people"])],
        "facts": [choice(*question, ".") for question in questions(OLD, make["facts"])],
        "text": [Row(ids, 1) for ids in texts],
        "new": [answer(*pair(row)) for row in read_jsonl(data / "tests.jsonl")],
    }
    return rows, [answer(*pair) for pair in examples]


def references(start: Path) -> dict[str, Path]:
    """Models that no cell trains: before the teaching, and after it."""
    return {"pretrained": start.with_name("pretrained"), "start": start}


def data_keys(out: Path, replay: float) -> dict[str, Any]:
    return {"dataset_name": str(with_replay(out, replay)), "dataset_test_split": None}


def keys_of(methods: list[str], out: Path) -> dict[str, Any]:
    """What a method needs of this setting."""
    return {"importance_data": str(out / "data" / "texts.jsonl")} if "importance" in methods else {}
