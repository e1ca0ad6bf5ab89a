"""Finds a core as `hft cpi probe` does, and by torch.topk: python benchmarks/cpi_core.py FOLDER [GB].

Makes a base and a tuned Llama of GB gigabytes each in fp32 (2 by default), in shards of 500 MB, in FOLDER. Prints for
both ways the seconds and the peak memory beyond what Python and torch take, and whether they find the same elements.
Anonymous memory is what the process itself holds; resident memory also counts pages of files that are mapped in, which
the kernel takes back when it needs them.
"""

import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from hft.cpi.probe import write_core
from hft.merging.checkpoint import Checkpoint
from hft.merging.operators import generator_of
from hft.model.anatomy import meta_model
from hft.selection.masks import Masks

PERCENT = 1.0


def make(folder: Path, size: float) -> None:
    """A base and a tuned model, written tensor by tensor; changes are as spread as Adam's are."""
    layers = max(1, round((size * 1e9 / 4 - 2 * 32_000 * 1024) / 12.6e6))
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=2752, num_hidden_layers=layers, num_attention_heads=16
    )
    specs = {name: p.detach() for name, p in meta_model(config).named_parameters()}
    shards, room = [[]], 0
    for name, spec in specs.items():
        if room + spec.nbytes > 500e6:
            shards, room = [*shards, []], 0
        shards[-1].append(name)
        room += spec.nbytes
    for model in ("base", "tuned"):
        out = folder / model
        out.mkdir(parents=True)
        config.save_pretrained(out)

        def values(name: str, model: str = model):
            generator = generator_of(name)
            start = 0.02 * torch.randn(specs[name].shape, generator=generator)
            if model == "tuned":
                start += 1e-4 * torch.randn(specs[name].shape, generator=generator) ** 3
            return start

        index = {}
        for number, names in enumerate(shards, 1):
            path = out / f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file({name: values(name) for name in names}, path, metadata={"format": "pt"})
            index |= dict.fromkeys(names, path.name)
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def streaming(folder: Path) -> None:
    models = (Checkpoint.open(str(folder / name)) for name in ("tuned", "base"))
    write_core(folder / "core", "task", *models, PERCENT)


def topk(folder: Path) -> None:
    tuned, base = (Checkpoint.open(str(folder / name)) for name in ("tuned", "base"))
    changes = [(tuned.weights[name] - base.weights[name]).abs().reshape(-1) for name in base.parameters]
    every = torch.cat(changes)
    del changes
    found = every.topk(int(PERCENT * len(every) / 100), sorted=False).indices
    torch.save(found.sort().values, folder / "topk.pt")


def measured(way: str, folder: Path) -> None:
    """Run one way, watching the memory of this process."""
    peak, done = [0], threading.Event()

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    before, start = anonymous(), time.monotonic()
    watcher = threading.Thread(target=watch)
    watcher.start()
    {"streaming": streaming, "topk": topk}[way](folder)
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"| {way} | {seconds:.1f} | {(peak[0] - before) / 1e9:.2f} | {resident / 1e9:.2f} |", flush=True)


def main() -> None:
    if sys.argv[1] in ("streaming", "topk"):
        measured(sys.argv[1], Path(sys.argv[2]))
        return
    folder, size = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 2.0
    if not folder.exists():
        make(folder, size)
    base = Checkpoint.open(str(folder / "base"))
    numels = [base.specs[name].numel() for name in base.parameters]
    print(f"{sum(numels):,} elements, {4e-9 * sum(numels):.2f} GB, largest tensor {4e-9 * max(numels):.2f} GB\n")
    print("| | seconds | anonymous memory, GB | resident at most, GB |\n| --- | --- | --- | --- |", flush=True)
    for way in ("streaming", "topk"):
        subprocess.run([sys.executable, __file__, way, str(folder)], check=True)
    print("\n" + compare(folder, base))


def compare(folder: Path, base: Checkpoint) -> str:
    """Whether both ways found the same elements. Of equal changes we take the first ones, torch.topk any."""
    tuned, masks, found = Checkpoint.open(str(folder / "tuned")), Masks(folder / "core"), torch.load(folder / "topk.pt")
    start, only_one, kept = 0, [], []
    for name in base.parameters:
        change = (tuned.weights[name] - base.weights[name]).abs().reshape(-1)
        ours, theirs = masks[name].tensor().reshape(-1), torch.zeros(len(change), dtype=torch.bool)
        first, last = torch.searchsorted(found, torch.tensor([start, start + len(change)]))
        theirs[found[first:last] - start] = True
        only_one.append(change[ours != theirs])
        kept.append(change[ours].min() if ours.any() else torch.tensor(torch.inf))
        start += len(change)
    ties, threshold = torch.cat(only_one), torch.stack(kept).min()
    if len(ties) == 0:
        return "same elements"
    same = "same elements, but for" if bool((ties == threshold).all()) else "OTHER ELEMENTS:"
    return f"{same} {len(ties) // 2} that changed by exactly as much as the smallest one"


if __name__ == "__main__":
    main()
