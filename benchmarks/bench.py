"""What half fine-tuning costs beside FFT and others: `make bench`, or python benchmarks/bench.py [--rounds 5 ...].

Each arm is a run of some steps on the same rows, made by the public API and freed. All arms follow each other in
one process, once a round, every other round backwards. The tables go to results/bench/DEVICE.md.
"""

import argparse
import json
import math
import platform
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from bench_arm import Measured, measure
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig, Trainer
from transformers.utils.logging import disable_progress_bar
from trl import SFTTrainer

import hft
from hft.freezing import upcast
from hft.planning.forecast import forecast
from hft.runs.train import make_trainer

METHODS = ("fft", "hft", "hft-layer", "bottom half", "lora", "lisa")
PARTS = {
    "sft": "SFT",
    "checkpointing": "SFT with activation checkpointing",
    "equal": "At equal memory",
    "dpo": "DPO",
    "7b": "Llama-2-7B on one GPU",
}
# Random weights in the shape of TinyLlama-1.1B, of Llama-2-7B and of small mixtures of experts: time and memory do not
# depend on their values.
SHAPES = {
    "llama-1.1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    ),
    "llama2-7b": Path("recipes/llama2-7b"),
    "mixtral-0.8b": MixtralConfig(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    ),
    "mixtral-tiny": MixtralConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
}


