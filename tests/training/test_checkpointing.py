"""Activation checkpointing: of which layers, in every step the same ones, and the same bits whatever it is."""

import shutil

import pytest
import torch
import yaml
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from hft.data import load_split
from hft.errors import HFTError
from hft.methods.lora import LoRA
from hft.planning.forecast import forecast
from hft.runs.config import load_config
from hft.runs.plan import make_plan
from hft.runs.train import make_trainer
from hft.training import HFTDPOTrainer, with_adapter
from tests.conftest import error_of, identical, losses, tensors

EVERY_2 = '{"every_n_layers": 2}'


class Recorder(TrainerCallback):
    """Writes down at each step which layers are checkpointed, and by which function."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        layers = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
        self.steps.append(
            [(layer.gradient_checkpointing, vars(layer).get("_gradient_checkpointing_func")) for layer in layers]
        )


@pytest.mark.parametrize(
    "flags",
    [
        ["--activation_checkpointing", "true"],
        ["--activation_checkpointing", "true", "--activation_checkpointing_kwargs", EVERY_2],
    ],
    ids=["all", "every-2"],
)
def test_which_layers_are_checkpointed_changes_no_bit(tmp_path, sft, finished, flags):
    assert sft(tmp_path / "out", *flags) == 0
    assert losses(tmp_path / "out" / "checkpoint-4") == losses(finished / "checkpoint-4")
    ours, theirs = tensors(tmp_path / "out"), tensors(finished)
    assert all(identical(ours[name], theirs[name]) for name in theirs)


def test_the_first_layers_alone_can_be_checkpointed(tmp_path, tiny, data, finished):
    """Also from a checkpoint of a run that did otherwise: it is the same run, bit for bit."""
    for name in ("checkpoint-2", "config.yaml"):
        copy = shutil.copytree if name.startswith("checkpoint") else shutil.copy
        copy(finished / name, tmp_path / name)
    keys = yaml.safe_load((finished / "config.yaml").read_text()) | {"output_dir": str(tmp_path)}
    plan = make_plan(load_config("sft", **keys, activation_checkpointing_layers=3))
    assert "activations of 3 of 4 layers checkpointed" in plan.report()
    assert plan.notes[1:] == [f"resuming from {tmp_path}/checkpoint-2"]  # and no other settings
    trainer, recorder = make_trainer(plan), Recorder()
    trainer.add_callback(recorder)
    trainer.train(plan.start.resume_from)
    assert [[on for on, _ in step] for step in recorder.steps] == [[True, True, True, False]] * 2
    ours, theirs = tensors(tmp_path / "checkpoint-4"), tensors(finished / "checkpoint-4")
    assert all(identical(ours[name], theirs[name]) for name in theirs)


def test_auto_checkpoints_as_few_layers_as_fit(tmp_path, tiny, data, monkeypatch):
    keys = {
        "model_name_or_path": str(tiny),
        "dataset_name": str(data),
        "output_dir": str(tmp_path),
        "report_to": "none",
    }

    def plan(layers):
        files = ("recipes/tiny/sft.yaml", "recipes/methods/hft.yaml")
        return make_plan(load_config("sft", *files, **keys, activation_checkpointing_layers=layers))

    needed = {layers: forecast(plan(layers).config).memory.total for layers in (0, 2, 4)}
    monkeypatch.setattr("hft.planning.fit.SPARE", 0)
    for layers, available in needed.items():
        monkeypatch.setattr("hft.planning.fit.device_bytes", lambda *, use_cpu, available=available: available)
        made = plan("auto")
        assert made.checkpointed == range(layers)
        assert made.args.activation_checkpointing == (layers > 0)
    monkeypatch.setattr("hft.planning.fit.device_bytes", lambda *, use_cpu: needed[4] - 1)
    with pytest.raises(HFTError, match=r"short by 0\.0 GiB: lower --per_device_train_batch_size from 16 to 8"):
        plan("auto")


@pytest.mark.parametrize("how", ["shared", "beforehand", "lora"])
def test_dpo_checkpoints_the_same_layers_in_every_step(tmp_path, tiny, pairs, how):
    """TRL switches checkpointing off while the reference computes, and on again in all layers."""
    rows, recorder = load_split(str(pairs), "train"), Recorder()
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "max_length": 128, "logging_steps": 1}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    settings |= {"precompute_ref_log_probs": how == "beforehand", "learning_rate": 1e-3}

    def losses_of(name, **kwargs):
        args = DPOConfig(output_dir=str(tmp_path / name), **settings, **kwargs)
        if how == "lora":
            trainer = with_adapter(DPOTrainer)(str(tiny), args, adapter=LoRA(rank=4), train_dataset=rows)
        else:
            trainer = HFTDPOTrainer(str(tiny), args, train_dataset=rows)
        trainer.add_callback(recorder)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    plain = losses_of("plain", activation_checkpointing=False)
    recorder.steps.clear()
    assert losses_of("every-2", activation_checkpointing_kwargs={"every_n_layers": 2}) == plain
    assert [[on for on, _ in step] for step in recorder.steps] == [[True, False, True, False]] * 3
    assert len({function for step in recorder.steps for _, function in step}) == 1  # how, too


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--activation_checkpointing_layers", "5"], "must lie in 0..4, the model's layers, got 5"),
        (["--activation_checkpointing_layers", "many"], "expected an integer or 'auto', got 'many'"),
        (
            ["--activation_checkpointing_layers", "auto", "--schedule", "badam", "--policy", "all"],
            "give a number of layers",
        ),
        (["--activation_checkpointing_layers", "2", "--activation_checkpointing_kwargs", EVERY_2], "give one of them"),
        (["--activation_checkpointing_kwargs", '{"every_n_layers": 0}'], "an integer of at least 1, got 0"),
        (["--activation_checkpointing_kwargs", '{"every_n": 2}'], "has no 'every_n'; it has every_n_layers"),
        pytest.param(
            ["--activation_checkpointing_kwargs", '{"offload": true}'],
            "there is no GPU here; remove it",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_checkpointed_is_refused_before_anything_is_loaded(tmp_path, sft, capsys, flags, message):
    assert sft(tmp_path / "out", *flags) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_saving_attention_alone_is_sfts(tmp_path, dpo, capsys):
    assert dpo(tmp_path / "dpo", "--activation_checkpointing_kwargs", '{"selective": true}') == 2
    assert "activation_checkpointing_kwargs has no 'selective'" in error_of(capsys)
