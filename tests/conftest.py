"""A tiny real model, a little real data, and the command line, in process."""

import json
import os
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hft.cli import main
from hft.demo.data import docstring_chats, docstring_pairs
from hft.demo.models import make_tiny
from hft.model.weights import as_bytes

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Recipes name their templates relative to the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The random Llama of `MODEL=tiny`, in bf16."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return [row for _, row in islice(docstring_chats(), 96)]


@pytest.fixture(scope="session")
def data(tmp_path_factory, rows) -> Path:
    """A dataset folder with a train and a test split."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train.jsonl", rows[:80])
    write_jsonl(folder / "test.jsonl", rows[80:])
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, rows) -> Path:
    """A preference dataset folder with a train and a test split."""
    folder = tmp_path_factory.mktemp("pairs")
    chats = [(f"module.name{index}", row) for index, row in enumerate(rows)]
    preferences = [pair for _, pair in docstring_pairs(chats)]
    write_jsonl(folder / "train.jsonl", preferences[:80])
    write_jsonl(folder / "test.jsonl", preferences[80:])
    return folder


def command(stage: str, out: Path, *flags: str, method: str = "hft", model: Path, data: Path) -> list[str]:
    """The words of `hft STAGE` with the tiny recipe on tiny data; flags win over the recipe's values."""
    settings = {"model_name_or_path": model, "dataset_name": data, "output_dir": out, "report_to": "none"}
    settings |= {"max_steps": 4, "save_steps": 2, "eval_strategy": "no", "eval_on_start": "false"}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    files = ["--config", f"recipes/tiny/{stage}.yaml", f"recipes/methods/{method}.yaml"]
    return [stage, *files, *words, *flags]


def finished_run(stage: str, out: Path, *, model: Path, data: Path) -> Path:
    """A run of four steps, evaluated before and after, for the tests that only look."""
    os.chdir(ROOT)
    evaluation = ["--eval_strategy", "steps", "--eval_on_start", "true", "--eval_steps", "4"]
    assert main(command(stage, out, *evaluation, model=model, data=data)) == 0
    return out


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny, data) -> Path:
    """A finished run of `hft sft`, to look at or to copy."""
    return finished_run("sft", tmp_path_factory.mktemp("runs") / "finished", model=tiny, data=data)


@pytest.fixture
def sft(tiny, data):
    """Run `hft sft` in process."""

    def run(out: Path, *flags: str, **choices) -> int:
        return main(command("sft", out, *flags, **{"model": tiny, "data": data} | choices))

    return run


@pytest.fixture
def dpo(tiny, pairs):
    """Run `hft dpo` in process."""

    def run(out: Path, *flags: str, **choices) -> int:
        return main(command("dpo", out, *flags, **{"model": tiny, "data": pairs} | choices))

    return run


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def losses(checkpoint: Path) -> list[float]:
    """The training losses that a checkpoint's trainer logged."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(as_bytes(a), as_bytes(b))


def error_of(capsys) -> str:
    """The one line that a command ended with."""
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err
    lines = [line for line in re.split(r"[\r\n]", err) if "hft: " in line]
    assert len(lines) == 1
    assert err.endswith(lines[0])
    return lines[0]
