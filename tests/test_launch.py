"""How commands come to run on several processes, and the scripts in recipes/launch for several nodes."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch as accelerate
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hft.cli import COMMANDS, LAUNCHED, main
from hft.runs.config import parse_config
from tests.conftest import ROOT, error_of

LAUNCH = ROOT / "recipes" / "launch"
LLAMA = ["--config", "recipes/llama2-7b/sft.yaml"]
# Of SkyPilot's task YAML (docs.skypilot.co/en/latest/reference/yaml-spec.html).
SKY_KEYS = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run", "config"}
SKY_RESOURCES = {"infra", "accelerators", "cpus", "memory", "disk_size", "use_spot", "image_id", "any_of", "autostop"}


@pytest.fixture
def launched(monkeypatch):
    """Give a machine some GPUs, run a command line, and see what it launches, or None if it runs in this process."""

    def run(*words: str, gpus: int = 8, fails: Exception | None = None):
        seen = []

        def launch_command(options):
            seen.append(options)
            if fails:
                raise fails

        for name in LAUNCHED:
            monkeypatch.setitem(COMMANDS, name, ("tests.test_launch:in_this_process", ""))
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        monkeypatch.setattr(accelerate, "launch_command", launch_command)
        status = main(words)
        return (seen[0] if seen else None), status

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    HERE.clear()
    return run


HERE = []


def in_this_process(*arguments) -> int:
    HERE.append(list(arguments[-1]))
    return 0


@pytest.mark.parametrize(
    ("words", "engine", "processes"),
    [
        (["sft", *LLAMA, "recipes/methods/hft.yaml"], "fsdp2", 8),
        (["sft", *LLAMA, "recipes/methods/lora.yaml", "--max_steps", "3"], "ddp", 8),
        (["sft", *LLAMA, "recipes/methods/lora.yaml", "recipes/methods/hft.yaml"], "fsdp2", 8),
        (["sft", *LLAMA, "--adapter", "lora"], "ddp", 8),
        (["dpo", *LLAMA, "--num_processes", "4", "--engine=ddp"], "ddp", 4),
        (["continual", *LLAMA, "--strategy", "self-replay", "--num-processes", "2"], "ddp", 2),
        (["cpi", "probe", *LLAMA], "fsdp2", 8),
        (["eval", "runs/a", "--suite", "general"], "ddp", 8),
    ],
)
def test_the_visible_gpus_are_taken_with_the_engine_of_the_method(launched, capsys, words, engine, processes):
    options, status = launched(*words)
    assert status == 0
    assert Path(options.config_file).name == f"{engine}.yaml"
    assert Path(options.config_file).is_file()
    assert (options.num_processes, options.num_machines, options.training_script) == (processes, 1, "hft")
    flags = ("--engine", "--num_processes", "--num-processes", str(processes))
    assert options.training_script_args == [word for word in words if not word.startswith(flags)]
    assert f"launching {processes} processes with {engine}" in capsys.readouterr().out
    assert not HERE


@pytest.mark.parametrize(
    ("words", "gpus", "visible"),
    [
        (["sft", *LLAMA], 1, None),
        (["sft", *LLAMA], 0, None),
        (["sft", *LLAMA, "--num_processes", "1"], 8, "0"),
        (["cpi", "score", *LLAMA], 8, "0"),
        (["eval", "runs/a", "--backend", "vllm"], 8, None),
    ],
)
def test_one_process_is_this_one(launched, monkeypatch, words, gpus, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launched(*words, gpus=gpus) == (None, 0)
    assert [[word for word in words[1:] if word not in ("--num_processes", "1")]] == HERE
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_what_a_launcher_has_started_launches_nothing(launched, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launched("sft", *LLAMA) == (None, 0)


def test_all_of_cpi_ends_with_its_scores_in_one_process(launched):
    assert launched("cpi", *LLAMA, "--engine", "fsdp2")[0].training_script_args == ["cpi", *LLAMA]
    assert [["score", *LLAMA]] == HERE


def test_zero3_has_its_deepspeed_config(launched, monkeypatch):
    monkeypatch.setattr("hft.launch.find_spec", lambda name: name)
    options, _ = launched("sft", *LLAMA, "--engine", "zero3")
    assert Path(options.deepspeed_config_file).is_file()


@pytest.mark.parametrize(
    ("fails", "status"),
    [
        (ChildFailedError("hft", {1: ProcessFailure(1, 1, 2, "none")}), 2),
        (ChildFailedError("hft", {0: ProcessFailure(0, 1, 143, "none")}), 143),
        (ChildFailedError("hft", {3: ProcessFailure(3, 1, -9, "none")}), 137),
        (SignalException("stopped", signal.SIGTERM), 143),
    ],
)
def test_the_status_is_that_of_the_processes(launched, capsys, fails, status):
    assert launched("sft", *LLAMA, fails=fails)[1] == status
    assert ("hft: process 3 was killed by SIGKILL" in capsys.readouterr().err) == (status == 137)


@pytest.mark.parametrize(
    ("flags", "gpus", "message"),
    [
        (["--num_processes", "8"], 4, "--num_processes 8 needs 8 GPUs on this machine, and 4 are visible"),
        (["--num_processes", "0"], 4, "--num_processes 0 must be a multiple of --num_machines 1"),
        (["--num_processes", "9", "--num_machines", "2"], 8, "must be a multiple of --num_machines 2"),
        (["--num_machines", "2"], 8, "needs --main_process_ip, the address of machine 0"),
        (["--num_processes", "2", "--engine", "fsdp2"], 0, "none is visible; take --engine ddp"),
        (["--engine", "zero3"], 8, "needs DeepSpeed: pip install 'half-fine-tuning[deepspeed]'"),
        (["--engine", "fsdp"], 8, "invalid choice: 'fsdp'"),
        (["--adapter", "lorra"], 8, "unknown adapter 'lorra'"),
    ],
)
def test_what_cannot_be_launched_is_one_sentence(launched, capsys, monkeypatch, flags, gpus, message):
    monkeypatch.setattr("hft.launch.find_spec", lambda name: None)
    assert launched("sft", *LLAMA, *flags, gpus=gpus) == (None, 2)
    assert message in error_of(capsys)


def sky() -> dict:
    return yaml.safe_load((LAUNCH / "sky.yaml").read_text())


def scripts() -> dict[str, str]:
    task = sky()
    return {"slurm": (LAUNCH / "slurm.sh").read_text(), "sky setup": task["setup"], "sky run": task["run"]}


@pytest.mark.parametrize("name", ["slurm", "sky setup", "sky run"])
def test_the_scripts_parse(name):
    subprocess.run(["bash", "-n"], input=scripts()[name], text=True, check=True)


def test_skypilot_knows_every_key():
    task = sky()
    assert task.keys() <= SKY_KEYS
    assert task["resources"].keys() <= SKY_RESOURCES
    assert re.fullmatch(r"[\w-]+:\d+", task["resources"]["accelerators"])
    assert task["num_nodes"] > 1


@pytest.fixture
def second_node(tmp_path):
    """What a script runs on the second of two nodes: the words after `hft`."""
    for name, body in {
        ".venv/bin/hft": f'printf "%s\\n" "$@" > {tmp_path}/words',
        "bin/srun": 'SLURM_NODEID=1 "$@"',
        "bin/scontrol": "echo 10.0.0.1; echo 10.0.0.2",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(script: str, *words: str, **env: str) -> list[str]:
        path = f"{tmp_path}/bin:/usr/bin:/bin"
        command = ["bash", "-c", script, "script", *words]
        subprocess.run(command, cwd=tmp_path, env={"PATH": path} | env, check=True)
        return (tmp_path / "words").read_text().splitlines()

    return run


@pytest.mark.parametrize("name", ["slurm", "slurm zero3", "sky run"])
def test_the_scripts_launch_on_every_node(second_node, launched, tmp_path, monkeypatch, name):
    monkeypatch.setattr("hft.launch.find_spec", lambda name: name)
    env = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    env |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    more = ["sft", *LLAMA, "--engine", "zero3"] if name.endswith("zero3") else []
    words = second_node(scripts()[name.removesuffix(" zero3")], *more, **env, **sky()["envs"])
    options, _ = launched(*words)
    assert (options.machine_rank, options.num_machines, options.num_processes) == (1, 2, 16)
    assert (options.main_process_ip, options.main_process_port) == ("10.0.0.1", 29500)
    assert Path(options.config_file).stem == ("zero3" if more else "fsdp2")
    objective, *arguments = options.training_script_args
    assert parse_config(objective, arguments).values["global_batch_size"] % 16 == 0
