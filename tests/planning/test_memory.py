"""What a plan says of a run's memory against the tensors of a real run."""

from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback

import hft
from hft.continual.strategies.self_replay import reference_of
from hft.freezing import upcast
from hft.methods import Method
from hft.parts import parts_of
from hft.planning.counting import FLOAT32, MIXED
from hft.planning.forecast import forecast
from hft.planning.memory import Engine, memory_of
from hft.runs.train import make_trainer
from hft.training.reference import reference_bytes
from tests.model.test_architectures import small


class Gradients(TrainerCallback):
    """Bytes of all gradients, before each step of the optimizer."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def plan_of(objective, out, tiny, data, method="hft", **keys):
    settings = {"model_name_or_path": str(tiny), "dataset_name": str(data), "output_dir": str(out), "max_steps": 2}
    settings |= {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "no", "report_to": "none"}
    recipe = f"recipes/tiny/{objective}.yaml"
    return hft.make_plan(hft.load_config(objective, recipe, f"recipes/methods/{method}.yaml", **(settings | keys)))


def base_of(family, tiny, folder):
    """A small model of a family in bf16, with the tokenizer of the tiny one."""
    small(family).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def weights_of(model):
    """Bytes of what is frozen and of what trains."""
    weights = Counter()
    for parameter in model.parameters():
        weights[parameter.requires_grad] += parameter.nbytes
    return weights


def index_of(model):
    """Bytes of what says which elements train."""
    return sum(buffer.nbytes for part in parts_of(model).values() for buffer in part.buffers())


def moments_of(trainer):
    return [t for state in trainer.optimizer.state.values() for t in state.values() if t.dim()]


@pytest.mark.parametrize(
    ("objective", "keys"),
    [
        ("sft", {"bf16": False}),
        ("sft", {"bf16": True, "freeze_embeddings": True}),
        ("sft", {"bf16": True, "model_init_kwargs": {"dtype": "float32"}}),
        ("dpo", {"bf16": True}),
        ("dpo", {"bf16": True, "model_init_kwargs": {"dtype": "float32"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_state_of_a_run_takes_what_its_plan_says(objective, keys, tiny, data, pairs, tmp_path):
    plan = plan_of(objective, tmp_path / "out", tiny, pairs if objective == "dpo" else data, **keys)
    found = forecast(plan.config)
    assert found.run.engine.precision == (MIXED if keys["bf16"] else FLOAT32)
    trainer, gradients = make_trainer(plan), Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    memory, weights, moments = found.memory, weights_of(trainer.model), moments_of(trainer)
    assert weights[False] == memory.weights
    assert weights[True] == memory.master_weights
    assert gradients.bytes == memory.gradients
    assert sum(moment.nbytes for moment in moments) == memory.moments
    assert all(tensor.dtype == torch.float32 for tensor in moments)
    assert memory.reference == (reference_bytes(trainer) if objective == "dpo" else 0)
    assert memory.state == sum(weights.values()) + gradients.bytes + memory.moments + memory.reference


@pytest.mark.parametrize(
    ("family", "method", "objective", "most"),
    [
        ("llama", "random-element", "dpo", 0.51),
        ("phi3", "hft", "sft", 0.51),
        ("qwen3_moe", "hft", "dpo", 0.56),
        ("gpt_oss", "hft", "sft", 0.56),
    ],
)
def test_tensors_that_train_in_part_take_what_their_plan_says(
    family, method, objective, most, tiny, data, pairs, tmp_path
):
    base = base_of(family, tiny, tmp_path / "base")
    keys = {"bf16": True, "model_name_or_path": str(base), "max_length": 64, "per_device_train_batch_size": 2}
    keys |= {"global_batch_size": 2, "max_steps": 1}
    plan = plan_of(objective, tmp_path / "out", tiny, pairs if objective == "dpo" else data, method, **keys)
    trainer, gradients = make_trainer(plan), Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    memory, weights, selection = forecast(plan.config).memory, weights_of(trainer.model), plan.selection
    index = index_of(trainer.model)
    assert index > 0
    assert weights[False] + index == memory.weights
    assert weights[True] == gradients.bytes == memory.master_weights == memory.gradients == 4 * selection.num_trained
    assert sum(moment.nbytes for moment in moments_of(trainer)) == memory.moments
    assert memory.reference == (reference_bytes(trainer) if objective == "dpo" else 0)
    assert selection.num_trained_in_layers / selection.anatomy.numel_in_layers < most


def test_every_process_of_fsdp2_holds_an_equal_share():
    """FSDP2 cuts the first dimension, and half of a layer's experts are fewer than processes."""
    model = small("mixtral").to(torch.bfloat16)
    selection = hft.select(model)
    hft.freeze(model, selection)
    upcast(model, autocast=True)
    plan, held = memory_of(Method(selection.config), selection, Engine(processes=8, shards=8)), Counter()
    for parameter in model.parameters():
        held[parameter.requires_grad] += parameter.chunk(8)[0].nbytes
    assert held[True] == pytest.approx(plan.master_weights, rel=0.01)
    assert held[False] + index_of(model) == pytest.approx(plan.weights, rel=0.01)


