"""Adapters as methods: trained through the command line, then held against PEFT's own arithmetic."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hft.cli import main
from hft.config import read_yaml
from hft.data import load_split, preference_rows
from hft.errors import HFTError
from hft.machine import cpu_has_bfloat16
from hft.methods import check_parts, method_of
from hft.methods.adalora import orthogonality
from hft.methods.adapter import Adapter
from hft.methods.gmt import GMT
from hft.methods.lora import LoRA
from hft.record.manifest import Manifest
from hft.training import with_adapter
from tests.conftest import error_of, identical, losses, tensors
from tests.model.test_architectures import small

METHODS = ("lora", "qlora", "adalora", "p-tuning-v2", "osf")
# Small steps: what is tested does not need large ones.
SMALL = ["--per_device_train_batch_size", "4", "--global_batch_size", "4", "--max_length", "64"]


def config(**more) -> Adapter:
    """A method's YAML as its adapter."""
    return method_of(read_yaml(f"recipes/methods/{more.pop('method')}.yaml") | more).adapter


def trainer_of(stage, out: Path, tiny: Path, rows, adapter: Adapter, **settings):
    cls, config_class = (SFTTrainer, SFTConfig) if stage == "sft" else (DPOTrainer, DPOConfig)
    settings = {"max_length": 64, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False} | settings
    args = config_class(output_dir=str(out), report_to="none", disable_tqdm=True, **settings)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = Path("hft/demo/templates/tulu.jinja").read_text()
    return with_adapter(cls)(str(tiny), args, adapter=adapter, train_dataset=rows, processing_class=tokenizer)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, data):
    """Twenty steps of each method, evaluated before and after."""
    from tests.conftest import command

    folder, base = tmp_path_factory.mktemp("adapters"), Path(os.path.relpath(tiny))
    evaluation = ["--eval_strategy", "steps", "--eval_on_start", "true", "--eval_steps", "20", "--eval_rows", "8"]
    steps = ["--max_steps", "20", "--save_steps", "10", "--chat_template_path", "hft/demo/templates/tulu.jinja"]

    def run(method: str) -> Path:
        if method == "qlora":
            pytest.importorskip("bitsandbytes")
        out = folder / method
        if not out.exists():
            assert main(command("sft", out, *SMALL, *steps, *evaluation, method=method, model=base, data=data)) == 0
        return out

    return run


@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_learns_and_leaves_the_base_as_it_was(runs, tiny, method):
    out = runs(method)
    results = json.loads((out / "results.json").read_text())
    before, after = results["held_out"]["loss"]
    assert after < before - 0.05
    assert (results["verify"]["identical"], results["verify"]["broken"]) == (39, 0)
    assert results["verify"]["changed"] > 0
    assert results["verify"]["unchanged"] == 0
    assert not (out / "model.safetensors").exists()
    assert not (out / "selection.png").exists()
    manifest = Manifest.load(out)
    assert (manifest.selection["adapter"], manifest.trained_units) == (method, [])
    assert 0 < results["trainable_fraction"]["model"] < 0.6


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_is_a_plain_peft_folder(runs, tiny, method):
    """What PEFT loads computes what was trained; where it can be merged, so does the merged model."""
    out = runs(method)
    assert PeftConfig.from_pretrained(out).base_model_name_or_path == str(tiny)
    for folder in (out, out / "checkpoint-20"):  # PEFT's own card would name the base by its path
        card = ModelCard.load(folder / "README.md")
        assert (card.data.library_name, card.data.base_model) == ("peft", None)
        assert f"| adapter | {method}: " in card.text
        assert str(tiny.parent) not in card.content
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == Path("hft/demo/templates/tulu.jinja").read_text()
    base = AutoModelForCausalLM.from_pretrained(tiny)  # in the dtype it is stored in, as OSF needs
    before = {name: p.clone() for name, p in base.named_parameters()}
    words = torch.arange(40, 60)[None]
    with torch.no_grad():
        plain = base.float()(words).logits
    base = AutoModelForCausalLM.from_pretrained(tiny)
    model = PeftModel.from_pretrained(base, out).eval().float()
    with torch.no_grad():
        adapted = model(words).logits[:, -20:]
        assert (adapted - plain).abs().max() > 1e-2
        if method == "p-tuning-v2":
            return
        merged = model.merge_and_unload()
        assert merged.state_dict().keys() >= before.keys()
        torch.testing.assert_close(merged(words).logits, adapted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["adalora", "p-tuning-v2"])
