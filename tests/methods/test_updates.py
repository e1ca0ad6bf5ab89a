import copy
import json
import os
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from hft.cli import main
from hft.data import load_split
from hft.methods.gmt import GMT
from hft.methods.l2sp import L2SP, Pull
from hft.methods.mixout import Mixout, mix
from hft.methods.mofo import MoFO
from hft.methods.update import copies
from hft.model.anatomy import anatomy_of
from hft.record.manifest import Manifest
from hft.selection import SelectionConfig
from hft.selection.masks import largest
from hft.training import HFTSFTTrainer
from tests.conftest import command, error_of, identical, losses, tensors

UPDATES = ["mixout", "l2sp", "mofo"]  # gmt is MoFO with another ranking
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.fixture
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def steps(model, optimizer, callbacks, count, seed):
    """Take steps as Trainer does, yielding the weights before and after each, and the gradients of the loss."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(5, 8, generator=generator)).square().sum().backward()
        before = copy.deepcopy(model.state_dict())
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        for callback in callbacks:
            callback.on_pre_optimizer_step(None, None, None, model=model, optimizer=optimizer)
        optimizer.step()
        for callback in callbacks:
            callback.on_optimizer_step(None, None, None, model=model, optimizer=optimizer)
        yield before, copy.deepcopy(model.state_dict()), gradients


def test_largest_takes_exactly_as_many_and_of_equal_ones_the_first():
    assert largest(torch.tensor([[1.0, 3.0], [2.0, 3.0]]), 2).tolist() == [[False, True], [False, True]]
    assert largest(torch.tensor([0.0, 5.0, 0.0, 0.0, 0.0]), 3).tolist() == [True, True, True, False, False]
    assert [int(largest(torch.zeros(7), count).sum()) for count in (0, 1, 6, 7)] == [0, 1, 6, 7]
    scores = torch.randn(40, 50).round(decimals=1)
    by_index = sorted(range(2000), key=lambda index: (-scores.view(-1)[index].item(), index))
    assert sorted(by_index[:777]) == largest(scores, 777).view(-1).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("update", [MoFO, GMT])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_the_top_entries_move_and_the_others_keep_their_bits(small, update, name):
    optimizer = OPTIMIZERS[name](small.parameters())
    list(steps(small, optimizer, [], 3, seed=1))  # warm: every entry has momentum
    callbacks = update(top_fraction=0.25).callbacks(small, None)
    for before, after, gradients in steps(small, optimizer, callbacks, 5, seed=2):
        for key, parameter in small.named_parameters():
            whole = update is MoFO and parameter.ndim == 1  # as in the official optimizer
            count = parameter.numel() if whole else round(0.25 * parameter.numel())
            state = optimizer.state[parameter]
            momentum = state["exp_avg"] if name == "adamw" else state["momentum_buffer"]
            ranked = (gradients[key] if update is GMT else momentum).abs().view(-1)
            moved = (before[key] != after[key]).view(-1)
            assert int(moved.sum()) == count
            assert set(moved.nonzero().squeeze(1).tolist()) == set(ranked.argsort(descending=True)[:count].tolist())
            assert identical(before[key].view(-1)[~moved], after[key].view(-1)[~moved])


@pytest.mark.parametrize(("update", "masked"), [(MoFO, False), (GMT, True)])
def test_the_moments_see_the_whole_gradient_in_mofo_and_the_masked_one_in_gmt(small, update, masked):
    optimizer = OPTIMIZERS["adamw"](small.parameters())
    callbacks = update(top_fraction=0.25).callbacks(small, None)
    mean = {name: torch.zeros_like(p) for name, p in small.named_parameters()}
    for _, _, gradients in steps(small, optimizer, callbacks, 3, seed=1):
        for name, parameter in small.named_parameters():
            g = gradients[name]
            g = g * largest(g.abs(), round(0.25 * g.numel())) if masked else g
            mean[name] = 0.9 * mean[name] + 0.1 * g
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], mean[name])


def test_what_moves_under_mofo_moves_as_under_the_optimizer_alone(small):
    alone = copy.deepcopy(small)
    ours, theirs = (OPTIMIZERS["adamw"](model.parameters()) for model in (small, alone))
    callbacks = MoFO(top_fraction=0.25).callbacks(small, None)
    (before, after, _), (_, expected, _) = (
        next(steps(*run, 1, seed=1)) for run in ((small, ours, callbacks), (alone, theirs, []))
    )
    for name in before:
        moved = before[name] != after[name]
        assert torch.equal(after[name][moved], expected[name][moved])


def test_l2sp_goes_back_by_lr_times_strength_after_each_step(small):
    start = {name: p.detach().clone().bfloat16() for name, p in small.named_parameters()}
    alone = copy.deepcopy(small)
    optimizer, plain = (OPTIMIZERS["adamw"](model.parameters()) for model in (small, alone))
    callbacks = [Pull(start, 2.0)]
    list(steps(small, optimizer, callbacks, 4, seed=1))
    for _ in steps(alone, plain, [], 4, seed=1):
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                parameter.copy_(parameter - 0.1 * 2.0 * (parameter - start[name].float()))
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], expected)


def test_mixout_mixes_whole_input_columns_by_the_printed_formula():
    torch.manual_seed(0)
    weight, start = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5).bfloat16()
    kept, p = torch.tensor([True, False, True, True, False]), 0.7
    mixed = mix(weight, start, p, kept)
    m, w0 = kept.float(), start.float()
    torch.testing.assert_close(mixed, ((1 - m) * w0 + m * weight - p * w0) / (1 - p))
    upstream = torch.randn(3, 5)
    mixed.backward(upstream)
    torch.testing.assert_close(weight.grad, upstream * m / (1 - p))


@pytest.fixture
def mixed(tiny):
    """The tiny model in training with mixout, moved a little away from its start."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).train()
    [callback] = Mixout(mixout_p=0.5).callbacks(model, anatomy_of(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    callback.on_train_begin(None, None, None, model=model)
    return model, callback


def gradients_of(model, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_columns_again(mixed, reentrant):
    model, _ = mixed
    expected = gradients_of(model)
    assert not torch.equal(gradients_of(model, seed=1)["lm_head.weight"], expected["lm_head.weight"])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients_of(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_mixout_leaves_evaluation_names_and_the_model_after_training_alone(mixed, tiny):
    model, callback = mixed
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())  # strict: the names are the plain ones
    ids = torch.arange(24).view(2, 12)
    expected = plain.eval()(ids).logits
    assert not torch.equal(model(ids).logits, expected)
    assert torch.equal(model.eval()(ids).logits, expected)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    callback.on_train_end(None, None, None, model=model)
    assert torch.equal(model.train()(ids).logits, expected)


def test_mixout_mixes_the_trained_matrices_of_the_layers_and_nothing_else(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    frozen = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    [callback] = Mixout(mixout_p=0.5).callbacks(model, anatomy_of(model))
    start = callback.start
    names = {name for name, p in model.named_parameters() if ".layers." in name and "proj" in name and p is not frozen}
    assert start.keys() == names
    assert {tensor.dtype for tensor in start.values()} == {torch.bfloat16}
    assert len(copies(model)) == len([p for p in model.parameters() if p.requires_grad])


# Twenty steps in seconds, with a frozen half and with weight decay, which moves what has no gradient.
STEPS = ["--max_steps", "20", "--save_steps", "10", "--global_batch_size", "4", "--per_device_train_batch_size", "4"]
STEPS += ["--max_length", "128", "--policy", "category", "--weight_decay", "0.1"]
EVALUATION = ["--eval_strategy", "steps", "--eval_steps", "20", "--eval_on_start", "true"]


@pytest.fixture(scope="module", params=UPDATES)
def finished(request, tmp_path_factory, tiny, data):
    """A finished run of each method."""
    os.chdir(request.config.rootpath)
    out = tmp_path_factory.mktemp(request.param) / "out"
    assert main(command("sft", out, *STEPS, *EVALUATION, method=request.param, model=tiny, data=data)) == 0
    return out, request.param


def test_each_method_learns_with_plain_names_in_every_checkpoint(finished, tiny):
    out, update = finished
    before, after = json.loads((out / "results.json").read_text())["held_out"]["loss"]
    assert after < before
    names = tensors(tiny).keys()
    assert all(tensors(folder).keys() == names for folder in (out, out / "checkpoint-10", out / "checkpoint-20"))
    assert Manifest.load(out).update["update"] == update


def test_a_frozen_half_stays_frozen(finished, tiny):
    out, _ = finished
    frozen = Manifest.load(out).frozen_checksums
    assert len(frozen) == 18
    base, saved = tensors(tiny), tensors(out)
    assert all(identical(base[name], saved[name]) for name in frozen)


def test_a_resumed_run_ends_where_the_straight_one_does(finished, tmp_path, sft):
    straight, update = finished
    resumed = shutil.copytree(straight, tmp_path / "resumed")
    (resumed / "results.json").unlink()
    shutil.rmtree(resumed / "checkpoint-20")
    assert sft(resumed, *STEPS, *EVALUATION, method=update) == 0
    ours, theirs = tensors(resumed / "checkpoint-20"), tensors(straight / "checkpoint-20")
    assert all(identical(ours[name], theirs[name]) for name in theirs)
    assert losses(resumed / "checkpoint-20") == losses(straight / "checkpoint-20")


def test_dpo_takes_them_too(tmp_path, tiny, dpo):
    out = tmp_path / "out"
    assert dpo(out, "--max_length", "128", method="mixout") == 0
    base, saved = tensors(tiny), tensors(out / "checkpoint-4")
    assert saved.keys() == base.keys()
    assert all(not torch.equal(saved[name], before.float()) for name, before in base.items())
    # At the start policy and reference agree, mixed or not.
    assert losses(out / "checkpoint-4")[0] == pytest.approx(0.6931, abs=1e-4)


def test_few_entries_move_in_one_step_of_a_run(tmp_path, tiny, sft):
    out = tmp_path / "out"
    assert sft(out, "--max_steps", "1", "--save_steps", "1", "--warmup_steps", "0", method="mofo") == 0
    base, saved = tensors(tiny), tensors(out / "checkpoint-1")
    for name, before in base.items():
        moved = int((saved[name] != before.float()).sum())
        assert 0 < moved <= (round(0.15 * before.numel()) if before.ndim > 1 else before.numel()), name


def test_resuming_with_another_update_is_refused(tmp_path, sft, capsys):
    out = tmp_path / "out"
    assert sft(out, method="mofo") == 0
    (out / "results.json").unlink()
    capsys.readouterr()
    for flags, method, message in (
        (["--top_fraction", "0.3"], "mofo", "(top_fraction 0.15 there, 0.3 here)"),
        ([], "gmt", "update mofo there, gmt here"),
        ([], "fft", "update mofo there, plain here"),
    ):
        assert sft(out, "--max_steps", "6", *flags, method=method) == 2
        error = error_of(capsys)
        assert message in error


@pytest.mark.parametrize(
    ("flags", "method", "message"),
    [
        (["--mixout_p", "0.5"], "mofo", "mixout_p is a key of update mixout; remove it"),
        (["--top_fraction", "0.5"], "fft", "top_fraction is a key of update gmt, mofo; remove it"),
        (["--update", "mofo"], "fft", "update 'mofo' needs top_fraction"),
        (["--top_fraction", "0"], "gmt", "top_fraction: expected a number greater than 0, got '0'"),
        (["--mixout_p", "1"], "mixout", "mixout_p: expected a number less than 1, got '1'"),
        (["--l2sp_strength", "-1"], "l2sp", "l2sp_strength: expected a number greater than 0, got '-1'"),
        (["--update", "mufo"], "fft", "update: unknown update 'mufo', did you mean 'mofo'?"),
        (["--optim", "sgd"], "mofo", "set optim to adamw_torch or adamw_torch_fused, not sgd"),
        (["--optim", "galore_adamw_layerwise"], "l2sp", "but galore_adamw_layerwise has no such separate step"),
        (["--optim", "schedule_free_adamw"], "gmt", "but schedule_free_adamw has no such separate step"),
        (["--optim", "adalomo"], "lisa", "schedule lisa acts on gradients and weights around the optimizer's step"),
        (
            ["--optim", "apollo_adamw_layerwise", "--strategy", "seqft", "--carry_moments", "true"],
            "hft",
            "strategy seqft",
        ),
        (["--optim", "adafactor"], "random-element", "in part, and adafactor is not elementwise"),
        (["--optim", "adamw_bnb_8bit"], "random-element", "and adamw_bnb_8bit is not elementwise"),
        (["--gradient_checkpointing_kwargs", '{"preserve_rng_state": false}'], "mixout", "drop preserve_rng_state"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, sft, capsys, flags, method, message):
    assert sft(tmp_path / "out", *flags, method=method) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_trainer_takes_an_update_from_python(tmp_path, tiny, data):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=1, report_to="none")
    update = L2SP(l2sp_strength=1.0)
    selection = SelectionConfig(policy="all")
    trainer = HFTSFTTrainer(
        str(tiny), args, selection=selection, update=update, train_dataset=load_split(str(data), "train")
    )
    trainer.train()
    assert trainer.manifest.update == {"update": "l2sp", "l2sp_strength": 1.0}
    [pull] = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Pull)]
    assert {start.dtype for start in pull.start.values()} == {torch.bfloat16}  # as stored, not as the masters
    assert sum(start.nbytes for start in pull.start.values()) == update.memory(trainer.selection)