@pytest.mark.parametrize("method", ["lora", "adalora", "osf", "p-tuning-v2"])
def test_the_state_of_an_adapters_run_takes_what_its_plan_says(method, tiny, data, tmp_path):
    plan = plan_of("sft", tmp_path / "out", tiny, data, method, bf16=True)
    trainer, gradients = make_trainer(plan), Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    memory, weights = forecast(plan.config).memory, weights_of(trainer.model)
    held = sum(buffer.nbytes for name, buffer in trainer.model.named_buffers() if "osf" in name)
    assert weights[False] + held == pytest.approx(memory.weights, rel=1e-4)  # AdaLoRA counts ranks, in a few bytes
    assert weights[True] == memory.master_weights
    assert gradients.bytes == memory.gradients
    assert sum(moment.nbytes for moment in moments_of(trainer)) == memory.moments


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_of_a_run_holds_what_its_plan_says(tiny, data, tmp_path, packing):
    """Activations of real tensors, in TRL's own loss: what autograd saves for rows as long as they may be."""
    keys = {"bf16": True, "per_device_train_batch_size": 2, "max_length": 64, "packing": packing}
    plan = plan_of("sft", tmp_path / "out", tiny, data, **keys)
    trainer = make_trainer(plan)
    model, own, saved = trainer.model, {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(2, 64, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, -1] = 0  # so that attention needs a mask, which costs what it costs with more padding
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    if packing:  # the rows of a micro-batch follow each other
        ids = ids.reshape(1, -1)
        inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(32).repeat(4)[None]}
    model.train()
    hooks, autocast = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16)
    with hooks, autocast, trainer.compute_loss_context_manager():
        trainer.compute_loss(model, inputs)
    step = forecast(plan.config).run.step
    assert step.saved + step.saved_copies == pytest.approx(sum(saved.values()), rel=0.03)


@pytest.mark.parametrize(("family", "bf16"), [("", True), ("", False), ("phi3", True)])
def test_self_replays_reference_takes_what_its_plan_says(family, bf16, tiny, data, tmp_path):
    base = base_of(family, tiny, tmp_path / "base") if family else tiny
    plan = plan_of("sft", tmp_path / "out", base, data, bf16=bf16, strategy="self-replay")
    trainer = make_trainer(plan)
    trainer.ref_model = reference_of(trainer)
    memory, weights, index = forecast(plan.config).memory, weights_of(trainer.model), index_of(trainer.model)
    assert weights[False] + index == memory.weights  # also of what trains in part, whose base the reference shares
    assert memory.reference == pytest.approx(reference_bytes(trainer), rel=1e-3)  # its norms are planned in fp32
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], p.to(state[name].dtype)) for name, p in trainer.ref_model.named_parameters())
