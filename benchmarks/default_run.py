"""What the default run takes under other settings: python benchmarks/default_run.py [--rounds 5 ...].

Each arm is the recipe of `make sft-hft`, or of `make dpo-hft`, with a few keys changed. All follow each other in one
process, once a round, every other round backwards; the first step of each does not count. `--profile` prints instead
which operators a step spends its time in.
"""

import argparse
import tempfile
import time

import torch
from bench import spread
from transformers import Trainer, TrainerCallback
from transformers.utils.logging import disable_progress_bar

import hft
from hft.runs.train import make_trainer

# Each a change of the recipe that leaves what is learned alone, but for rounding and, if rows are packed, their order.
ARMS = {
    "the recipe": {},
    "sdpa attention": {"model_init_kwargs": {"attn_implementation": "sdpa"}},
    "half the rows": {"per_device_train_batch_size": 2},
    "twice the rows": {"per_device_train_batch_size": 8},
    "twice the rows, padding-free": {"per_device_train_batch_size": 8, "padding_free": True, "max_length": None},
    "packed": {"per_device_train_batch_size": 2, "global_batch_size": 4, "packing": True},
    "fp32": {"bf16": False},
}


class Clock(TrainerCallback):
    """Seconds per 1,000 tokens, without padding, over all steps but the first."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.start, self.tokens = time.perf_counter(), state.num_input_tokens_seen

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = 1000 * (time.perf_counter() - self.start) / (state.num_input_tokens_seen - self.tokens)


def trainer_of(objective: str, folder: str, steps: int, **keys) -> Trainer:
    """A trainer of the default run with some keys changed."""
    files = (f"recipes/smollm2-135m/{objective}.yaml", "recipes/methods/hft.yaml")
    few = {"output_dir": f"{folder}/out", "max_steps": steps, "eval_strategy": "no", "eval_on_start": False}
    few |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return make_trainer(hft.make_plan(hft.load_config(objective, *files, **few | keys)))


def compare(options: argparse.Namespace) -> str:
    """A row per arm: seconds per 1,000 tokens, and what they are of the first arm's in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in options.arms}
    for number in range(options.rounds):
        for name in options.arms[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                trainer, clock = trainer_of(options.objective, folder, options.steps + 1, **ARMS[name]), Clock()
                trainer.add_callback(clock)
                trainer.train()
            seconds[name].append(clock.seconds)
            print(f"round {number + 1}, {name}: {clock.seconds:.2f} s", flush=True)
    lines = ["| | s per 1,000 tokens | relative to the first row |", "| --- | --- | --- |"]
    for name, found in seconds.items():
        ratios = [ours / first for ours, first in zip(found, seconds[options.arms[0]], strict=True)]
        lines.append(f"| {name} | {spread(found, 2)} | {spread(ratios, 3)} |")
    return "\n".join(lines)


def profile(options: argparse.Namespace) -> str:
    """The operators that the steps after the first one spend most time in, by their own time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities)

    class Profile(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                profiler.start()

        def on_train_end(self, args, state, control, **kwargs):
            profiler.stop()

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(options.objective, folder, options.steps + 1, **ARMS[options.arms[0]])
        trainer.add_callback(Profile())
        trainer.train()
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50)


def main() -> None:
    """Compare the arms, or profile the first."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--objective", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="measured in each round, after another one")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    disable_progress_bar()
    print(profile(options) if options.profile else compare(options))


if __name__ == "__main__":
    main()
