"""`hft plan`: what it prints for GPUs that are not here."""

import json
import re
import shutil

import pytest

from hft.cli import main
from hft.planning.forecast import flops_to_fft
from tests.conftest import error_of

LLAMA = ["--config", "recipes/llama2-7b/sft.yaml", "recipes/methods/hft.yaml", "--max_steps", "100"]


SIZES = ("much", "-80GiB", "80 elephants")


def plan(capsys, *words):
    """The rows of the table that a plan prints, by name, and all that it prints."""
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    cost = out.partition("\ncost\n")[2]
    return {name: cells.split() for name, cells in re.findall(r"^ {4}(\S.*?)  +(\S.*)$", cost, re.M)}, out


def test_a_7b_is_planned_for_8_gpus_that_are_not_here(capsys):
    rows, out = plan(capsys, "sft", *LLAMA, "--max_steps", "5098", "--gpus", "8", "--gpu_memory", "80GiB")
    assert re.search(r"GiB per device: +fft +hft +upper half", out)
    assert "FSDP2 over 8; 4 x 4,096 tokens per device; 32 of 32 layers checkpointed" in out
    assert "global batch 128 = 4 rows x 8 processes x 4 accumulation steps" in out
    assert rows["fits"] == ["yes"] * 3
    fft, hft, rival = map(int, rows["fewest checkpointed layers"])
    assert fft > hft > rival == 0
    assert "hft fits" in out
    # FLOPs per token times tokens, at the stated rate.
    for per_token, hours in zip(rows["sum"], rows["GPU-hours"], strict=True):
        needed = 5098 * 128 * 4096 * float(per_token) * 1e9 / (0.4 * 312e12) / 3600
        assert int(hours) == pytest.approx(needed, abs=0.6)
    assert "of 80 GiB, 5% reserved:" in out
    assert "loaded, nothing was written" in out


def test_a_plan_says_what_to_change(capsys):
    one = ["--gpus", "1", "--per_device_train_batch_size", "2"]
    _, out = plan(capsys, "sft", *LLAMA, *one, "--gpu_memory", "80GiB", "--activation_checkpointing", "false")
    assert re.search(r"hft does not fit: short by [\d.]+ GiB: fits with --activation_checkpointing_layers \d+", out)
    _, out = plan(capsys, "sft", *LLAMA, *one, "--gpu_memory", "71GiB")
    assert "GiB: lower --per_device_train_batch_size from 2 to 1" in out
    _, out = plan(capsys, "sft", *LLAMA, *one, "--gpu_memory", "71GiB", "--per_device_train_batch_size", "1")
    assert "hft fits" in out
    _, out = plan(capsys, "sft", *LLAMA, "--gpus", "8", "--gpu_memory", "17GiB")
    assert "lower --per_device_train_batch_size from 4 to 2" in out  # 3 rows do not make a global batch of 128
    _, out = plan(capsys, "sft", *LLAMA, "--gpus", "8", "--gpu_memory", "80GiB", "--max_length", "200000")
    assert "one row with all layers checkpointed is too long: lower --max_length" in out
    _, out = plan(capsys, "sft", *LLAMA, *one, "--gpu_memory", "40GiB")
    assert "GiB of it state: shard it over several GPUs with FSDP2" in out
    _, out = plan(capsys, "sft", *LLAMA, "--gpus", "2", "--gpu_memory", "24GiB")
    assert "GiB of it state: shard it over more GPUs" in out


def test_what_is_not_known_of_the_machine_or_the_run_is_left_out(capsys):
    _, out = plan(capsys, "sft", *LLAMA, "--gpus", "8", "--max_length", "none")
    assert "100 steps\n" in out
    rows, out = plan(capsys, "sft", *LLAMA, "--gpus", "8")
    assert "reserved" not in out.partition("\ncost\n")[2].partition("the peak")[0]
    assert "fits" not in rows
    assert main(["plan", "sft", *LLAMA, "--gpus", "8", "--activation_checkpointing_layers", "auto"]) == 2
    assert "auto depends on the GPU's memory; add --gpu_memory" in error_of(capsys)
    osf = [*LLAMA[:2], "recipes/methods/osf.yaml", "--max_steps", "9", "--gpus", "8"]
    _, out = plan(capsys, "sft", *osf, "--gpu_memory", "80GiB")
    assert "does not fit: the state alone takes" in out
    assert "of the 76.0 GiB that a device can give" in out


