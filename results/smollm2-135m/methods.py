"""Ten steps of every method, one after the other: python methods.py DATASET OUT [METHOD ...].

Prints a table row each: seconds a step, bytes of optimizer state, trainable share and losses. FFT comes first, in the
middle and last, which shows how much the machine itself varies.
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

dataset, out = sys.argv[1], Path(sys.argv[2])
methods = sys.argv[3:] or sorted(path.stem for path in Path("recipes/methods").glob("*.yaml") if path.stem != "fft")
middle = len(methods) // 2
plan = ["fft", *methods[:middle], "fft", *methods[middle:], "fft"]

# Each method's parts come more often than by default, so that ten steps see some of them.
SHORT = {
    "lisa": ["--switch_every", "5"],
    "badam": ["--switch_every", "2"],
    "importance": ["--importance_rows", "32"],
}


def seconds_a_step(log: Path) -> float:
    """The median over the steps after the first, from the running time that the trainer logs."""
    history = json.loads(log.read_text())["log_history"]
    times = [row["train_runtime"] for row in history if "loss" in row]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def state_bytes(path: Path) -> int:
    """Bytes of all tensors in the optimizer's state."""
    state = torch.load(path, weights_only=True)["state"]
    return sum(t.nbytes for one in state.values() for t in one.values() if isinstance(t, torch.Tensor))


HEAD = ("method", "s a step", "of FFT", "optimizer state, MB", "trains, % of layers", "of model", "first loss", "last")
print("| " + " | ".join([*HEAD, "held-out"]) + " |")
print("| --- |" + " --- |" * 8, flush=True)
rows = []
for number, method in enumerate(plan):
    folder = out / f"{number}-{method}"
    command = [sys.executable, "-m", "hft", "sft", "--config", "recipes/smollm2-135m/sft.yaml"]
    command += [f"recipes/methods/{method}.yaml", "--dataset_name", dataset, "--output_dir", str(folder)]
    command += ["--max_steps", "10", "--save_steps", "10", "--eval_steps", "10", "--eval_on_start", "false"]
    command += [
        "--logging_steps",
        "1",
        "--global_batch_size",
        "4",
        "--eval_rows",
        "16",
        "--report_to",
        "none",
        *SHORT.get(method, []),
    ]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{method}: {done.stderr[-2000:]}")
    results = json.loads((folder / "results.json").read_text())
    checkpoint = folder / "checkpoint-10"
    share = results["trainable_share"] | {
        "layers": results.get("schedule_shares", {}).get("mean") or results["trainable_share"]["layers"]
    }
    rows.append((method, seconds_a_step(checkpoint / "trainer_state.json"), state_bytes(checkpoint / "optimizer.pt")))
    usual = statistics.median(seconds for name, seconds, _ in rows if name == "fft")
    print(
        f"| {method} | {rows[-1][1]:.2f} | {rows[-1][1] / usual:.2f} | {rows[-1][2] / 1e6:.1f} | {share['layers']:.1%} "
        f"| {share['model']:.1%} | {results['first_loss']:.4f} | {results['last_loss']:.4f} "
        f"| {results['held_out']['loss'][-1]:.4f} |",
        flush=True,
    )
    print(f"{method}: {time.monotonic() - start:.0f} s in all", file=sys.stderr)
