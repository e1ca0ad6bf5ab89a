"""What each method learns and forgets over six tasks: `make trace-mini`, or python benchmarks/trace_mini.py.

Pretrains a small Llama on docstrings and on facts made here, takes it through the tasks of trace_mini.yaml with `hft
continual`, once per arm, learning rate and seed, and writes a report. Rerun it to resume.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.functional import cross_entropy, kl_div
from tqdm import tqdm

HERE = Path(__file__).parent
OUT = Path("runs/trace-mini")
HELD_OUT = "held_out.json"  # beside the base: texts that it was not trained on
COLORS = ["red", "blue", "green", "black", "white", "gray", "pink", "gold"]
PLACES = ["north", "south", "east", "west", "coast", "river", "lake", "hill"]
# What is told about each name: the beginning of a sentence, and the words that may end it.
RELATIONS = {"color": ("The color of {} is", COLORS), "place": ("The home of {} is the", PLACES)}
Cell = tuple[str, float, int]


def facts(count: int) -> list[tuple[str, str, list[str]]]:
    """Beginnings of sentences about invented names, their endings, and the endings to choose from."""
    rng = random.Random("facts")
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    names = [a.capitalize() + b + c for a, b, c in itertools.product(*[syllables] * 3)]
    made = []
    for name in rng.sample(names, count // len(RELATIONS)):
        made += [(start.format(name), f" {rng.choice(endings)}", endings) for start, endings in RELATIONS.values()]
    return made


def texts() -> tuple[list[str], list[str]]:
    """Docstrings to pretrain on, and one in ten to hold out."""
    from hft.demo.data import docstring_chats

    all_texts = [row["messages"][1]["content"] for _, row in docstring_chats()]
    held_out = set(range(0, len(all_texts), 10))
    return [text for n, text in enumerate(all_texts) if n not in held_out], [all_texts[n] for n in sorted(held_out)]


def pretrain(keys: dict[str, Any], out: Path) -> Path:
    """A small Llama that knows the facts, in a folder named after what it was made with; made once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from hft.demo.tasks import WORDS

    folder = out / f"base-{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:8]}"
    if (folder / "model.safetensors").exists():
        return folder
    general, held_out = texts()
    sentences = [f"{start}{end}." for start, end, _ in facts(keys["facts"])]
    rng = random.Random(keys["seed"])
    lists = [" ".join(rng.sample(WORDS, 8)) + " " + " ".join(map(str, rng.sample(range(1000), 4))) for _ in range(500)]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=keys["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*general, *sentences, *lists], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    sizes = {key: keys[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    torch.manual_seed(keys["seed"])
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes))

    def packed(source: list[str]) -> torch.Tensor:
        """Texts one after the other, each between BOS and EOS, in rows of one length."""
        rng.shuffle(source)
        ids = [id for text in source for id in [1, *fast(text)["input_ids"], 2]]
        return torch.tensor(ids[: len(ids) // keys["length"] * keys["length"]]).view(-1, keys["length"])

    parts = [packed(general), packed(sentences * 20), packed(lists)]
    shares = torch.tensor([0.7 - keys["tasks"], 0.3, keys["tasks"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=keys["learning_rate"])
    for step in tqdm(range(keys["steps"]), desc="pretraining"):
        of = torch.multinomial(shares, keys["batch_size"], replacement=True)
        rows = torch.stack([parts[part][torch.randint(len(parts[part]), ())] for part in of.tolist()])
        rate = keys["learning_rate"] * min(1, step / 50) * (0.1 + 0.9 * (1 - step / keys["steps"]))
        optimizer.param_groups[0]["lr"] = rate
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    fast.save_pretrained(folder)
    (folder / HELD_OUT).write_text(json.dumps(held_out))
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def knowledge(model_folder: Path, base_folder: Path, keys: dict[str, Any]) -> dict[str, float]:
    """What a model kept: facts (share chosen right, loss of the right ending), loss on held-out text, KL from its base.

    Losses and KL(base || model) are in nats per token; both are over held-out docstrings.
    """
    from hft.evaluation.evaluate import Settings, open_lm, subject_of

    lm = open_lm(subject_of(str(model_folder)), Settings(dtype="float32", batch_size=1))
    model, tokenizer = lm.model.eval(), lm.tokenizer
    right, losses = 0, []
    for start, end, endings in facts(keys["facts"]):
        rows = [[1, *tokenizer(f"{start} {ending}.")["input_ids"]] for ending in endings]
        begins = 1 + len(tokenizer(start)["input_ids"])
        scored = [ending_loss(model, row, begins) for row in rows]
        answer = endings.index(end.strip())
        right += min(range(len(endings)), key=scored.__getitem__) == answer
        losses.append(scored[answer] / (len(rows[answer]) - begins))
    held_out = json.loads((base_folder / HELD_OUT).read_text())
    ids = [id for text in held_out for id in [1, *tokenizer(text)["input_ids"], 2]][: 64 * 64]
    ids = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    base = open_lm(subject_of(str(base_folder)), Settings(dtype="float32", batch_size=1)).model.eval()
    now, before = (each(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1) for each in (model, base))
    return {
        "facts": 100 * right / len(losses),
        "fact_loss": statistics.fmean(losses),
        "text_loss": float(cross_entropy(now, ids[:, 1:].flatten())),
        "kl": float(kl_div(now, before, log_target=True, reduction="batchmean")),
    }


def ending_loss(model: torch.nn.Module, ids: list[int], begins: int) -> float:
    """Minus the log-probability of a row's tokens from one on."""
    row = torch.tensor([ids])
    return float(cross_entropy(model(input_ids=row).logits[0, begins - 1 : -1], row[0, begins:], reduction="sum"))


def run_cell(cell: Cell, content: dict[str, Any], base: str, out: Path) -> dict[str, float]:
    """Take the base through the tasks and measure what came out, unless that is done. Its words go to a log file."""
    from hft.cli import main
    from hft.continual.matrix import Matrix

    arm, rate, seed = cell
    folder = out / f"{arm}-lr={rate:g}-seed={seed}"
    if (folder / "measured.json").exists():
        return json.loads((folder / "measured.json").read_text())
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    method, strategy, more = content["arms"][arm]
    keys = {"model_name_or_path": base, "learning_rate": rate, "strategy": strategy, "seed": seed} | more
    keys |= {"output_dir": str(folder)} | ({} if strategy == "lora" else {"selection_seed": seed})
    recipe = folder / "trace.yaml"
    recipe.write_text(yaml.safe_dump(content["sequence"] | keys, sort_keys=False))  # LoRA's factor is kept for files
    with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        status = main(["continual", "--config", str(recipe), f"recipes/methods/{method}.yaml"])
    if status:
        raise RuntimeError(f"{folder} failed, see its log.txt")
    matrix = Matrix.load(folder)
    found = matrix.summary()
    last = max(path for path in folder.glob("[0-9]*-*") if (path / "results.json").exists())
    with (folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        kept = knowledge(last, Path(base), content["pretrain"])
    learned = statistics.fmean(row[t] for t, row in enumerate(matrix.after_rounds))
    measured = {"op": found["op"][-1], "bwt": found["bwt"][-1], "learned": learned} | kept
    (folder / "measured.json").write_text(json.dumps(measured, indent=1))
    for weights in folder.glob("*/model.safetensors"):
        weights.unlink()  # 5 MB each, six in each of 72 sequences
    return measured


def cells(content: dict[str, Any]) -> Iterator[Cell]:
    """Arm, learning rate and seed of each sequence; a grid that is stopped early has whole seeds."""
    for seed, rate, arm in itertools.product(content["seeds"], content["learning_rates"], content["arms"]):
        yield arm, float(rate), seed


COLUMNS = {
    "op": "OP, %",
    "bwt": "BWT, %",
    "learned": "learned, %",
    "facts": "facts kept, %",
    "fact_loss": "fact loss",
    "text_loss": "text loss",
    "kl": "KL",
}


def report(results: dict[Cell, dict[str, float]], start: dict[str, float]) -> str:
    """All arms in a table, whether the bench tells them apart, and how HFT compares with FFT at its best rate."""
    groups: dict[tuple[str, float], list[dict[str, float]]] = {}
    for (arm, rate, _), measured in results.items():
        groups.setdefault((arm, rate), []).append(measured)

    def spread(rows: list[dict[str, float]], key: str) -> tuple[float, float]:
        values = [row[key] for row in rows]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan

    lines = ["| arm | learning rate | n | " + " | ".join(COLUMNS.values()) + " |", "| --- " * (len(COLUMNS) + 3) + "|"]
    told = [f"{start[key]:.2f}" if key in start else "" for key in COLUMNS]
    lines.append(f"| base | | | {' | '.join(told)} |")
    for (arm, rate), rows in sorted(groups.items(), key=lambda item: (list(dict(groups)).index(item[0]), item[0][1])):
        cells = ["{:.2f} ± {:.2f}".format(*spread(rows, key)) for key in COLUMNS]
        lines.append(f"| {arm} | {rate:g} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *told_apart(groups, spread), "", *hft_and_fft(groups, spread)])


def told_apart(groups: dict, spread) -> list[str]:
    """Pairs of arms at one rate that differ by more than twice the larger standard deviation over seeds."""
    lines = []
    for key, name in COLUMNS.items():
        pairs = [
            (a[0], b[0], a[1])
            for a, b in itertools.combinations(groups, 2)
            if a[1] == b[1]
            and min(len(groups[a]), len(groups[b])) > 1
            and abs(spread(groups[a], key)[0] - spread(groups[b], key)[0])
            > 2 * max(spread(groups[a], key)[1], spread(groups[b], key)[1])
        ]
        some = "; ".join(f"{a} and {b} at {rate:g}" for a, b, rate in pairs[:3])
        lines.append(f"- {name}: {len(pairs)} pairs of arms differ by more than two standard deviations. {some}")
    return ["Two seeds of one arm against two arms:", "", *lines]


def hft_and_fft(groups: dict, spread) -> list[str]:
    """HFT beside FFT, each at the learning rate of its best OP."""
    best = {}
    for arm in ("fft", "hft"):
        rates = [group for group in groups if group[0] == arm]
        best[arm] = max(rates, key=lambda group: spread(groups[group], "op")[0], default=None)
    if None in best.values():
        return []
    lines = []
    for key, name in COLUMNS.items():
        (a, sa), (b, sb) = (spread(groups[best[arm]], key) for arm in ("hft", "fft"))
        better = (a > b) == (key in ("op", "bwt", "learned", "facts"))
        clear = abs(a - b) > 2 * max(sa, sb)
        verdict = ("better" if better else "worse") if clear else "not told apart"
        lines.append(f"- {name}: HFT {a:.2f} ± {sa:.2f}, FFT {b:.2f} ± {sb:.2f}: {verdict}")
    rates = {arm: group[1] for arm, group in best.items()}
    return [f"HFT at {rates['hft']:g} beside FFT at {rates['fft']:g}, the rate of each one's best OP:", "", *lines]


def frontier(results: dict[Cell, dict[str, float]], path: Path) -> None:
    """What was kept against what was learned: a curve per arm over its learning rates, means over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    measures = {"text_loss": "text loss, nats/token", "kl": "KL, nats/token"}
    for axes, (key, name) in zip(figure.subplots(1, 2), measures.items(), strict=True):
        for arm in dict.fromkeys(cell[0] for cell in results):
            points = []
            for rate in sorted({cell[1] for cell in results}):
                rows = [row for (a, r, _), row in results.items() if (a, r) == (arm, rate)]
                points += [[statistics.fmean(row[k] for row in rows) for k in ("op", key)]] if rows else []
            axes.plot(*zip(*points, strict=True), marker="o", label=arm)
        axes.set(xlabel="OP, %", ylabel=name)
        axes.invert_yaxis()
        axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=Path, default=HERE / "trace_mini.yaml")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="sequences at once")
    options = parser.parse_args()
    from hft.demo.tasks import write_tasks

    content = yaml.safe_load(options.grid.read_text())
    write_tasks(content["sequence"]["trace_dir"])
    base = pretrain(content["pretrain"], options.out)
    start = knowledge(base, base, content["pretrain"])
    todo, results = list(cells(content)), {}
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = {cell: pool.submit(run_cell, cell, content, str(base), options.out) for cell in todo}
        for cell, future in tqdm(futures.items(), desc="sequences"):
            results[cell] = future.result()
    text = report(results, start)
    (options.out / "report.md").write_text(text + "\n")
    frontier(results, options.out / "frontier.png")
    print(text)


if __name__ == "__main__":
    main()
