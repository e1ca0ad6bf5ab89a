"""What each method learns and what it forgets: `make forgetting`, or python benchmarks/forgetting.py.

Trains SmolLM2-135M on grade-school word problems (reasoning_gym's gsm_symbolic, arXiv 2505.24760) with each method of
forgetting.yaml, scores each model with `hft eval --suite quick`, and writes one report. Rerun
it to resume at the first run or score that is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

import hft
from hft.cli import main as hft_command
from hft.errors import HFTError
from hft.evaluation.evaluate import Settings, evaluate
from hft.evaluation.rows import replay_texts
from hft.runs.result import RESULTS_NAME

HERE = Path(__file__).parent
OUT = Path("runs/forgetting")
DATA = Path("data/gsm-symbolic")
TRAIN_ROWS, TEST_ROWS = 4000, 64


def write_data(replay: float = 0.0) -> Path:
    """The task's rows, and a share of general text among them, as `DATA/{train,test}.jsonl`.

    Returns:
        The folder of this share.
    """
    folder = DATA if not replay else Path(f"{DATA}-replay-{replay:g}")
    if (folder / "test.jsonl").exists():
        return folder
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
    train, test = rows[TEST_ROWS:], rows[:TEST_ROWS]
    texts = replay_texts()
    for index in range(round(replay * TRAIN_ROWS)):
        train[int(index / replay)] = {"messages": [{"role": "assistant", "content": texts[index % len(texts)]}]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder


def cells(grid: dict) -> Iterator[tuple[str, str, float, int, float]]:
    """Name, method, learning rate, seed and share of replay of each run."""
    for seed in grid["seeds"]:
        for arm in grid["arms"]:
            method, _, share = arm.partition("-replay=")
            for rate in grid["learning_rates"]:
                yield f"{arm}-lr={rate:g}-seed={seed}", method, rate, seed, float(share or 0)


def train(keys: dict, grid: dict, method: str, rate: float, seed: int, share: float, out: Path) -> None:
    """Train one cell, unless it is finished."""
    if (out / RESULTS_NAME).exists():
        return
    recipe = out.with_name(f"{out.name}.yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    settings = {"max_steps": grid["max_steps"], "global_batch_size": grid["global_batch_size"], "learning_rate": rate}
    settings |= {"dataset_name": str(write_data(share)), "seed": seed, "selection_seed": seed}
    recipe.write_text(yaml.safe_dump(keys | settings, sort_keys=False))  # a rate in a file keeps LoRA's factor
    config = hft.load_config("sft", recipe, f"recipes/methods/{method}.yaml", output_dir=str(out))
    if not hft.train(hft.make_plan(config)).ok:
        raise HFTError(f"{out} does not verify")


def derived(run: Path, base: str, seed: int) -> Iterator[Path]:
    """Half-Reset and WiSE-FT of an FFT run: no training."""
    reset = run.with_name(run.name.replace("fft", "half-reset", 1))
    if not (reset / "model.safetensors").exists():
        words = ["--tuned", str(run), "--base", base, "--out", str(reset), "--selection_seed", str(seed)]
        hft_command(["reset", "--config", "recipes/methods/hft.yaml", *words])
    yield reset
    wise = run.with_name(run.name.replace("fft", "wise-ft", 1))
    if not (wise / "model.safetensors").exists():
        words = ["--models", str(run), "--base", base, "--out", str(wise)]
        hft_command(["merge", "--config", "recipes/merges/wise-ft-ps.yaml", *words])
    yield wise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=Path, default=HERE / "forgetting.yaml")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    content = yaml.safe_load(options.grid.read_text())
    keys, grid = content["train"], content[options.device]
    base = keys["model_name_or_path"]
    scored = []

    def score(model: Path | str, run: Path) -> None:
        settings = Settings(limit=grid["limit"], batch_size=16, base=base, task_data=str(run))
        evaluate(str(model), "quick", settings, options.out / "base" if model == base else model)
        scored.append(str(options.out / "base" if model == base else model))

    for name, method, rate, seed, share in tqdm(list(cells(grid)), desc="runs"):
        out = options.out / name
        train(keys, grid, method, rate, seed, share, out)
        if not scored:
            score(base, out)
        score(out, out)
        if method == "fft" and not share:
            for model in derived(out, base, seed):
                score(model, out)
    hft_command(["report", *scored, "--out", str(options.out / "report")])


if __name__ == "__main__":
    main()