def test_a_killed_run_goes_on_exactly_where_it_was(runs, tmp_path, tiny, data, sft, method):
    straight = runs(method)
    again = tmp_path / method
    shutil.copytree(straight, again, ignore=shutil.ignore_patterns("checkpoint-20", "results.json"))
    (again / "adapter_model.safetensors").unlink()
    arguments = ["sft", "--config", str(straight / "config.yaml"), "--output_dir", str(again)]
    assert main(arguments) == 0
    assert losses(again / "checkpoint-20") == losses(straight / "checkpoint-20")
    ours, theirs = saved(again), saved(straight)
    assert ours.keys() == theirs.keys()
    assert all(identical(ours[name], theirs[name]) for name in theirs)


def test_a_resume_with_another_adapter_is_refused(runs, tmp_path, data, sft, capsys):
    out = shutil.copytree(runs("lora"), tmp_path / "out")
    (out / "results.json").unlink()
    for flags, method, message in (
        (["--rank", "16"], "lora", "rank 64 there, 16 here"),
        ([], "osf", "adapter lora there, osf here"),
        ([], "hft", "adapter lora there, unset here"),
    ):
        assert sft(out, *SMALL, *flags, method=method) == 2
        error = error_of(capsys)
        assert "cannot resume from" in error
        assert message in error


def test_verify_finds_a_base_that_is_another_or_gone(runs, tmp_path, tiny, capsys):
    out = shutil.copytree(runs("lora"), tmp_path / "out")
    assert main(["verify", str(out)]) == 0
    other = shutil.copytree(tiny, tmp_path / "other")
    content = tensors(other)
    content["model.norm.weight"].view(torch.uint8)[0] ^= 1
    save_file(content, other / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["verify", str(out), "--base", str(other)]) == 1
    assert "MISMATCH model.norm.weight" in capsys.readouterr().out
    (out / "adapter_model.safetensors").unlink()
    assert main(["verify", str(out)]) == 1
    path = out / "hft_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": str(tmp_path / "gone")}))
    assert main(["verify", str(out)]) == 2
    assert "was not found; name it with --base" in error_of(capsys)


def test_a_base_that_moves_in_memory_fails_the_run(tmp_path, tiny, data, capsys):
    trainer = trainer_of("sft", tmp_path, tiny, load_split(str(data), "train"), config(method="lora"), max_steps=1)
    next(p for p in trainer.model.parameters() if not p.requires_grad).data[0, 0] += 1
    trainer.train()
    trainer.save_model()
    assert main(["verify", str(tmp_path)]) == 1
    assert "changed in memory while the adapter was trained" in capsys.readouterr().out


def test_adalora_prunes_to_its_mean_rank_on_the_real_number_of_steps(runs):
    peft, weights = PeftConfig.from_pretrained(runs("adalora")), saved(runs("adalora"))
    assert (peft.total_step, peft.tinit, peft.tfinal, peft.deltaT) == (20, 1, 14, 1)
    ranks = [len(tensor) for name, tensor in weights.items() if name.endswith("lora_E")]
    assert len(ranks) == 28
    assert sum(ranks) == 8 * 28
    assert len(set(ranks)) > 1
    # PEFT would train the number it divides by, and then not save it.
    state = load_file(runs("adalora") / "checkpoint-20" / "training_state.safetensors")
    assert not any("ranknum" in name for name in state)


def test_adaloras_orthogonality_loss_is_pefts_and_counts_once_a_step(tmp_path, tiny, data):
    rows = load_split(str(data), "train")
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    logged = []
    for weight in (0.0, 50.0):
        adapter = config(method="adalora", orthogonality_weight=weight)
        trainer = trainer_of("sft", tmp_path, tiny, rows, adapter, max_steps=2, logging_steps=1, **sizes)
        expected = orthogonality(trainer.model).item()
        if weight:
            words = torch.arange(40, 60)[None]
            trainer.model.eval()
            with torch.no_grad():
                outputs = trainer.model(input_ids=words, labels=words)
                plain = cross_entropy(outputs.logits[0, :-1].float(), words[0, 1:])
            assert float(outputs.loss - plain) == pytest.approx(weight * expected, rel=1e-4)
        trainer.train()
        logged.append(trainer.state.log_history[0]["loss"])
    assert logged[1] - logged[0] == pytest.approx(50 * expected, rel=1e-3)


