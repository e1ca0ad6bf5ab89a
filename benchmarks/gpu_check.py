"""What no CPU can settle: `make gpu-check`, or python benchmarks/gpu_check.py [--parts memory time ...].

Made for 12 minutes of one GPU of 80 GB, without the Hub: random weights in the shapes of 1B and 7B models. With
`--num_gpus 8` FSDP2, ZeRO-3 and DDP against one GPU. The page goes to results/gpu/DEVICE.md, and each part as soon as
it is done to DEVICE.jsonl beside it: the same command again runs only what is not there. The models take 18 GB in
TMPDIR. `--rehearse` runs everything on a CPU, with the tiny model; its numbers mean nothing.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from bench import METHODS, Bench, device_name, equal, make_model, sft, slug, table, versions, write_rows
from bench_arm import measure, now
from transformers import AutoConfig, TrainerCallback
from transformers.utils.logging import disable_progress_bar

import hft
from hft.launch import CONFIGS, ENGINES
from hft.machine import is_main, leave_process_group, peak_memory
from hft.planning.forecast import forecast
from hft.planning.memory import GIB
from hft.runs.train import make_trainer

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Check:
    """What is trained, and for how long: on a GPU, or in a rehearsal."""

    scratch: Path  # models and rows go here
    gpus: int = 1
    tokenizer: str = "models/tiny"
    model: str = "llama-1.1b"  # here and below a shape of `bench.SHAPES`, or a folder
    experts: str = "mixtral-0.8b"
    large: str = "llama2-7b"
    rows: int = 2  # per step and device
    length: int = 2048  # tokens per row
    large_rows: int = 4  # the recipe's
    large_length: int = 4096
    steps: int = 10  # measured in each round, after another one
    rounds: int = 3

    def bench(self, model: str | None = None, rows: int | None = None, length: int | None = None) -> Bench:
        """Arms of a model, by default the small one, on rows of its own."""
        name, rows, length = model or self.model, rows or self.rows, length or self.length
        folder = self.scratch / f"{Path(name).name}-{rows}x{length}"
        if not folder.exists():
            write_rows(folder, rows * (self.steps + 1), length)
        path = make_model(name, self.scratch / name, self.tokenizer)
        return Bench(path, folder, rows, length, self.steps, self.rounds)


def rehearsal(scratch: Path, tiny: str, gpus: int) -> Check:
    """The smallest of everything."""
    sizes = {"rows": 2, "length": 32, "large_rows": 2, "large_length": 32, "steps": 2, "rounds": 1}
    return Check(scratch, gpus, tiny, model=tiny, experts="mixtral-tiny", large=tiny, **sizes)


def found(holds: bool, sentence: str) -> str:
    """A line of what was to be settled."""
    return f"- {'yes' if holds else 'NO'}: {sentence}"


def peaks(bench: Bench, arms: dict[str, tuple[str, dict]]) -> str:
    """Planned and measured peak of some arms, each a method and keys."""
    lines, checks = ["| | planned, GiB | measured, GiB | measured / planned |", "| --- | --- | --- | --- |"], []
    for name, (method, keys) in arms.items():
        planned = forecast(bench.config(method, **keys)).memory.total
        measured = measure(partial(bench.trainer, method, **keys), bench.rows, bench.length, count=False).peak
        ratio = measured / planned
        lines.append(f"| {name} | {planned / GIB:.2f} | {measured / GIB:.2f} | {ratio:.3f} |")
        checks.append(found(abs(ratio - 1) <= 0.1, f"the peak of {name} is within 10% of the plan's"))
    return "\n".join([*lines, "", *checks])


def memory(check: Check) -> str:
    """Gradients are accumulated over two micro-batches, since the plan is of that."""
    bench, twice = replace(check.bench(), steps=1), {"gradient_accumulation_steps": 2}
    layers = AutoConfig.from_pretrained(bench.model).num_hidden_layers // 2
    pairs = twice | {"dataset_name": str(bench.data / "dpo.jsonl")}
    arms = {
        "fft": ("fft", twice),
        f"fft, {layers} layers checkpointed": ("fft", twice | {"activation_checkpointing_layers": layers}),
        "hft": ("hft", twice),
        "hft, dpo": ("hft", pairs | {"objective": "dpo"}),
        "hft, kto": ("hft", pairs | {"objective": "kto"}),
    }
    experts = {f"hft, {Path(check.experts).name}": ("hft", twice)}
    return f"{peaks(bench, arms)}\n\n{peaks(replace(check.bench(check.experts), steps=1), experts)}"


def large(check: Check) -> str:
    """HFT of a 7B model on one card, at the batch of recipes/llama2-7b/sft.yaml with all layers checkpointed."""
    bench = replace(check.bench(check.large, check.large_rows, check.large_length), steps=1)
    keys = {"activation_checkpointing": True, "gradient_accumulation_steps": 2}
    return peaks(bench, {f"hft, {check.large_rows} x {check.large_length} tokens": ("hft", keys)})


def variants(check: Check) -> str:
    """HFT with other precisions, optimizers and kernels, where they are installed."""
    bench = check.bench()
    keys: dict[str, dict] = {"bf16, fused AdamW, sdpa": {}, "fp32": {"bf16": False}, "AdamW": {"optim": "adamw_torch"}}
    if find_spec("bitsandbytes"):
        keys["AdamW, 8 bits"] = {"optim": "adamw_8bit"}
    if find_spec("flash_attn"):
        keys["flash attention 2"] = {"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}
    if find_spec("liger_kernel"):
        keys["Liger"] = {"use_liger_kernel": True}
    arms = bench.run({name: bench.arm(bench.trainer, "hft", **each) for name, each in keys.items()})
    first, *others = arms
    start = arms[first][0].losses[0]
    checks = [same_loss(f"the first loss with {name}", arms[name][0].losses[0], start, 1e-2) for name in others]
    return "\n".join([table(arms), "", *checks])


def same_loss(what: str, ours: float, theirs: float, tolerance: float) -> str:
    """Whether two losses are the same to a relative tolerance."""
    return found(abs(ours - theirs) <= tolerance * abs(theirs), f"{what} is {ours:.4f}, beside {theirs:.4f}")


def compiled(check: Check) -> str:
    """A schedule changes what trains, which torch.compile must notice."""
    bench = replace(check.bench(), steps=min(4, check.steps), rounds=1)
    arms = {
        name: bench.arm(bench.trainer, "lisa", switch_every=2, torch_compile=compile)
        for name, compile in {"lisa, eager": False, "lisa, torch.compile": True}.items()
    }
    measured = bench.run(arms)
    eager, fast = (each[0] for each in measured.values())
    checks = [
        same_loss(f"the compiled loss of step {step}", ours, theirs, 1e-2)
        for step, (ours, theirs) in enumerate(zip(fast.losses, eager.losses, strict=True), start=1)
    ]
    return "\n".join([table(measured), "", *checks])


def frozen(check: Check) -> str:
    """Whole runs, which end with `hft verify`."""
    bench, lines = check.bench(), []
    for method, objective in (("hft", "sft"), ("hft", "dpo"), ("lisa", "sft"), ("random-element", "sft")):
        out = str(check.scratch / f"{method}-{objective}")
        result = hft.train(hft.make_plan(bench.config(method, objective, output_dir=out)))
        lines.append(found(result.ok, f"{objective} with {method} leaves the frozen bits alone: {result.verify}"))
    return "\n".join(lines)


class Times(TrainerCallback):
    """Seconds until the first step, of each step, and of each checkpoint."""

    def __init__(self) -> None:
        self.start, self.ready, self.steps, self.saves = now(), 0.0, [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.ready = now() - self.start

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.ended = now()
        self.steps.append(self.ended - self.start)

    def on_save(self, args, state, control, **kwargs):
        self.saves.append(now() - self.ended)


def worker(file: str) -> None:
    """One process of a run of `several`; the first one writes what was found beside the spec."""
    spec = json.loads(Path(file).read_text())
    if spec["engine"] == "fsdp2" and not torch.cuda.is_available():
        sys.path.insert(0, str(ROOT / "tests" / "training"))
        from fsdp2_on_cpu import choose_fsdp, set_environment

        set_environment()
        choose_fsdp()
    plan = hft.make_plan(Bench(**spec["bench"] | {"data": Path(spec["bench"]["data"])}).config("hft", **spec["keys"]))
    trainer = make_trainer(plan)
    trainer.add_callback(times := Times())
    trainer.train(resume_from_checkpoint=plan.start.resume_from)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if is_main():
        result = {"losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}
        result |= {"ok": hft.verify(plan.out).ok, "ready": times.ready, "steps": times.steps, "saves": times.saves}
        Path(file).with_suffix(".found").write_text(json.dumps(result | {"peak": peak_memory()}))
    leave_process_group()


def launch(check: Check, engine: str, processes: int, out: Path) -> dict:
    """A run of four steps on some processes, resumed from what `out` holds; the global batch is always the same."""
    bench = replace(check.bench(), steps=3)
    keys = {"output_dir": str(out), "save_strategy": "steps", "save_steps": 2}
    keys |= {"gradient_accumulation_steps": check.gpus // processes, "learning_rate": 1e-4}
    spec = out.with_suffix(".json")
    spec.write_text(json.dumps({"engine": engine, "keys": keys, "bench": asdict(bench)}, default=str))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable]
    if processes == 1 and torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    elif torch.cuda.is_available():
        words += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{engine}.yaml")]
        words += ["--deepspeed_config_file", str(CONFIGS / "zero3.json")] if engine == "zero3" else []
        words += ["--num_processes", str(processes)]
    elif processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment["OMP_NUM_THREADS"] = "1"
    subprocess.run([*words, __file__, "worker", str(spec)], env=environment, check=True)
    return json.loads(spec.with_suffix(".found").read_text())


def several(check: Check) -> str:
    """Each engine against one device at the same global batch, and resumed from step 2 on another number."""
    engines = [name for name in ENGINES if name != "zero3" or (torch.cuda.is_available() and find_spec("deepspeed"))]
    # A sharded checkpoint is resumed by several; ZeRO-3's by as many as saved it.
    again = {"fsdp2": max(2, check.gpus // 2), "ddp": max(1, check.gpus // 2), "zero3": check.gpus}
    head = ("", "processes", "losses", "tokens/s per GPU", "save, s", "until the first step, s", "peak, GB")
    lines, checks = [" | ".join(head), " | ".join("---" for _ in head)], []
    one = launch(check, "ddp", 1, check.scratch / "one")
    runs = {"one": (1, one)}
    for engine in engines:
        out = check.scratch / engine
        runs[engine] = (check.gpus, launch(check, engine, check.gpus, out))
        resumed = check.scratch / f"{engine}-resumed"
        resumed.mkdir()
        (resumed / "checkpoint-2").symlink_to(out / "checkpoint-2")
        runs[f"{engine}, resumed"] = (again[engine], launch(check, engine, again[engine], resumed))
    for name, (processes, run) in runs.items():
        tokens = check.gpus * check.rows * check.length / processes
        seconds = statistics.median(run["steps"][1:])
        cells = [name, str(processes), " ".join(f"{loss:.4f}" for loss in run["losses"]), f"{tokens / seconds:.0f}"]
        cells += [f"{statistics.median(run['saves']):.1f}", f"{run['ready']:.1f}", f"{run['peak'] / 1e9:.2f}"]
        lines.append(" | ".join(cells))
        if run is not one:
            worst = max(abs(a - b) / abs(b) for a, b in zip(run["losses"], one["losses"], strict=True))
            checks.append(found(worst <= 2e-3, f"the losses of {name} are those of one process to {worst:.1e}"))
        checks.append(found(run["ok"], f"{name} leaves the frozen bits alone"))
    return "\n".join([*(f"| {line} |" for line in lines), "", *checks])


PARTS: dict[str, tuple[str, Callable[[Check], str]]] = {
    "memory": ("Planned and measured peak", memory),
    "7b": ("A 7B model on one card", large),
    "time": ("Step time against the FLOP bound, and TRL without hft", lambda c: sft(c.bench(), methods=METHODS[:2])),
    "equal": ("At equal memory", lambda c: equal(c.bench())),
    "variants": ("Precision, optimizers and kernels", variants),
    "compile": ("torch.compile", compiled),
    "frozen": ("Frozen bits", frozen),
    "several": ("Several GPUs", several),
}


ONE_GPU = [part for part in PARTS if part != "several"]


def page(device: str, done: dict[str, dict]) -> str:
    """The parts that are done, and the commands of the others."""
    lines = [
        f"# GPU check: {device}",
        "",
        "    make gpu-check",
        "",
        "Made by benchmarks/gpu_check.py. " + versions(),
        "",
    ]
    for part, (title, function) in PARTS.items():
        if part in done:
            note = (function.__doc__ or "").strip()
            lines += [f"## {title}", "", *([note, ""] if note else []), done[part]["text"], ""]
            lines += [f"{done[part]['seconds']:.0f} s.", ""]
    missing = [part for part in PARTS if part not in done]
    lines += ["## Not run", "", *(f"- {PARTS[part][0]}: `{command(part)}`" for part in missing), ""] if missing else []
    return "\n".join(lines)


def command(part: str) -> str:
    """The command of a part."""
    return "make gpu-check NUM_GPUS=8" if part == "several" else f'make gpu-check ARGS="--parts {part}"'


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=ONE_GPU, default=ONE_GPU, help="on one GPU; by default all")
    parser.add_argument("--num_gpus", type=int, default=1, help="above 1: only the part that is about several")
    parser.add_argument("--rehearse", nargs="?", const="models/tiny", metavar="FOLDER", help="of the tiny model")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of the page")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU is visible; --rehearse tries everything on a CPU")
    if options.num_gpus > 1 and options.num_gpus % 2:
        parser.error("--num_gpus must be even: runs are resumed on half of them")
    if not options.rehearse and options.num_gpus > torch.cuda.device_count():
        parser.error(f"--num_gpus {options.num_gpus}, and {torch.cuda.device_count()} are visible")
    return options


def main() -> int:
    """Run the parts that are not done, and write the page after each; 1 if one failed or something does not hold."""
    options = parse()
    disable_progress_bar()
    wanted, device = options.parts, ""
    if options.num_gpus > 1:
        wanted, device = ["several"], f"{options.num_gpus} x "
    else:  # before anything asks CUDA: a Trainer that sees several GPUs puts a copy of the model on each
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    device += device_name()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / f"{slug(device)}.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {record["part"]: record for record in records}
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        make = partial(rehearsal, tiny=options.rehearse) if options.rehearse else Check
        check = make(Path(scratch), gpus=options.num_gpus)
        for part in (part for part in wanted if part not in done):
            print(f"== {part}", flush=True)
            start = time.perf_counter()
            try:
                text = PARTS[part][1](check)
            except Exception:  # the next part may run; the same command tries this one again
                traceback.print_exc()
                failed.append(part)
                continue
            done[part] = {"part": part, "seconds": time.perf_counter() - start, "versions": versions(), "text": text}
            with log.open("a") as file:
                file.write(json.dumps(done[part]) + "\n")
            log.with_suffix(".md").write_text(page(device, done))
            print(text, flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    wrong = [part for part, record in done.items() if re.search(r"\bNOT?\b", record["text"])]
    return int(bool(failed) or (bool(wrong) and not options.rehearse))


if __name__ == "__main__":
    worker(sys.argv[2]) if sys.argv[1:2] == ["worker"] else sys.exit(main())
