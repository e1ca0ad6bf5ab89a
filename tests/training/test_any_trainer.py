"""Any TRL trainer, half fine-tuned: the frozen half stays, a resume is exact, with nothing frozen it is TRL's."""

import copy
import inspect
import itertools
import math

import pytest
import torch
import trl
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

import hft
from hft.data import load_split
from hft.errors import HFTError
from hft.freezing import freeze, upcast
from hft.model.anatomy import anatomy_of, meta_model
from hft.record.manifest import Manifest
from hft.selection import SelectionConfig, select
from hft.training import half
from hft.training.reference import reference_bytes, share_frozen
from tests.conftest import identical, tensors


class DoubledLoss(trl.SFTTrainer):
    """A user's own trainer."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


def variety(completions, **kwargs) -> list[float]:
    return [float(len(set(str(completion)))) for completion in completions]


GENERATES = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
# Of each trainer its config, and settings that keep it small.
TRAINERS = {
    trl.SFTTrainer: (trl.SFTConfig, {"max_length": 64}),
    DoubledLoss: (trl.SFTConfig, {"max_length": 64}),
    trl.DPOTrainer: (trl.DPOConfig, {"max_length": 64}),
    trl.KTOTrainer: (trl.KTOConfig, {"max_length": 64}),
    trl.RewardTrainer: (trl.RewardConfig, {"max_length": 64}),
    trl.GRPOTrainer: (trl.GRPOConfig, GENERATES),
    trl.RLOOTrainer: (trl.RLOOConfig, GENERATES),
    trl.DistillationTrainer: (trl.DistillationConfig, {"max_completion_length": 4}),
    SDFTTrainer: (SDFTConfig, {"max_completion_length": 8, "num_generations": 2, "num_loss_tokens_to_skip": 0}),
}
WITH_REFERENCE = (trl.DPOTrainer, trl.KTOTrainer, trl.GRPOTrainer)
EVERYTHING = SelectionConfig(policy="all")


def rows_for(cls, pairs):
    rows = load_split(str(pairs), "train")
    if issubclass(cls, trl.SFTTrainer):
        return rows.map(lambda row: {"messages": row["prompt"] + row["chosen"]}, remove_columns=rows.column_names)
    if cls is SDFTTrainer:
        rows = rows.map(lambda row: {"privileged_context": row["chosen"][0]["content"]})
        return rows.select_columns(["prompt", "privileged_context"])
    prompts_only = cls in (trl.GRPOTrainer, trl.RLOOTrainer, trl.DistillationTrainer)
    return rows.select_columns(["prompt"]) if prompts_only else rows


@pytest.fixture(scope="module")
def build(tiny, pairs):
    """Make a trainer, half fine-tuned or TRL's own, ready for two steps."""

    def made(cls, out, *, plain=False, selection=None, **settings):
        config, small = TRAINERS[cls]
        same = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
        same |= {"logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
        args = config(output_dir=str(out), **same | small | settings)
        kwargs = {"train_dataset": rows_for(cls, pairs)}
        if "reward_funcs" in inspect.signature(cls.__init__).parameters:
            kwargs["reward_funcs"] = variety
        if cls is trl.DistillationTrainer:
            teacher = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
            teacher.lm_head.weight.data *= 1.5
            kwargs["teacher_model"] = teacher
        return (
            cls(str(tiny), args=args, **kwargs) if plain else half(cls)(str(tiny), args, selection=selection, **kwargs)
        )

    return made


def trained(trainer) -> list[tuple[float, float]]:
    """Train; the loss and the norm of the gradient in each step."""
    trainer.train()
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("cls", TRAINERS, ids=lambda cls: cls.__name__)
def test_the_frozen_half_stays_and_a_resume_is_exact(tmp_path, build, tiny, cls):
    run = build(cls, tmp_path)
    assert all(math.isfinite(loss) for loss, _ in trained(run))
    run.save_model()
    found, manifest, saved = hft.verify(tmp_path), Manifest.load(tmp_path), tensors(tmp_path)
    assert found.ok
    assert len(found.identical) == 18
    assert len(found.changed) > 10
    assert found.new == (["score.weight"] if cls is trl.RewardTrainer else [])
    assert ("new, the base has none: score.weight" in found.report()) == bool(found.new)
    assert sorted([*manifest.frozen_checksums, *manifest.trained_parameters]) == sorted(saved)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16

    resumed = build(cls, tmp_path)
    resumed.train(str(tmp_path / "checkpoint-1"))
    ours, theirs = resumed.model.state_dict(), run.model.state_dict()
    assert all(identical(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("cls", TRAINERS, ids=lambda cls: cls.__name__)
def test_with_nothing_frozen_the_losses_are_trls(tmp_path, build, cls):
    ours, theirs = (
        trained(build(cls, tmp_path, save_strategy="no", **how)) for how in ({"selection": EVERYTHING}, {"plain": True})
    )
    assert ours == theirs
    assert len(ours) == 2
    assert all(norm > 0 for _, norm in ours)


@pytest.mark.parametrize("cls", WITH_REFERENCE, ids=lambda cls: cls.__name__)
def test_a_shared_reference_gives_the_losses_of_a_full_copy(tmp_path, build, cls):
    shared = build(cls, tmp_path, save_strategy="no")
    frozen = set(shared.selection.frozen_parameters)
    for name, parameter in shared.ref_model.named_parameters():
        policy = shared.model.get_parameter(name)
        assert (parameter.data_ptr() == policy.data_ptr()) == (name in frozen), name
    assert "shares the frozen half" in shared.notes()[0]
    losses = trained(shared)
    copied = build(cls, tmp_path, save_strategy="no")
    copied.ref_model = copy.deepcopy(copied.ref_model)
    assert reference_bytes(copied) == sum(parameter.nbytes for parameter in copied.ref_model.parameters())
    assert trained(copied) == losses


@pytest.mark.parametrize(("autocast", "share"), [(True, 0.41), (False, 0.60)])
def test_a_reference_takes_a_part_of_trls_copy_on_smollm2s_shapes(autocast, share):
    """TRL's copy has the dtype of the policy's masters, fp32: 538 MB. Under autocast matrices need 2 bytes."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    policy, reference = meta_model(config).bfloat16(), meta_model(config).float()
    full = sum(parameter.nbytes for parameter in reference.parameters())
    stored = {name: parameter.dtype for name, parameter in policy.named_parameters()}
    freeze(policy, select(anatomy_of(policy), SelectionConfig()))
    upcast(policy, autocast=autocast)
    share_frozen(reference, policy, stored, autocast=autocast)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    needed = sum(p.nbytes for name, p in reference.named_parameters() if name in trained)
    assert full == pytest.approx(538e6, rel=0.01)
    assert needed / full == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("selection", [None, EVERYTHING], ids=["half", "all"])
def test_distillation_computes_in_bf16(tmp_path, build, selection):
    """TRL calls the decoder past the forward that accelerate puts under autocast."""
    run = build(trl.DistillationTrainer, tmp_path / "a", selection=selection, bf16=True, save_strategy="no")
    ours = trained(run)
    theirs = trained(build(trl.DistillationTrainer, tmp_path / "b", plain=True, bf16=True, save_strategy="no"))
    assert ours == theirs if selection else ours[0][0] == pytest.approx(theirs[0][0], rel=0.05)
    run.save_model()
    assert hft.verify(tmp_path / "a").ok


def test_a_head_that_the_base_lacks_trains_also_where_embeddings_are_frozen(tiny):
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    for freeze_embeddings in (False, True):
        selection = hft.select(model, freeze_embeddings=freeze_embeddings)
        assert "score.weight" in selection.trained_parameters
        hft.freeze(model, selection)
        assert model.score.weight.requires_grad


@pytest.mark.parametrize("where", ["", "model", "model.norm", "lm_head"])
def test_an_unknown_parameter_outside_the_layers_is_refused_by_name(tiny, where):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.get_submodule(where).register_module("own", nn.Bilinear(2, 2, 2))
    with pytest.raises(HFTError, match=r"not embeddings, heads or norms: .*own\.weight"):
        hft.select(model)


def test_a_module_around_a_model_is_refused_in_a_sentence():
    with pytest.raises(HFTError, match="give the one inside Sequential"):
        hft.select(nn.Sequential(nn.Linear(2, 2)))


def test_half_is_one_class_per_trainer():
    made = half(trl.GRPOTrainer)
    assert made is half(trl.GRPOTrainer)
    assert made is hft.half(trl.GRPOTrainer)
    assert issubclass(made, hft.HalfFineTuning)
    assert (made.__name__, made.__module__) == ("HFTGRPOTrainer", "hft.training")
    assert made._tag_names == [*trl.GRPOTrainer._tag_names, "hft"]
    assert (half(trl.SFTTrainer), half(trl.DPOTrainer)) == (hft.HFTSFTTrainer, hft.HFTDPOTrainer)


def test_a_trainers_check_needs_no_model(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    for cls, (setting, message) in itertools.product(
        [trl.DPOTrainer, trl.KTOTrainer, trl.GRPOTrainer],
        [
            ({"sync_ref_model": True}, "sync_ref_model would move the frozen half"),
            ({"activation_checkpointing_kwargs": {"selective": True}}, "has no 'selective'"),
        ],
    ):
        with pytest.raises(HFTError, match=message):
            half(cls).check(TRAINERS[cls][0](**settings | setting))
    half(trl.SFTTrainer).check(trl.SFTConfig(**settings, activation_checkpointing_kwargs={"selective": True}))
    with pytest.raises(HFTError, match="give the trainer's config as args"):
        half(trl.GRPOTrainer)("model", variety)
