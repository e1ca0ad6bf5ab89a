"""Ten steps of every method, one after the other in one process: python benchmarks/methods.py DATASET OUT [METHOD ...].

Writes OUT.md, one row per method: seconds per step, bytes of optimizer state, trainable fraction and training losses,
all on the same rows. FFT comes first, in the middle and last, which shows how much the machine itself varies.
"""

import itertools
import json
import shutil
import statistics
import sys
from pathlib import Path

import torch

import hft

dataset, out = sys.argv[1], Path(sys.argv[2])
methods = sys.argv[3:] or sorted(
    path.stem for path in Path("recipes/methods").glob("*.yaml") if path.stem not in ("fft", "lota")
)
middle = len(methods) // 2
plan = ["fft", *methods[:middle], "fft", *methods[middle:], "fft"]

# Each method's parts come more often than by default, so that ten steps see some of them.
SHORT = {
    "lisa": {"switch_every": 5},
    "badam": {"switch_every": 2},
    "importance": {"importance_rows": 32},
}


def seconds_per_step(log: Path) -> float:
    """The median over the steps after the first, from the running time that the trainer logs."""
    history = json.loads(log.read_text())["log_history"]
    times = [row["train_runtime"] for row in history if "loss" in row]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def state_bytes(path: Path) -> int:
    """Bytes of all tensors in the optimizer's state."""
    state = torch.load(path, weights_only=True)["state"]
    return sum(t.nbytes for one in state.values() for t in one.values() if isinstance(t, torch.Tensor))


HEAD = (
    "method",
    "s per step",
    "relative to FFT",
    "optimizer state, MB",
    "trains, % of layers",
    "of model",
    "first loss",
    "last",
)
rows: list[tuple[str, float, str]] = []
for number, method in enumerate(plan):
    folder = out / f"{number}-{method}"
    settings = {"dataset_name": dataset, "output_dir": str(folder), "report_to": "none", "logging_steps": 1}
    settings |= {"max_steps": 10, "save_steps": 10, "eval_strategy": "no", "eval_on_start": False}
    settings |= {"global_batch_size": 4, "per_device_train_batch_size": 4}
    files = ("recipes/smollm2-135m/sft.yaml", f"recipes/methods/{method}.yaml")
    config = hft.load_config("sft", *files, **settings, **SHORT.get(method, {}))
    result = hft.train(hft.make_plan(config))
    assert result.ok
    layers = (result.schedule_fractions or {}).get("mean") or result.trainable_fraction["layers"]
    seconds = seconds_per_step(folder / "checkpoint-10" / "trainer_state.json")
    others = (
        f"{state_bytes(folder / 'checkpoint-10' / 'optimizer.pt') / 1e6:.1f} | {layers:.1%} "
        f"| {result.trainable_fraction['model']:.1%} | {result.first_loss:.4f} | {result.last_loss:.4f}"
    )
    rows.append((method, seconds, others))
    usual = statistics.median(seconds for name, seconds, _ in rows if name == "fft")
    table = ["| " + " | ".join(HEAD) + " |", "| --- |" + " --- |" * (len(HEAD) - 1)]
    table += [f"| {name} | {took:.2f} | {took / usual:.2f} | {rest} |" for name, took, rest in rows]
    Path(f"{out}.md").write_text("\n".join(table) + "\n")
    shutil.rmtree(folder)