def test_the_loss_of_a_prompt_is_that_of_the_tokens_after_it(tmp_path, tiny, data):
    """By hand: PEFT's logits, of which only those of the real tokens count, against the tokens that follow."""
    rows = load_split(str(data), "train")
    trainer = trainer_of("sft", tmp_path, tiny, rows, config(method="p-tuning-v2"), assistant_only_loss=True)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    count = (batch["labels"][:, 1:] != -100).sum()
    model = trainer.model.eval()
    with torch.no_grad():
        ours = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits[:, -batch["input_ids"].shape[1] :]
        theirs = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        with model.disable_adapter():
            without = trainer.compute_loss(model, dict(batch))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    assert float(ours) != pytest.approx(float(without), rel=1e-5)


@pytest.mark.parametrize("method", ["adalora", "osf"])
def test_dpo_starts_at_the_reference(tmp_path, tiny, pairs, method):
    rows, _ = preference_rows(load_split(str(pairs), "train"), "pairs")
    adapter = config(method=method)
    if method == "adalora":
        adapter.orthogonality_weight = 0.0  # it is part of the loss that is logged
    trainer = trainer_of("dpo", tmp_path, tiny, rows, adapter, max_steps=2, logging_steps=1)
    trainer.train()
    history = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert history[0] == pytest.approx(0.693147, abs=1e-5)
    assert history[-1] != history[0]
    assert trainer.ref_model is None


def test_dpo_with_lora_through_the_command_line(tmp_path, tiny, dpo, capsys):
    assert dpo(tmp_path / "out", *SMALL, method="lora") == 0
    out = capsys.readouterr().out
    assert "reference: the base itself, its adapter switched off" in out
    assert "the model is frozen whole" in out
    assert losses(tmp_path / "out" / "checkpoint-4")[0] == pytest.approx(0.6931, abs=1e-4)


def test_a_prefix_turns_gradient_checkpointing_off_and_says_so(tmp_path, sft, capsys):
    flags = [*SMALL, "--gradient_checkpointing", "true", "--max_steps", "1"]
    assert sft(tmp_path / "out", *flags, method="p-tuning-v2") == 0
    assert "activation checkpointing is off" in capsys.readouterr().out
    assert sft(tmp_path / "other", *flags, method="lora") == 0
    assert "activation checkpointing is off" not in capsys.readouterr().out


def test_the_learning_rate_is_a_multiple_of_the_recipes_unless_a_flag_gives_it(tmp_path, sft, capsys):
    for flags, rate in (([], 0.01), (["--learning_rate", "0.003"], 0.003), (["--learning_rate_factor", "2"], 0.002)):
        assert sft(tmp_path / "out", "--dry_run", "true", *flags, method="lora") == 0
        printed = capsys.readouterr().out
        assert (f"learning rate {rate:g}: " in printed) == ("--learning_rate" not in flags)
        assert "--learning_rate" not in flags or f"learning_rate: {rate}\n" in printed