def test_the_optimizer_and_a_strategy_count(capsys, tmp_path):
    gpus = ["--gpus", "8", "--gpu_memory", "80GiB"]
    rows, out = plan(capsys, "sft", *LLAMA, *gpus)
    moments = float(rows["optimizer moments"][1])
    assert moments > 3
    rows, _ = plan(capsys, "sft", *LLAMA, *gpus, "--optim", "sgd")
    assert "optimizer moments" not in rows
    rows, out = plan(capsys, "sft", *LLAMA, *gpus, "--optim", "adamw_bnb_8bit")
    assert float(rows["optimizer moments"][1]) == moments
    assert "the state of adamw_bnb_8bit is not known; planned is that of AdamW" in out
    pairs = ["dpo", "--config", "recipes/llama2-7b/dpo.yaml", LLAMA[2], "--max_steps", "9", *gpus]
    padded, _ = plan(capsys, *pairs)
    assert plan(capsys, *pairs, "--padding_free", "true")[0] == padded  # which TRL's DPO does not do
    fft = [*LLAMA[:2], "recipes/methods/fft.yaml", "--max_steps", "9", *gpus]
    memory = tmp_path / "memory.jsonl"
    memory.write_text('{"prompt": "a", "completion": "b", "task": "0"}\n')
    rows, out = plan(capsys, "sft", *fft, "--strategy", "gem", "--strategy_data", str(memory))
    assert float(rows["method"][1]) > float(rows["method"][0]) == 0
    assert float(rows["strategy"][1]) == pytest.approx(float(rows["sum"][0]) / 128, rel=0.05)  # one row, in 128
    assert (
        plan(capsys, "sft", *fft, "--strategy", "gem")[1].count("of gem no row is counted; hft continual --dry_run")
        == 1
    )


def test_the_rival_is_cheap_only_without_checkpointing(capsys):
    few = ["--gpus", "8", "--gpu_memory", "80GiB", "--per_device_train_batch_size", "1"]
    rows, _ = plan(capsys, "sft", *LLAMA, *few, "--activation_checkpointing", "false")
    assert rows["relative to fft"][2] == "0.669"
    rows, _ = plan(capsys, "sft", *LLAMA, *few)
    assert float(rows["relative to fft"][2]) > 0.88


def test_costs_that_are_not_known_are_said_so(capsys):
    files = ["--config", "recipes/llama2-7b/sft.yaml"]
    for method, said in (("lora", "of an adapter are not known"), ("lisa", "under schedule lisa are not known")):
        _, out = plan(capsys, "sft", *files, f"recipes/methods/{method}.yaml", "--max_steps", "9", "--gpus", "8")
        assert said in out
        assert "per device before activations" in out


def test_without_its_rows_a_plan_ends_with_the_costs(capsys):
    _, out = plan(capsys, "dpo", *LLAMA[:1], "recipes/llama2-7b/dpo.yaml", LLAMA[2], "--gpus", "8")
    assert "steps and GPU-hours are not known: cannot load dataset" in out
    assert "or give --max_steps" in out


def test_wrong_values_are_refused(capsys):
    for words, message in (
        (["--gpus", "0"], "gpus: expected a number greater than 0, got '0'"),
        *((["--gpu_memory", size], "gpu_memory: expected a size such as 80GiB") for size in SIZES),
        (["--gpu_memory", "80"], "gpu_memory: expected a number greater than or equal to 1048576, got '80'"),
        (["--gpu_memory", "1,000GiB"], "gpu_memory: expected a number greater than or equal to 1048576"),
        (["--mfu", "40"], "mfu: expected a number less than or equal to 1, got '40'"),
        (["--model_init_kwargs", '{"dtype": "load"}'], "torch has no dtype 'load'"),
        (["--model_init_kwargs", "float32"], "model_init_kwargs: expected a mapping, got 'float32'"),
        (["--gpus", "7"], "is not a multiple of 4 rows per device x 7 processes"),
    ):
        assert main(["plan", "sft", *LLAMA, *words]) == 2
        assert message in error_of(capsys)


def test_flops_of_a_finished_run_are_those_of_the_layers_that_it_checkpointed(finished, tmp_path):
    """With `auto` only its result knows how many those were."""
    for name in ("config.yaml", "results.json", "config.json"):
        shutil.copy(finished / name, tmp_path / name)
    ratios = [flops_to_fft(tmp_path)]
    config = (tmp_path / "config.yaml").read_text().replace("activation_checkpointing: false\n", "")
    (tmp_path / "config.yaml").write_text(config + "activation_checkpointing_layers: auto\n")
    result = json.loads((tmp_path / "results.json").read_text())
    for layers in (0, 4):
        result["machine"]["activation_checkpointing_layers"] = layers
        (tmp_path / "results.json").write_text(json.dumps(result))
        ratios.append(flops_to_fft(tmp_path))
    assert ratios[0] == ratios[1] < ratios[2] < 1
