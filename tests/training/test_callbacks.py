"""What trains is what was planned, whatever the engine, the optimizer or an evaluation makes of it."""

import pytest
import torch
import trl
from transformers import TrainerCallback

from hft.data import load_split
from hft.errors import HFTError
from hft.methods.gmt import GMT
from hft.selection import SelectionConfig
from hft.training import half
from tests.conftest import identical, tensors


class HalvesMasters(trl.SFTTrainer):
    """An engine that leaves all weights in bf16, as accelerate 1.13 does under FSDP2."""

    def create_scheduler(self, *args, **kwargs):
        self.model.bfloat16()
        return super().create_scheduler(*args, **kwargs)


class StepsElsewhere(trl.SFTTrainer):
    """A user's own optimizer, which does not hold what trains."""

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        return self.optimizer


class Averaging(torch.optim.SGD):
    """Evaluates other weights than it trains, as schedule-free optimizers do: here twice as large, which is exact."""

    evaluates = False

    @torch.no_grad()
    def turn(self, evaluates: bool):
        if self.evaluates != evaluates:
            self.evaluates = evaluates
            for parameter in (p for group in self.param_groups for p in group["params"]):
                parameter.mul_(2 if evaluates else 0.5)

    def eval(self):
        self.turn(True)

    def train(self):
        self.turn(False)


def arguments(out, **settings):
    same = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 64, "use_cpu": True, "bf16": False}
    same |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return trl.SFTConfig(str(out), **same | settings)


@pytest.fixture
def build(tiny, data, tmp_path):
    """A half fine-tuned trainer, ready for two steps."""

    def made(cls=trl.SFTTrainer, settings=None, **kwargs):
        rows = load_split(str(data), "train").select(range(8))
        return half(cls)(str(tiny), arguments(tmp_path, **settings or {}), train_dataset=rows, **kwargs)

    return made


def test_an_engine_that_leaves_no_fp32_masters_is_refused(build):
    with pytest.raises(HFTError, match=r"weight should be held in torch\.float32 and .* made it torch\.bfloat16"):
        build(HalvesMasters).train()


def test_another_batch_than_planned_is_refused_before_the_first_step(build):
    trainer = build()
    trainer.args.gradient_accumulation_steps = 3
    with pytest.raises(HFTError, match="a step takes 6 rows, but 2 are planned"):
        trainer.train()


@pytest.mark.parametrize(
    "settings",
    [
        {"accelerator_config": {"split_batches": True}},
        {"accelerator_config": {"dispatch_batches": True}},
        {"accelerator_config": {"even_batches": False}},
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
        {"auto_find_batch_size": True},
    ],
    ids=str,
)
def test_what_would_change_the_batch_is_refused(tmp_path, settings):
    with pytest.raises(HFTError, match="would change the rows per step"):
        half(trl.SFTTrainer).check(arguments(tmp_path, **settings))


@pytest.mark.parametrize(("settings", "wanted"), [({}, "no"), ({"bf16": True}, "bf16")])
def test_the_key_decides_the_precision_and_not_the_launcher(build, monkeypatch, settings, wanted):
    for environment in ("bf16", "fp16", "no"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)
        assert build(settings=settings).accelerator.mixed_precision == wanted


def test_an_optimizer_that_does_not_hold_what_trains_is_refused(build):
    with pytest.raises(HFTError, match=r"should train, but the optimizer lacks it"):
        build(StepsElsewhere).train()
    with pytest.raises(HFTError, match=r"Averaging keeps its own copy of the weights"):
        build(update=GMT(top_fraction=0.5), optimizer_cls_and_kwargs=(Averaging, {"lr": 0.1})).train()


def test_a_resume_without_the_optimizers_state_is_refused(build, tmp_path):
    trainer = build(settings={"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"})
    with pytest.raises(HFTError, match="galore_adamw_layerwise saves no state"):
        trainer.train(str(tmp_path))


class Stops(TrainerCallback):
    """A user's own callback, which stops where nothing is evaluated or saved."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == 3


def test_what_is_saved_does_not_depend_on_whether_there_was_an_evaluation(build, data, tmp_path):
    """At the end, and in a checkpoint after which the training continues."""
    rows, saved = load_split(str(data), "test").select(range(2)), {}
    each = {"eval_strategy": "steps", "eval_steps": 2}
    best = each | {"save_strategy": "best", "load_best_model_at_end": True, "max_steps": 4}
    for name, more in (("none", {}), ("each", each), ("best", best)):
        settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2} | more
        trainer = build(settings=settings, optimizer_cls_and_kwargs=(Averaging, {"lr": 0.1}), eval_dataset=rows)
        trainer.add_callback(Stops())
        trainer.train()
        trainer.save_model(str(tmp_path / name))
        saved[name] = tensors(tmp_path / name), tensors(tmp_path / "checkpoint-2")
        assert trainer.optimizer.optimizer.evaluates
    for ours, theirs in zip(saved["none"], saved["each"], strict=True):
        assert all(identical(ours[key], theirs[key]) for key in ours)
    chosen = tensors(trainer.state.best_model_checkpoint)
    assert all(identical(saved["best"][0][key], chosen[key].bfloat16()) for key in chosen)


class Moves(TrainerCallback):
    """A user's own callback, added last, which moves weights."""

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)


def test_frozen_elements_stay_whatever_a_callback_moves_of_what_trains(build, tiny):
    trainer = build(selection=SelectionConfig(policy="random-element"))
    trainer.add_callback(Moves())
    trainer.train()
    base, state = tensors(tiny), trainer.model.state_dict()
    for name, mask in trainer.selection.frozen_masks.items():
        held = mask.tensor().expand(base[name].shape)
        assert torch.equal(state[name][held], base[name].float()[held])
        assert not torch.equal(state[name], base[name].float())
