"""Times reset and merges beside mergekit's same merges and a plain copy: python merging_speed.py BASE [REPETITIONS].

Whole commands, each in a separate process, in turn; what is read is in the page cache after the first round, which does
not count. Ratios are to the same round.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from bench import spread
from safetensors.torch import load_file, save_file

base, repetitions = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 5
folder = Path(tempfile.mkdtemp())
for seed, name in enumerate("SD"):
    torch.manual_seed(seed)
    shutil.copytree(base, folder / name)
    tensors = {k: t + 1e-3 * torch.randn(t.shape).to(t.dtype) for k, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
s, d, out = str(folder / "S"), str(folder / "D"), str(folder / "out")


def copy() -> str:
    Path(out).mkdir()
    shutil.copyfile(f"{s}/model.safetensors", f"{out}/model.safetensors")
    return ""


def hft(*words: str) -> Callable[[], str]:
    """One of our commands, and what it prints."""
    command = [sys.executable, "-m", "hft", *words, "--out", out]
    return lambda: subprocess.run(command, check=True, capture_output=True, text=True).stdout


def mergekit(method: str, on_base: bool = False, **parameters: float) -> Callable[[], str]:
    """mergekit's command for the same merge."""
    config = {"merge_method": method, "dtype": "bfloat16"}
    if method == "slerp":
        config |= {"base_model": s, "models": [{"model": d}], "parameters": {"t": 0.5}}
    else:
        config["models"] = [{"model": model, "parameters": parameters} for model in (s, d)]
        config |= {"base_model": str(base)} if on_base else {}
        config |= {"parameters": {"normalize": method != "dare_linear", "int8_mask": False}}
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(path), out]
    return lambda: subprocess.run(command, check=True, capture_output=True, text=True).stdout


both = ("--models", s, d)
on_base = (*both, "--base", str(base))
arms: dict[str, Callable[[], str]] = {
    "plain copy": copy,
    "reset": hft("reset", "--tuned", s, "--base", str(base)),
    "average": hft("merge", "--method", "average", *both),
    "average, mergekit": mergekit("linear", weight=0.5),
    "slerp": hft("merge", "--method", "slerp", *both),
    "slerp, mergekit": mergekit("slerp"),
    "dare": hft("merge", "--method", "dare", *on_base),
    "dare, mergekit": mergekit("dare_linear", True, weight=0.5, density=0.1),
    "ties": hft("merge", "--method", "ties", *on_base),
    "ties, mergekit": mergekit("ties", True, weight=1.0, density=0.2),
}
seconds: dict[str, list[float]] = {name: [] for name in arms}
merging: dict[str, list[float]] = {name: [] for name in arms}  # without start-up, as the command itself says
for number in range(repetitions + 1):
    for name, run in arms.items():
        start = time.monotonic()
        said = re.search(r" in ([\d.]+) s", run())
        if number:
            seconds[name].append(time.monotonic() - start)
            merging[name] += [float(said[1])] if said else []
        shutil.rmtree(out)
shutil.rmtree(folder)


print("| | command, s | of it reading, merging, writing, s | of mergekit's |\n| --- | --- | --- | --- |")
for name, values in seconds.items():
    theirs = seconds.get(f"{name}, mergekit")
    ratio = spread([a / b for a, b in zip(values, theirs, strict=True)], 2) if theirs else ""
    print(f"| {name} | {spread(values, 1)} | {spread(merging[name], 1) if merging[name] else ''} | {ratio} |")
