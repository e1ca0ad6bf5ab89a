"""The scripts in recipes/launch that start a run on several nodes."""

import re
import shlex
import subprocess

import pytest
import yaml

from hft.runs.config import parse_config
from tests.conftest import ROOT

LAUNCH = ROOT / "recipes" / "launch"
# Of SkyPilot's task YAML (docs.skypilot.co/en/latest/reference/yaml-spec.html).
SKY_KEYS = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run", "config"}
SKY_RESOURCES = {"infra", "accelerators", "cpus", "memory", "disk_size", "use_spot", "image_id", "any_of", "autostop"}


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


@pytest.mark.parametrize("name", ["slurm", "sky run"])
def test_accelerate_knows_every_flag(name):
    from accelerate.commands.launch import launch_command_parser

    [command] = re.findall(r"accelerate launch (.*?-m hft)", scripts()[name].replace("\\\n", " "), re.DOTALL)
    values = {"SKYPILOT_NODE_RANK": "1", "SLURM_NODEID": "1", "head": "10.0.0.1", "engine": "fsdp2"}
    command = re.sub(r"\$\(\(.*?\)\)|\$\(echo.*?\)", "16", command)
    command = re.sub(r"\$(\w+)", lambda found: values.get(found[1], "2"), command)
    options = launch_command_parser().parse_args([*shlex.split(command)])
    assert (options.machine_rank, options.num_machines, options.training_script) == (1, 2, "hft")
    assert (ROOT / options.config_file).exists()


@pytest.mark.parametrize("name", ["slurm", "sky"])
def test_what_they_run_is_a_run(name):
    words = re.search(r"set -- (.*)", scripts()["slurm"])[1] if name == "slurm" else sky()["envs"]["RUN"]
    objective, *arguments = shlex.split(words)
    assert parse_config(objective, arguments).values["global_batch_size"] % 16 == 0
