"""Train the predictor of the smartfrz schedule (`hft.methods.smartfrz`) and write its weights into the package.

    python benchmarks/train_smartfrz.py        # some minutes on 2 CPU cores; the seeds are fixed

Random Llamas of 4 and 8 layers are trained on half of the demo data for a while, then fine-tuned in full on the other
half, at several learning rates and under several schedules. A layer may freeze when the representation that it hands on
has come most of its way: when the distance 1 - CKA to the representation at the end of the run is at most `REMAINING`
of what it was at the beginning. Linear CKA (arXiv 1905.00414) is measured on held-out tokens.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, get_scheduler

from hft.demo.data import docstring_chats
from hft.demo.models import make_tiny
from hft.methods.smartfrz import (
    PREDICTOR_WEIGHTS,
    RECORDINGS,
    WINDOW,
    Predictor,
    describe_window,
    sample,
    step_norms,
)
from hft.model.anatomy import anatomy_of

SIZES = ((4, 128), (8, 64))  # layers, width
RATES = (3e-4, 1e-3, 3e-3)
SCHEDULES = ("linear", "cosine", "constant_with_warmup")
STEPS, INTERVALS, BATCH, LENGTH, PRETRAINING = 50, 10, 8, 64, 150
REMAINING = 0.1


def token_blocks(folder: Path) -> torch.Tensor:
    """The demo data as rows of `LENGTH` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [message["content"] for _, row in docstring_chats() for message in row["messages"]]
    tokens = [token for ids in tokenizer(texts)["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    return torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)


def train(model: PreTrainedModel, rows: torch.Tensor, rate: float, schedule: str, steps: int, seed: int):
    """Fine-tune everything; yields the number of each step before it is taken, and `steps` at the end."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    for step in range(steps):
        yield step
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    yield steps


def cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """Linear CKA of two sets of representations `(tokens, width)`."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    return float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))


@torch.no_grad()
def representations(model: PreTrainedModel, probe: torch.Tensor) -> list[torch.Tensor]:
    """What each layer hands on for held-out tokens, `(tokens, width)`."""
    states = model(input_ids=probe, output_hidden_states=True).hidden_states
    return [state.flatten(0, 1) for state in states[1:]]


def examples(model: PreTrainedModel, rows: torch.Tensor, probe: torch.Tensor, **settings):
    """Described windows at the end of each interval of a run, whether each layer might have frozen there, and when."""
    anatomy = anatomy_of(model)
    layers = range(anatomy.num_layers)
    recorded: list[list[list[float]]] = [[] for _ in layers]
    windows, distances = [], []
    every = STEPS // (INTERVALS * RECORDINGS)
    for step in train(model, rows, steps=STEPS, **settings):
        if step % every == 0:
            parameters = dict(model.named_parameters())
            for layer in layers:
                recorded[layer].append(sample(parameters, anatomy.layer(layer)))
        if step % (STEPS // INTERVALS) == 0:
            distances.append(representations(model, probe))
            if step:
                so_far = torch.tensor(recorded)
                windows.append(describe_window(so_far[:, -WINDOW:], step_norms(so_far).amax(1)))
    final = distances[-1]
    distance = torch.tensor([[1 - cka(now, end) for now, end in zip(then, final, strict=True)] for then in distances])
    labels = (distance[1:] <= REMAINING * distance[0]).float()[:-1]  # at the end of the run everything may freeze
    intervals = torch.arange(1, INTERVALS)[:, None].expand_as(labels)
    return torch.cat(windows[:-1]), labels.flatten(), intervals.flatten()


def fit(inputs: torch.Tensor, labels: torch.Tensor) -> Predictor:
    """A predictor trained on all examples at once."""
    torch.manual_seed(0)
    predictor = Predictor()
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(600):
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(predictor(inputs), labels).backward()
        optimizer.step()
    return predictor.eval()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(Path(folder))
        rows = token_blocks(Path(folder))
        vocabulary = AutoTokenizer.from_pretrained(folder)
    probe, rows = rows[:16], rows[16:]
    before, after = rows.split(len(rows) // 2 + 1)

    groups: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = []
    for number, (layers, width) in enumerate(SIZES):
        torch.manual_seed(number)
        config = LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
        )
        base = LlamaForCausalLM(config)
        for _ in tqdm(train(base, before, 2e-3, "linear", PRETRAINING, number), total=PRETRAINING, desc="pretraining"):
            pass
        settings = list(itertools.product(RATES, SCHEDULES))
        groups.append(
            [
                examples(copy.deepcopy(base), after, probe, rate=rate, schedule=schedule, seed=seed)
                for seed, (rate, schedule) in enumerate(tqdm(settings, desc=f"{layers} layers"))
            ]
        )

    def joined(groups):
        return [torch.cat(parts) for parts in zip(*(example for group in groups for example in group), strict=True)]

    def right(freezes, labels):
        return float((freezes == labels.bool()).float().mean())

    for held_out, (layers, _) in enumerate(SIZES):
        inputs, labels, intervals = joined(groups[:held_out] + groups[held_out + 1 :])
        predictor = fit(inputs, labels)
        # What one gets without looking at a layer: to freeze everything after the best interval.
        clock = max(range(INTERVALS), key=lambda interval: right(intervals > interval, labels))
        inputs, labels, intervals = joined(groups[held_out : held_out + 1])
        print(
            f"{layers} layers held out: {right(predictor(inputs) > 0, labels):.1%} of {len(labels)} right; by the "
            f"clock alone {right(intervals > clock, labels):.1%}, never freezing {right(intervals < 0, labels):.1%}"
        )

    inputs, labels, _ = joined(groups)
    predictor = fit(inputs, labels)
    print(f"all: {right(predictor(inputs) > 0, labels):.1%} of {len(labels)} right")
    save_file(predictor.state_dict(), PREDICTOR_WEIGHTS)


if __name__ == "__main__":
    main()
