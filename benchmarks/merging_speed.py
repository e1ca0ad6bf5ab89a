"""Times reset and merges against a plain copy, interleaved: python merging_speed.py BASE [REPETITIONS]."""

import contextlib
import io
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hft.cli import main

base, repetitions = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5
folder = Path(tempfile.mkdtemp())
for seed, name in enumerate("SD"):
    torch.manual_seed(seed)
    shutil.copytree(base, folder / name)
    tensors = {k: t + 1e-3 * torch.randn(t.shape).to(t.dtype) for k, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
s, d, out = str(folder / "S"), str(folder / "D"), str(folder / "out")


def copy() -> str:
    start = time.monotonic()
    Path(out).mkdir()
    shutil.copyfile(f"{s}/model.safetensors", f"{out}/model.safetensors")
    seconds, size = time.monotonic() - start, Path(out, "model.safetensors").stat().st_size / 1e9
    return f"read {size} GB, wrote {size} GB in {seconds} s: {2 * size / seconds} GB/s"


def command(*words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        assert main([*words, "--out", out]) == 0
    return printed.getvalue()


merge, both = ("merge", "--method"), ("--models", s, d)
commands = {
    "plain copy": copy,
    "reset": lambda: command("reset", "--tuned", s, "--base", str(base)),
    "average (S+D)": lambda: command(*merge, "average", *both),
    "wise-ft (P+S)": lambda: command(*merge, "wise-ft", "--models", s, "--base", str(base)),
    "slerp (S+D)": lambda: command(*merge, "slerp", *both),
    "dare (S+D)": lambda: command(*merge, "dare", *both, "--base", str(base)),
    "ties (S+D), trim tensor": lambda: command(*merge, "ties", *both, "--base", str(base)),
    "ties (S+D), trim global": lambda: command(*merge, "ties", *both, "--base", str(base), "--trim", "global"),
}
speeds: dict[str, list[float]] = {name: [] for name in commands}
seconds: dict[str, list[float]] = {name: [] for name in commands}
traffic = {}
for _ in range(repetitions):
    for name, run in commands.items():
        found = re.search(r"read ([\d.]+) GB, wrote ([\d.]+) GB in ([\d.]+) s: ([\d.]+) GB/s", run())
        traffic[name] = float(found[1]), float(found[2])
        seconds[name].append(float(found[3]))
        speeds[name].append(float(found[4]))
        shutil.rmtree(out)
shutil.rmtree(folder)

print("| | read, GB | written, GB | seconds, median | GB/s: median (least-most) | of the copy in its round, median |")
print("| --- | --- | --- | --- | --- | --- |")
for name, values in speeds.items():
    ratio = statistics.median(value / copied for value, copied in zip(values, speeds["plain copy"], strict=True))
    spread = f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
    read, wrote = traffic[name]
    print(f"| {name} | {read:.2f} | {wrote:.2f} | {statistics.median(seconds[name]):.1f} | {spread} | {ratio:.0%} |")