@pytest.mark.parametrize(
    ("flags", "method", "message"),
    [
        (
            ["--fraction", "0.5"],
            "lora",
            "fraction acts on the model's weights, and adapter 'lora' freezes all",
        ),
        (["--round", "2"], "osf", "round acts on the model's weights"),
        (["--update", "gmt", "--top_fraction", "0.1"], "lora", "update acts on the model's weights"),
        (["--schedule", "lisa"], "lora", "schedule acts on the model's weights"),
        (
            ["--rank", "8"],
            "hft",
            "rank is a key of adapter adalora, lora, qlora; remove it",
        ),
        (["--learning_rate_factor", "8"], "fft", "learning_rate_factor is a key of adapter adalora"),
        (["--num_virtual_tokens", "8"], "lora", "num_virtual_tokens is a key of adapter p-tuning-v2"),
        (["--adapter", "dora"], "lora", "adapter: unknown adapter 'dora', did you mean 'lora'?"),
        (["--rank", "12"], "adalora", "rank below start_rank"),
        (["--target_modules", "no_proj"], "lora", "Target modules {'no_proj'} not found"),
        (["--packing", "true"], "p-tuning-v2", "rows cannot be packed"),
        (["--max_steps", "1"], "adalora", "adalora needs 2 steps or more"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(tmp_path, sft, capsys, flags, method, message):
    assert sft(tmp_path / "out", *SMALL, *flags, method=method) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 2), ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})],
)
def test_a_base_that_only_this_run_would_have_is_refused(tmp_path, tiny, data, sft, capsys, key, value):
    kwargs = ["--model_init_kwargs", json.dumps({key: value})]
    assert sft(tmp_path / "out", *kwargs, method="lora") == 2
    assert f"model_init_kwargs: {key} {value} changes the base" in error_of(capsys)
    assert not (tmp_path / "out").exists()
    with pytest.raises(HFTError, match="changes the base"):
        trainer_of("sft", tmp_path, tiny, load_split(str(data), "train"), LoRA(), model_init_kwargs={key: value})
    harmless = json.dumps({"num_hidden_layers": 4, "use_cache": False, "attention_dropout": 0.1, "dtype": "float32"})
    assert sft(tmp_path / "out", "--dry_run", "--model_init_kwargs", harmless, method="lora") == 0


def test_prompts_cannot_do_dpo_and_nothing_is_sharded(tmp_path, dpo, capsys, monkeypatch):
    assert dpo(tmp_path / "out", method="p-tuning-v2") == 2
    assert "p-tuning-v2 cannot train against a reference" in error_of(capsys)
    args = SFTConfig(use_cpu=True, bf16=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(HFTError, match="adapter lora does not run under FSDP2; launch it with --engine ddp"):
        check_parts(args, LoRA())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(HFTError, match="update gmt does not run under ZeRO-3; launch it with --engine fsdp2"):
        check_parts(args, GMT(top_fraction=0.1))


def test_an_adapter_is_no_base(runs, tmp_path, sft, dpo, capsys):
    for method in ("lora", "hft"):
        assert dpo(tmp_path / "out", method=method, model=runs("lora")) == 2
        assert f"is an adapter, not a model; `hft merge --method adapter --models {runs('lora')}" in error_of(capsys)


def test_training_anew_leaves_no_adapter_behind(runs, tmp_path, sft, dpo, capsys):
    out = shutil.copytree(runs("lora"), tmp_path / "out")
    assert sft(out, *SMALL, "--max_steps", "2", "--resume_from_checkpoint", "none", method="hft") == 0
    assert not list(out.glob("adapter_*"))
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    # Its manifest makes this base a round of a sequence, in which an adapter has no part.
    capsys.readouterr()
    assert dpo(tmp_path / "dpo", "--dry_run", "true", method="lora", model=out) == 0
    assert "round:" not in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_base_keeps_its_dtype_and_adapters_are_fp32(tmp_path, tiny, data, method):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    autocast = cpu_has_bfloat16()
    rows = load_split(str(data), "train")
    trainer = trainer_of("sft", tmp_path, tiny, rows, config(method=method), bf16=autocast)
    named = trainer.model.named_parameters()
    frozen = {p.dtype for name, p in named if not p.requires_grad and "embed" not in name}  # the residual stream's
    stored = torch.bfloat16 if autocast else torch.float32
    assert frozen == ({stored, torch.uint8} if method == "qlora" else {stored})
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_base_that_is_stored_expert_by_expert_takes_an_adapter(tmp_path, tiny, sft):
    base = tmp_path / "mixtral"
    small("mixtral").save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(base)
    assert sft(tmp_path / "out", *SMALL, "--max_steps", "2", method="lora", model=base) == 0
    assert any(name.endswith("experts.gate_up_proj") for name in Manifest.load(tmp_path / "out").frozen_checksums)
    assert main(["verify", str(tmp_path / "out")]) == 0
