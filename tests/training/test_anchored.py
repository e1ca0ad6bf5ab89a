"""SFT with a KL term: exact values, exact accumulation, and a reference that shares the frozen half."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft.cli import main
from hft.methods.adapter import Adapter
from hft.methods.lora import LoRA
from hft.selection import SelectionConfig
from hft.training import half, with_adapter
from hft.training.anchored import AnchoredSFTConfig, AnchoredSFTTrainer
from hft.training.reference import reference_bytes
from tests.conftest import error_of

ROWS = Dataset.from_list(
    [{"input_ids": [5 + n, 6, 7, *range(8, 10 + n)], "completion_mask": [0, 0, *[1] * (3 + n)]} for n in range(8)]
)


def trainer(tiny, out, *, rows=8, weight=0.7, steps=1, adapter: Adapter | None = None, **selected):
    args = AnchoredSFTConfig(
        output_dir=str(out),
        kl_to_base=weight,
        completion_only_loss=True,
        max_steps=steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=8 // rows,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        gradient_checkpointing=False,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    common = {"train_dataset": ROWS, "processing_class": tokenizer}
    if adapter:
        return with_adapter(AnchoredSFTTrainer)(str(tiny), args, adapter=adapter, **common)
    return half(AnchoredSFTTrainer)(str(tiny), args, selection=SelectionConfig(**selected), **common)


def expected(model, base, weight):
    """The loss of all rows, one at a time."""
    total, tokens = 0.0, 0
    for row in ROWS:
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["completion_mask"][1:]).bool()
        now, before = (each(ids).logits[0, :-1].log_softmax(-1)[mask] for each in (model, base))
        targets = ids[0, 1:][mask]
        total = total - now[range(len(targets)), targets].sum()
        total = total + weight * (before.exp() * (before - now)).sum()
        tokens += len(targets)
    return total / tokens


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_loss_and_gradient_are_those_of_the_formula_however_the_step_is_accumulated(tmp_path, tiny, weight):
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    optimizer, losses, norms = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0), [], []
    for _ in range(3):
        loss = expected(model, base, weight)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item())
        optimizer.step()
        optimizer.zero_grad()
    for rows in (8, 1):
        made = trainer(tiny, tmp_path / f"{rows}", rows=rows, weight=weight, steps=3, policy="all")
        assert (made.ref_model is None) == (weight == 0)
        made.train()
        logged = [row for row in made.state.log_history if "loss" in row]
        assert [row["loss"] for row in logged] == pytest.approx(losses, rel=2e-3)
        assert [row["grad_norm"] for row in logged] == pytest.approx(norms, rel=2e-3)


def test_the_reference_shares_the_frozen_half_and_is_the_base(tmp_path, tiny):
    made = trainer(tiny, tmp_path / "hft", steps=3)
    model, base = made.model, AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert 0 < reference_bytes(made) <= trained
    made.train()
    for name, parameter in made.ref_model.named_parameters():
        assert torch.equal(parameter.float(), base.get_parameter(name)), name
    now = made.compute_loss(model.train(), batch(made)).item()
    assert now == pytest.approx(expected(model, base, 0.7).item(), rel=1e-4)
    held_out = made.compute_loss(model.eval(), batch(made)).item()
    assert held_out == pytest.approx(expected(model, base, 0.0).item(), rel=1e-4)


def batch(made):
    return made.data_collator([made.train_dataset[n] for n in range(8)])


def test_the_reference_of_an_adapter_is_the_model_without_it(tmp_path, tiny):
    made = trainer(tiny, tmp_path / "lora", adapter=LoRA(rank=4, lora_alpha=8), steps=3)
    made.train()
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    now = made.compute_loss(made.model.train(), batch(made)).item()
    assert now == pytest.approx(expected(made.model, base, 0.7).item(), rel=1e-4)
    assert made.ref_model is None


def test_the_reference_of_an_adapter_has_no_dropout(tmp_path, tiny):
    made, modes = trainer(tiny, tmp_path / "lora", adapter=LoRA(rank=4, lora_alpha=8)), []
    made.model.get_base_model().model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    made.compute_loss(made.model.train(), batch(made)).backward()
    assert modes == [True, False]
    assert made.model.get_base_model().model.training


def test_the_command_trains_any_method_with_it_in_a_folder_of_its_own(tmp_path, tiny, sft, capsys):
    plan = ["plan", "sft", "--config", "tiny/sft", "hft", "kl", "--model_name_or_path", str(tiny), "--max_steps", "2"]
    assert main([*plan, "--gpus", "1", "--gpu_memory", "80GiB"]) == 0
    printed = capsys.readouterr().out
    assert "runs/tiny-sft-hft-kl" in printed
    assert "reference" in printed
    assert "with kl_to_base are not known" in printed
    assert sft(tmp_path / "out", "--kl_to_base", "0.5", "--max_steps", "2") == 0
    assert "shares the frozen half" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["objective"] == "sft"
    for flags, reason in ((["0.5", "--loss_type", "dft"], "loss_type dft"), (["-1"], "greater than or equal to 0")):
        assert sft(tmp_path / "refused", "--kl_to_base", *flags) == 2
        assert reason in error_of(capsys)
