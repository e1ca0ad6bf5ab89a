"""On GPUs: one, and all there are under FSDP2."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hft.cli import main
from hft.planning.forecast import forecast
from hft.runs.config import load_config
from tests.conftest import command, identical, tensors, write_jsonl

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize(
    ("stage", "method"),
    [
        ("sft", "hft"),
        ("dpo", "hft"),
        *(("sft", m) for m in ("random-element", "lisa", "mixout", "mofo", "gmt", "lora")),
    ],
)
def test_one_gpu(tmp_path, tiny, data, pairs, stage, method):
    words = command(stage, tmp_path / "out", method=method, model=tiny, data=data if stage == "sft" else pairs)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    run = subprocess.run([sys.executable, "-m", "hft", *words], env=environment, check=False)
    assert run.returncode == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["peak_memory_gb"] < 4


def wide_model(tiny, folder, width: int) -> None:
    """Random weights in tiny's shape with wider layers, whose tensors outweigh what CUDA's libraries take."""
    config = AutoConfig.from_pretrained(tiny)
    config.hidden_size, config.intermediate_size, config.head_dim, config.num_hidden_layers = width, 3 * width, 64, 8
    config.num_attention_heads = config.num_key_value_heads = width // 64
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)


@pytest.mark.parametrize("method", ["hft", "fft"])
@pytest.mark.parametrize("layers", [0, 8])
def test_the_planned_peak_is_that_of_the_run(tmp_path, tiny, method, layers):
    """Of full rows, and with gradients of an earlier micro-batch."""
    wide_model(tiny, tmp_path / "wide", 2048)
    chat = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": " ".join(map(str, range(2000)))}]
    data = write_jsonl(tmp_path / "sft.jsonl", [{"messages": chat}] * 32)
    rows = ["--max_length", "1024", "--per_device_train_batch_size", "4", "--global_batch_size", "8"]
    flags = [*rows, "--activation_checkpointing_layers", str(layers)]
    words = command("sft", tmp_path / "out", *flags, method=method, model=tmp_path / "wide", data=data)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    subprocess.run([sys.executable, "-m", "hft", *words], env=environment, check=True)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    planned = forecast(load_config("sft", tmp_path / "out" / "config.yaml")).memory.total
    assert result["peak_memory_gb"] * 1e9 == pytest.approx(planned, rel=0.1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("stage", "method"), [("dpo", "hft"), *(("sft", m) for m in ("hft", "random-element", "lisa", "mofo", "mixout"))]
)
def test_fsdp2_keeps_the_frozen_half_and_saves_the_stored_dtype(tmp_path, tiny, data, pairs, stage, method):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "hft/accelerate/fsdp2.yaml"]
    settings = ["--global_batch_size", "8", "--per_device_train_batch_size", "4"]
    words = command(
        stage, tmp_path / "out", *settings, method=method, model=tiny, data=data if stage == "sft" else pairs
    )
    run = subprocess.run([*launch, "--num_processes", "2", "-m", "hft", *words], check=False)
    assert run.returncode == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert not identical(tensors(tmp_path / "out")["lm_head.weight"], tensors(tiny)["lm_head.weight"])
