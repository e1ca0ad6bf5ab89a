"""The path of the 8-GPU recipes on two CPU processes: python benchmarks/fsdp2_cpu.py MODEL DATA.

MODEL and DATA are what `hft fetch tiny` and `hft demo` write. Prints the tables of results/fsdp2-cpu.md: losses,
log-probabilities and rewards of one process, and of two under FSDP2 with accelerate's own precision (before) and with
ours (after); and the bytes that one process holds. Bytes kept for the backward pass are those of all tensors that
autograd saves in one micro-batch, each storage once, parameters aside.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))
from fsdp2_on_cpu import choose_fsdp, set_environment

ARMS = {"one process": 1, "two, before": 2, "two, after": 2}


def saved_bytes(forward) -> int:
    """Bytes that autograd keeps of a forward pass."""
    seen: dict[int, int] = {}

    def pack(tensor):
        if not tensor.is_leaf:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(seen.values())


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def worker(objective: str, model: str, data: str, out: str, arm: str) -> None:
    if ARMS[arm] > 1:
        set_environment()
        choose_fsdp()
    import hft
    from hft.machine import is_main, leave_process_group
    from hft.runs.train import make_trainer
    from hft.training.mixin import HalfFineTuning

    if arm == "two, before":
        del HalfFineTuning.create_accelerator_and_postprocess
    flags = {"model_name_or_path": model, "dataset_name": f"{data}/{objective}", "output_dir": out, "max_steps": 4}
    flags |= {"report_to": "none", "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no", "bf16": True}
    flags |= {"global_batch_size": 8, "per_device_train_batch_size": 8 // ARMS[arm], "logging_steps": 1}
    files = [f"recipes/tiny/{objective}.yaml", "recipes/methods/hft.yaml"]
    found = {}
    for checkpointing in (False, True):
        config = hft.load_config(objective, *files, **flags, activation_checkpointing=checkpointing)
        trainer = make_trainer(hft.make_plan(config))
        kept, compute_loss = [], trainer.compute_loss

        def measured(*args, compute_loss=compute_loss, kept=kept, **kwargs):
            result = []
            kept.append(saved_bytes(lambda: result.append(compute_loss(*args, **kwargs))))
            return result[0]

        trainer.compute_loss = measured
        trainer.train()
        name = "saved_checkpointed" if checkpointing else "saved"
        found[name] = max(kept)
        if not checkpointing:
            rows = [row for row in trainer.state.log_history if "loss" in row]
            found |= {"losses": [row["loss"] for row in rows], "first": rows[0]}
            found["parameters"] = sum(local(p).nbytes for p in trainer.model.parameters())
            states = trainer.optimizer.state.values()
            found["optimizer"] = sum(local(t).nbytes for one in states for t in one.values() if t.dim())
    if is_main():
        Path(out, "found.json").write_text(json.dumps(found))
    leave_process_group()


def main(model: str, data: str) -> None:
    versions = ", ".join(
        f"{name} {__import__(name).__version__}" for name in ("torch", "transformers", "trl", "accelerate")
    )
    print(f"{versions}; {Path(model).name}, global batch 8, 4 steps, bf16, n = 1\n")
    for objective in ("sft", "dpo"):
        found = {}
        for arm, processes in ARMS.items():
            out = tempfile.mkdtemp()
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            words = [
                sys.executable,
                *(launch if processes > 1 else []),
                __file__,
                "worker",
                objective,
                model,
                data,
                out,
                arm,
            ]
            env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
            subprocess.run(words, check=True, env=env, capture_output=True)
            found[arm] = json.loads(Path(out, "found.json").read_text())
        print(f"## {objective.upper()}\n\n| | {' | '.join(found)} |\n| --- |{' --- |' * len(found)}")
        lines = {"loss, steps 1 to 4": [" ".join(f"{loss:.4f}" for loss in f["losses"]) for f in found.values()]}
        keys = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected") if objective == "dpo" else ()
        lines |= {f"{key}, step 1": [f"{f['first'][key]:.5g}" for f in found.values()] for key in keys}
        names = {"parameters": "parameters", "optimizer": "optimizer state", "saved": "kept for the backward pass"}
        names["saved_checkpointed"] = "the same with activation checkpointing"
        lines |= {f"{name}, MB": [f"{f[key] / 1e6:.2f}" for f in found.values()] for key, name in names.items()}
        print("\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items()), end="\n\n", flush=True)


if __name__ == "__main__":
    worker(*sys.argv[2:]) if sys.argv[1] == "worker" else main(*sys.argv[1:])
