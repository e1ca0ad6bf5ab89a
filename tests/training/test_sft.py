"""The whole way through the command line: train, save, verify, resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from hft.cli import main
from hft.config import read_yaml
from hft.data import load_split
from hft.errors import HFTError
from hft.machine import cpu_has_bfloat16
from hft.record.checkpoints import last_checkpoint
from hft.record.manifest import Manifest
from hft.runs.result import RunResult
from hft.runs.tracking import log_scores
from hft.selection import SelectionConfig
from hft.training import HFTSFTTrainer
from tests.conftest import command, error_of, identical, losses, tensors, write_jsonl


def test_half_moves_and_half_does_not(finished, tiny):
    base, out, masters = tensors(tiny), tensors(finished), tensors(finished / "checkpoint-4")
    frozen = Manifest.load(finished).frozen_checksums
    assert base.keys() == out.keys()
    assert len(frozen) == 18
    for name in base:
        assert out[name].dtype == torch.bfloat16
        assert (name in frozen) == torch.equal(base[name].float(), masters[name].float()), name
        # A norm at 1.0 moves by less than bf16 resolves in four steps; its master did move.
        if name in frozen or "norm" not in name:
            assert (name in frozen) == identical(base[name], out[name]), name


def test_a_checkpoint_keeps_masters_and_only_the_trained_half_has_optimizer_state(finished, tiny):
    checkpoint, frozen = tensors(finished / "checkpoint-4"), Manifest.load(finished / "checkpoint-4").frozen_checksums
    for name, tensor in checkpoint.items():
        assert tensor.dtype == (torch.bfloat16 if name in frozen else torch.float32), name
    state = torch.load(finished / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    moments = sum(entry["exp_avg"].numel() for entry in state.values())
    assert moments == sum(tensor.numel() for name, tensor in checkpoint.items() if name not in frozen)


def test_the_saved_model_is_a_plain_transformers_model(finished, tiny):
    model = AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert model.dtype == torch.bfloat16
    assert tokenizer.chat_template == Path("hft/demo/templates/tulu.jinja").read_text()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is `abc` for?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**prompt, max_new_tokens=4, min_new_tokens=4).shape[1] == prompt["input_ids"].shape[1] + 4
    assert AutoModelForCausalLM.from_pretrained(finished / "checkpoint-2").dtype == torch.bfloat16


def test_the_folder_tells_what_happened(finished, tiny):
    results = json.loads((finished / "results.json").read_text())
    assert results["steps"] == 4
    before, after = results["held_out"]["loss"]
    assert after < before
    found = results["verify"]
    assert (found["identical"], found["broken"], found["changed"] + found["unchanged"]) == (18, 0, 21)
    assert results["tokens_per_second"] > 0
    manifest = Manifest.load(finished)
    assert manifest.base == str(tiny)
    assert manifest.trainable_fraction["layers"] == 0.5
    assert manifest.selection["policy"] == "category"
    assert (finished / "selection.png").stat().st_size > 1000
    assert yaml.safe_load((finished / "config.yaml").read_text())["global_batch_size"] == 16


def test_the_saved_config_repeats_the_run(finished, tmp_path):
    again = tmp_path / "again"
    assert main(["sft", "--config", str(finished / "config.yaml"), "--output_dir", str(again)]) == 0
    ours, theirs = tensors(again), tensors(finished)
    assert all(identical(ours[name], theirs[name]) for name in theirs)


def test_verify_finds_one_flipped_bit(finished, tiny, tmp_path, capsys):
    broken = shutil.copytree(finished, tmp_path / "broken")
    assert main(["verify", str(broken)]) == 0
    assert "frozen:  18 of 18 tensors bit-identical" in capsys.readouterr().out
    name = next(iter(Manifest.load(finished).frozen_checksums))
    content = tensors(broken)
    content[name].view(torch.uint8)[0, 0] ^= 1
    save_file(content, broken / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", str(broken)]) == 1
    assert f"MISMATCH {name}: 1 of" in capsys.readouterr().out
    assert main(["verify", str(broken), "--base", str(tiny)]) == 1


def test_verify_without_the_base_takes_the_checksums(finished, tmp_path, capsys):
    moved = shutil.copytree(finished, tmp_path / "moved")
    path = moved / "hft_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": str(tmp_path / "gone")}))
    assert main(["verify", str(moved)]) == 0
    assert "the manifest's checksums" in capsys.readouterr().out
    assert main(["verify", str(moved), "--base", str(tmp_path / "gone")]) == 2
    assert main(["verify", str(tmp_path)]) == 2


def test_with_nothing_frozen_the_losses_are_trls(tmp_path, tiny, data, sft):
    """In bf16 where the processor has it; in fp32 tests/training/test_any_trainer.py says the same of every trainer."""
    assert sft(tmp_path / "ours", "--max_steps", "6", "--save_steps", "6", method="fft") == 0
    theirs = SFTTrainer(
        model=str(tiny),
        args=SFTConfig(
            output_dir=str(tmp_path / "theirs"),
            max_steps=6,
            save_steps=6,
            learning_rate=1e-3,
            warmup_steps=0.1,
            per_device_train_batch_size=16,
            max_length=256,
            assistant_only_loss=True,
            chat_template_path="hft/demo/templates/tulu.jinja",
            gradient_checkpointing=False,
            logging_steps=1,
            use_cpu=True,
            bf16=cpu_has_bfloat16(),
            report_to="none",
        ),
        train_dataset=load_split(str(data), "train"),
    )
    theirs.train()
    trl_losses = losses(tmp_path / "theirs" / "checkpoint-6")
    assert len(trl_losses) == 6
    assert losses(tmp_path / "ours" / "checkpoint-6") == trl_losses
    ours = tensors(tmp_path / "ours" / "checkpoint-6")
    assert all(torch.equal(ours[name], p) for name, p in theirs.model.state_dict().items() if name in ours)


def test_the_stored_dtype_is_kept_whatever_it_is(tmp_path, tiny, sft):
    half = tmp_path / "fp16"
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(half)
    assert sft(tmp_path / "out", model=half) == 0
    base, out, frozen = tensors(half), tensors(tmp_path / "out"), Manifest.load(tmp_path / "out").frozen_checksums
    assert {tensor.dtype for tensor in out.values()} == {torch.float16}
    assert frozen
    assert all(identical(out[name], base[name]) for name in frozen)


def test_tensors_that_are_no_parameters_do_not_widen_the_model(tmp_path, tiny, data):
    """Llama-2's files hold an fp32 `rotary_emb.inv_freq` beside fp16 weights."""
    base = shutil.copytree(tiny, tmp_path / "llama2")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file(tensors(tiny) | extra, base / "model.safetensors", metadata={"format": "pt"})
    args = SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=cpu_has_bfloat16(), report_to="none")
    trainer = HFTSFTTrainer(str(base), args, train_dataset=load_split(str(data), "train"))
    frozen = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16 if cpu_has_bfloat16() else torch.float32}
    trainer.save_model()
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_base_in_bin_files_is_half_fine_tuned_too(tmp_path, tiny, sft):
    base = shutil.copytree(tiny, tmp_path / "bin")
    torch.save(tensors(tiny), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert sft(tmp_path / "out", model=base) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("method", ["hft", "hft-layer", "freeze-ov"])
def test_a_method_learns(tmp_path, sft, method):
    assert sft(tmp_path / "out", "--max_steps", "20", "--save_steps", "20", method=method) == 0
    logged = losses(tmp_path / "out" / "checkpoint-20")
    assert sum(logged[-4:]) < sum(logged[:4]) - 0.8


@pytest.mark.parametrize("reentrant", ["true", "false"])
def test_with_frozen_embeddings_checkpointing_changes_nothing(tmp_path, sft, reentrant):
    """Reentrant checkpointing passes no gradient on unless its input has one."""
    kwargs = [
        "--gradient_checkpointing",
        "true",
        "--gradient_checkpointing_kwargs",
        f'{{"use_reentrant": {reentrant}}}',
    ]
    assert sft(tmp_path / "plain", "--bf16", "false", method="hft-freeze-io") == 0
    assert sft(tmp_path / "checkpointed", "--bf16", "false", *kwargs, method="hft-freeze-io") == 0
    ours, theirs = tensors(tmp_path / "checkpointed"), tensors(tmp_path / "plain")
    assert all(identical(ours[name], theirs[name]) for name in theirs)


def test_frozen_embeddings_stay(tmp_path, tiny, sft):
    assert sft(tmp_path / "out", "--freeze_embeddings", "true") == 0
    base, out = tensors(tiny), tensors(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert identical(base[name], out[name])


def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    for name, missing in (("checkpoint-8", "trainer_state.json"), ("checkpoint-9", "hft_manifest.json")):
        shutil.copytree(out / "checkpoint-4", out / name)
        (out / name / missing).unlink()
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-10")
    (out / "checkpoint-10" / "trainer_state.json").write_text('{"epoch": ')
    assert last_checkpoint(out) == str(out / "checkpoint-4")
    assert last_checkpoint(tmp_path / "none") is None


def test_the_same_command_again_says_that_the_run_is_finished(tmp_path, sft, capsys):
    assert sft(tmp_path / "out") == 0
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert sft(tmp_path / "out") == 0
    assert "holds this run, finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    assert sft(tmp_path / "out", "--learning_rate", "1") == 2
    assert "learning_rate 0.001 there, 1.0 here" in error_of(capsys)
    assert sft(tmp_path / "out", "--learning_rate", "1", "--resume_from_checkpoint", "none") == 0


@pytest.mark.parametrize(
    ("flags", "method", "message"),
    [
        (["--selection_seed", "1"], "hft", "selection_seed 0 there, 1 here"),
        (["--round", "2"], "hft", "round 1 there, 2 here"),
        ([], "hft-layer", "policy category there, layer here"),
        ([], "fft", "policy category there, all here"),
        (["--freeze_embeddings", "true"], "hft", "freeze_embeddings False there, True here"),
    ],
)
def test_resuming_with_another_selection_is_refused(finished, tmp_path, sft, capsys, flags, method, message):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "results.json").unlink()
    assert sft(out, *flags, method=method) == 2
    error = error_of(capsys)
    assert "cannot resume from" in error
    assert "checkpoint-4" in error
    assert message in error


def test_resuming_from_another_base_is_refused(finished, tmp_path, tiny, sft, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "results.json").unlink()
    other = shutil.copytree(tiny, tmp_path / "other")
    content = tensors(other)
    name = list(Manifest.load(finished).frozen_checksums)[-1]
    content[name] = content[name] * 2
    save_file(content, other / "model.safetensors", metadata={"format": "pt"})
    assert sft(out, "--max_steps", "6", model=other) == 2
    assert "trained with other settings (weights of the base " in error_of(capsys)
    assert read_yaml(out / "config.yaml")["model_name_or_path"] == str(tiny)  # nothing was overwritten


def test_a_run_is_not_the_same_once_a_file_that_it_depends_on_has_changed(tmp_path, tiny, sft, capsys):
    """Also of FFT, which freezes nothing that would tell the base: its files, and own code."""
    base, own = shutil.copytree(tiny, tmp_path / "base"), tmp_path / "own.py"
    code = "from hft.methods.update import Update\n\nclass Mine(Update):\n    def callbacks(self, model, anatomy):\n"
    own.write_text(code + "        return []\n")
    words = ["--update", f"{own}:Mine", "--max_steps", "1"]

    def run() -> str:
        capsys.readouterr()
        status = sft(tmp_path / "out", *words, method="fft", model=base)
        return error_of(capsys) if status else "same"

    assert (run(), run()) == ("same", "same")
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(template + " ")
    assert "chat_template of the base " in run()
    (base / "chat_template.jinja").write_text(template)
    own.write_text(code + "        return [*[]]\n")
    assert "file of update " in run()
    own.write_text(code + "        return []\n")
    content = {name: tensor * 2 for name, tensor in tensors(base).items()}
    save_file(content, base / "model.safetensors", metadata={"format": "pt"})
    assert "weights of the base " in run()
    (tmp_path / "out" / "results.json").unlink()
    words[-1] = "2"
    assert "cannot resume" in (error := run())
    assert "weights of the base " in error


def test_bad_models_and_folders_are_refused_in_a_sentence(tmp_path, tiny, data, sft, capsys):
    quantized = shutil.copytree(tiny, tmp_path / "quantized")
    config = json.loads((tiny / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert sft(tmp_path / "a", model=quantized) == 2
    assert "is quantized" in error_of(capsys)

    truncated = shutil.copytree(tiny, tmp_path / "truncated")
    path = truncated / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    assert sft(tmp_path / "b", model=truncated) == 2
    assert "is incomplete" in error_of(capsys)

    unknown = shutil.copytree(tiny, tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps({"model_type": "mamba", "num_hidden_layers": 2}))
    assert sft(tmp_path / "c", model=unknown) == 2
    assert "belong to no known unit: backbone.layers.0.mixer" in error_of(capsys)

    file = tmp_path / "file"
    file.write_text("")
    assert sft(file / "out") == 2
    assert "cannot write to output_dir" in error_of(capsys)

    for out in (tiny, tiny.parent):
        assert sft(out) == 2
        assert "is the base itself, or holds it" in error_of(capsys)

    assert sft(tmp_path / "d", "--tokenizer_pad_token", "<nothing>") == 2
    assert "is not in the vocabulary" in error_of(capsys)

    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    assert sft(tmp_path / "e", "--dataset_name", str(bad)) == 2
    assert "row 0 (the first is 0): messages has no assistant turn" in error_of(capsys)
    assert not any((tmp_path / name).exists() for name in "ce")


def test_a_dry_run_loads_and_writes_nothing(tmp_path, tiny, data, sft, capsys, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    assert sft(tmp_path / "out", "--dry_run", "true") == 0
    out = capsys.readouterr().out
    assert "4 steps, at most 16,384 tokens" in out
    assert not (tmp_path / "out").exists()
    assert main(["plan", *command("sft", tmp_path / "out", model=tiny, data=data)]) == 0
    compared = capsys.readouterr().out
    blocks = [block for block in out.split("\n\n") if not block.startswith(("memory", "cost"))]
    assert not [block for block in blocks if block not in compared]
    assert "relative to fft" in compared
    assert not (tmp_path / "out").exists()


def test_the_trainer_refuses_what_would_escape_the_selection(tiny, data, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(HFTError, match="remove peft_config"):
        HFTSFTTrainer(str(tiny), args, peft_config=object())
    with pytest.raises(HFTError, match="a built optimizer"):
        HFTSFTTrainer(str(tiny), args, optimizers=(object(), None))


def test_a_loaded_model_can_be_given_too(tiny, data, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, max_steps=2, report_to="none")
    trainer = HFTSFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        args,
        selection=SelectionConfig(selection_seed=3),
        train_dataset=load_split(str(data), "train"),
    )
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    trainer.save_model()
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out" / "checkpoint-2")]) == 0  # frozen in bf16 though held in fp32
    assert Manifest.load(tmp_path / "out").selection["selection_seed"] == 3


def test_a_dtype_that_would_round_the_base_is_refused(tiny, data, tmp_path):
    half = {"dtype": "float16"}
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, model_init_kwargs=half)
    with pytest.raises(HFTError, match=r"would round the base, which is stored in torch\.bfloat16"):
        HFTSFTTrainer(str(tiny), args)


def test_wandb_is_offline_without_a_key_and_holds_the_selection(tmp_path, sft, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert sft(tmp_path / "out", "--report_to", "wandb") == 0
    assert "wandb is offline (no API key); upload later with `wandb sync" in capsys.readouterr().out
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("files/media/images/selection*.png"))
    (log,) = run.glob("*.wandb")
    content = log.read_bytes()
    for logged in (b"trainable_fraction", b"train/loss", b"train/grad_norm", b"peak_memory_gb", b"tokens_per_second"):
        assert logged in content, logged
    for logged in (b"manifest-", b"hft_manifest.json", b"identical", b"global_batch_size"):
        assert logged in content, logged
    log_scores(RunResult.load(tmp_path / "out").wandb, {"quick/drift/loss": 2.5})
    again = [
        path for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb") if b"quick/drift/loss" in path.read_bytes()
    ]
    assert [path.name for path in again] == [log.name]