@dataclass(frozen=True)
class Bench:
    """What all arms share.

    Attributes:
        model: folder of the base.
        data: folder with `sft.jsonl` and `dpo.jsonl`.
        rows, length: a batch; every row is cut to that length.
        steps: measured ones, after one warm-up.
        rounds: how often each arm is measured.
    """

    model: str
    data: Path
    rows: int
    length: int
    steps: int
    rounds: int

    def config(self, method: str, objective: str = "sft", **keys) -> hft.Config:
        """The config of an arm."""
        if method == "bottom half":
            layers = AutoConfig.from_pretrained(self.model).num_hidden_layers
            keys |= {"policy": "explicit", "freeze_embeddings": True}
            keys |= {"freeze": [f"model.layers.{index}.*" for index in range(layers // 2)]}
            method = "fft"
        flags = {
            "model_name_or_path": self.model,
            "dataset_name": str(self.data / f"{objective}.jsonl"),
            "output_dir": str(self.data / "out"),
            "max_length": self.length,
            "per_device_train_batch_size": self.rows,
            "gradient_accumulation_steps": 1,
            "max_steps": self.steps + 1,
            "learning_rate": 1e-5,
            "activation_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        flags |= {"chat_template_path": "tulu.jinja"} if objective == "sft" else {}
        return hft.load_config(objective, f"recipes/methods/{method}.yaml", **flags | keys)

    def trainer(self, method: str, objective: str = "sft", **keys) -> Trainer:
        """An arm's trainer."""
        return make_trainer(hft.make_plan(self.config(method, objective, **keys)))

    def trl(self, **keys) -> Trainer:
        """HFT without this package: TRL's trainer on a model that was frozen and upcast by hand."""
        plan = hft.make_plan(self.config("hft", **keys))
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")
        frozen = set(plan.selection.frozen_parameters)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        upcast(model, autocast=plan.args.bf16)
        data = plan.data.train
        return SFTTrainer(model, plan.args, train_dataset=data, processing_class=plan.tokenizer)

    def full_reference(self) -> Trainer:
        """DPO with HFT and a full reference model."""
        plan = hft.make_plan(self.config("hft", "dpo"))
        reference = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")
        return hft.HFTDPOTrainer(
            self.model,
            plan.args,
            selection=plan.selection,
            ref_model=reference,
            train_dataset=plan.data.train,
            processing_class=plan.tokenizer,
        )

    def run(self, arms: dict[str, Callable[[], Measured]]) -> dict[str, list[Measured]]:
        """Measure arms in turn, every other round backwards."""
        found: dict[str, list[Measured]] = {name: [] for name in arms}
        for number in range(self.rounds):
            for name in list(arms)[:: -1 if number % 2 else 1]:
                found[name].append(arms[name]())
                print(f"round {number + 1}, {name}: {statistics.median(found[name][-1].step):.3f} s", flush=True)
        return found

    def arm(self, make: Callable[..., Trainer], *words, **keys) -> Callable[[], Measured]:
        """Something that measures an arm when it is called."""
        return partial(measure, partial(make, *words, **keys), self.rows, self.length)


def sft(bench: Bench, checkpointing: bool = False, methods: Sequence[str] = METHODS) -> str:
    """FFT, HFT and other methods, and HFT by hand right after HFT."""
    keys = {"activation_checkpointing": checkpointing}
    arms = {name: bench.arm(bench.trainer, name, **keys) for name in methods[:2]}
    arms["TRL, frozen by hand"] = bench.arm(bench.trl, **keys)
    arms |= {name: bench.arm(bench.trainer, name, **keys) for name in methods[2:]}
    found = bench.run(arms)
    planned = {name: forecast(bench.config(name, **keys)).memory.state for name in methods}
    ours, theirs = found["hft"], found["TRL, frozen by hand"]
    overhead = [median(a) / median(b) for a, b in zip(ours, theirs, strict=True)]
    same = all(a.losses[0] == b.losses[0] for a, b in zip(ours, theirs, strict=True))
    return (
        f"{table(found, planned)}\n\n{against_bound(ours, found['fft'])}\n\n"
        f"Relative to TRL with the same parameters frozen by hand, HFT's step takes {spread(overhead, 3)}; the "
        f"first step's loss is {'the same' if same else 'NOT the same'}."
    )


def equal(bench: Bench) -> str:
    """FFT and HFT in the memory that HFT takes without activation checkpointing."""
    layers = AutoConfig.from_pretrained(bench.model).num_hidden_layers
    bench.arm(bench.trainer, "hft")()  # what the first arm of a process allocates once is in no arm's peak
    budget = bench.arm(bench.trainer, "hft")().peak
    none, most = (
        bench.arm(bench.trainer, "fft", activation_checkpointing_layers=count)().peak for count in (0, layers)
    )
    count = fewest_layers(budget, none, most, layers)
    fft, half = f"fft, {count} of {layers} layers checkpointed", "hft, none checkpointed"
    arms = {
        fft: bench.arm(bench.trainer, "fft", activation_checkpointing_layers=count),
        half: bench.arm(bench.trainer, "hft"),
    }
    found = bench.run(arms)
    fits = "" if min(none, most) <= budget else " and still exceeds the budget"
    return (
        f"The budget is HFT's memory without checkpointing, {budget / 1e9:.2f} GB. FFT takes {none / 1e9:.2f} GB "
        f"with no layer checkpointed and {most / 1e9:.2f} GB with all {layers}, so it checkpoints {count}{fits}.\n\n"
        f"{table(found)}\n\n{against_bound(found[half], found[fft])}"
    )


def against_bound(half: list[Measured], full: list[Measured]) -> str:
    """How HFT's step and passes compare with FFT's, and with what their FLOPs allow."""
    ratios = [median(a) / median(b) for a, b in zip(half, full, strict=True)]
    passes = [passes_of(a) / passes_of(b) for a, b in zip(half, full, strict=True)]
    bound = half[0].flops / full[0].flops
    close = statistics.median(passes) <= 1.05 * bound
    return (
        f"Relative to FFT, HFT's step takes {spread(ratios, 3)}, its forward and backward pass {spread(passes, 3)}; "
        f"the FLOP bound is {bound:.3f}. The step is {statistics.median(ratios) / bound:.3f}x the bound, the passes "
        f"{statistics.median(passes) / bound:.3f}x, {'within' if close else 'NOT within'} 5% of it."
    )


def fewest_layers(budget: float, none: float, most: float, layers: int) -> int:
    """How many of so many layers to checkpoint so that a peak, of `none` or of all layers, comes down to a budget."""
    if none <= budget:
        return 0
    if none <= most:
        return layers
    return min(layers, math.ceil(layers * (none - budget) / (none - most)))


def dpo(bench: Bench) -> str:
    """HFT with a reference that shares the frozen half, against a full one."""
    arms = {
        "hft, shared reference": bench.arm(bench.trainer, "hft", "dpo"),
        "hft, full reference": bench.arm(bench.full_reference),
        "fft": bench.arm(bench.trainer, "fft", "dpo"),
    }
    return table(bench.run(arms))


def one_gpu(bench: Bench) -> str:
    """HFT of Llama-2-7B's shape, where FFT's 100 GiB of state do not fit."""
    arms = {
        "hft": bench.arm(bench.trainer, "hft"),
        "hft, checkpointing": bench.arm(bench.trainer, "hft", activation_checkpointing=True),
    }
    return table(bench.run(arms), {"hft": forecast(bench.config("hft")).memory.state})


RUN = {"sft": sft, "checkpointing": partial(sft, checkpointing=True), "equal": equal, "dpo": dpo, "7b": one_gpu}


def median(measured: Measured) -> float:
    """The median step of one round."""
    return statistics.median(measured.step)


def passes_of(measured: Measured) -> float:
    """Forward and backward pass of the median step of one round."""
    return statistics.median(map(sum, zip(measured.forward, measured.backward, strict=True)))


def spread(values: list[float], digits: int) -> str:
    """Median (minimum-maximum)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


TIMES = ("forward", "backward", "optimizer")
HEAD = ("", "step, s", "forward", "backward", "optimizer", "tokens/s", "step vs. first row", "passes", "bound")
HEAD += ("peak memory, GB", "weights, MB", "gradients", "optimizer state", "reference", "together", "planned")


def table(found: dict[str, list[Measured]], planned: dict[str, float] | None = None) -> str:
    """A row per arm; the first is what the others are held against, round by round."""
    first = next(iter(found.values()))
    lines = [" | ".join(HEAD), " | ".join("---" for _ in HEAD)]
    for name, rounds in found.items():
        times = {part: [seconds for one in rounds for seconds in getattr(one, part)] for part in TIMES}
        steps = [seconds for one in rounds for seconds in one.step]
        pairs = list(zip(rounds, first, strict=True))
        one = rounds[0]
        cells = [
            name,
            spread(steps, 3),
            *(f"{statistics.median(values):.3f}" for values in times.values()),
            f"{one.tokens / statistics.median(steps):.0f}",
            spread([median(a) / median(b) for a, b in pairs], 3),
            f"{statistics.median(passes_of(a) / passes_of(b) for a, b in pairs):.3f}",
            f"{one.flops / first[0].flops:.3f}",
            spread([m.peak / 1e9 for m in rounds], 2),
            *(f"{size / 1e6:.1f}" for size in (one.weights, one.gradients, one.states, one.reference, one.state)),
            f"{planned[name] / 1e6:.1f}" if planned and name in planned else "",
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def write_rows(folder: Path, rows: int, length: int) -> None:
    """Conversations that are longer than a row holds, so that all rows are cut to the same length."""
    folder.mkdir(parents=True)
    answers = [" ".join(f"{number * 7919 % 1000 + row}" for number in range(length)) for row in range(2 * rows)]
    chats = [[{"role": "user", "content": "Count."}, {"role": "assistant", "content": answer}] for answer in answers]
    pairs = [
        {"prompt": chat[:1], "chosen": chat[1:], "rejected": other[1:]}
        for chat, other in zip(chats, chats[::-1], strict=True)
    ]
    for name, lines in {"sft": [{"messages": chat} for chat in chats], "dpo": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_model(name: str, folder: Path, tokenizer: str = "models/tiny") -> str:
    """The folder of a model: one that is there, or random weights in one of `SHAPES` with a tokenizer of 2,048."""
    if name not in SHAPES:
        return name
    if not folder.exists():
        shape = SHAPES[name]
        config = AutoConfig.from_pretrained(shape) if isinstance(shape, Path) else shape
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def device_name() -> str:
    """The GPU's name, or that of the processor and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    threads = torch.get_num_threads()
    return f"{found[1] if found else platform.processor()}, {threads} thread{'s' if threads > 1 else ''}"


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> str:
    """A sentence with the versions that a number depends on."""
    names = ("torch", "transformers", "trl", "accelerate", "peft")
    return f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in names)}."


def not_run(parts: list[str]) -> str:
    """Which parts did not run, and the commands that run them."""
    missing = [part for part in PARTS if part not in parts]
    if not missing:
        return ""
    where = "" if torch.cuda.is_available() else " On a GPU `make bench` runs all of them, the last on one of 80 GB."
    commands = "\n".join(f'- {PARTS[part]}: `make bench ARGS="--parts {part}"`' for part in missing)
    return f"## Not run here\n\n{commands}\n\nThey overwrite the file; `--out FILE` writes another.{where}\n"


def parse() -> argparse.Namespace:
    """The options, with defaults by device."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llama-1.1b" if gpu else "models/smollm2-135m", help="folder or shape")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS) if gpu else ["sft", "equal"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10 if gpu else 2, help="measured in each round, after another one")
    parser.add_argument("--rows", type=int, default=2, help="per step")
    parser.add_argument("--length", type=int, default=2048 if gpu else 256, help="tokens per row")
    parser.add_argument("--out", type=Path, help="by default results/bench/DEVICE.md")
    return parser.parse_args()


def main() -> None:
    """Run the parts and write each as soon as it is there."""
    options = parse()
    disable_progress_bar()
    out = options.out or Path(f"results/bench/{slug(device_name())}.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    text = (
        f"# What a step costs: {device_name()}\n\n"
        f'    make bench ARGS="--parts {" ".join(options.parts)} --model {options.model} --rounds {options.rounds} '
        f'--steps {options.steps} --rows {options.rows} --length {options.length}"\n\n'
        f"{(Path(__file__).with_name('bench.md')).read_text()}\n"
        f"{versions()}\n\n"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for part in options.parts:
            name, rows = ("llama2-7b", 1) if part == "7b" else (options.model, options.rows)
            folder = Path(temporary)
            model = make_model(name, folder / name)
            write_rows(folder / part, rows * (options.steps + 1), options.length)
            bench = Bench(model, folder / part, rows, options.length, options.steps, options.rounds)
            shape = f"{rows} rows of {options.length} tokens per step; {options.rounds} rounds of {options.steps} "
            shape += f"steps, n = {options.rounds * options.steps}."
            text += f"## {PARTS[part]}: {Path(name).name}\n\n{shape}\n\n{RUN[part](bench)}\n\n"
            out.write_text(text + not_run(options.parts))
    print(f"{text}{not_run(options.parts)}\n{out}")


if __name__ == "__main__":
    main()
