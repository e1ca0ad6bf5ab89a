"""Strategies: GEM's program against brute force and on a real model, what is replayed, and what an optimizer keeps."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from trl import SFTConfig

from hft.cli import main
from hft.continual.gradients import dot_products, loss_gradient, next_token_logits, take_gradient, tokenized
from hft.continual.strategies.gem import GEM, dual_variables
from hft.continual.strategies.replay import Replay
from hft.methods import find_method
from hft.methods.moments import MOMENTS_NAME
from hft.record.manifest import Manifest
from hft.selection import SelectionConfig
from hft.training import HFTSFTTrainer
from tests.conftest import command, error_of, identical, tensors, write_jsonl

RAW = ["--chat_template_path", "raw.jinja", "--assistant_only_loss", "false", "--bf16", "false"]


def project(g: torch.Tensor, memories: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """GEM's projection of small vectors."""
    return g + dual_variables(memories @ memories.T, memories @ g, margin) @ memories


def test_the_example_that_traces_gem_gets_wrong():
    g, m = torch.tensor([-2.0, 1.0]).double(), torch.tensor([[1.0, 0.0]]).double()
    assert project(g, m).tolist() == pytest.approx([0, 1])
    assert project(g, m, margin=0.5).tolist() == pytest.approx([0, 1])  # v = 2 is above the margin
    assert project(g, 10 * m, margin=0.5).tolist() == pytest.approx([3, 1])  # v = 0.2 is not: g + 0.5 m


@pytest.mark.parametrize("seed", range(8))
def test_the_projection_is_the_closest_point_that_raises_no_loss(seed):
    random = torch.Generator().manual_seed(seed)
    tasks = seed % 4 + 1
    g, memories = (torch.randn(*shape, 6, generator=random, dtype=torch.float64) for shape in ((), (tasks,)))
    if seed == 3:
        memories[1] = memories[0]  # a singular program
    z = project(g, memories)
    assert (memories @ z >= -1e-9).all()
    # Brute force over which constraints are active.
    allowed = [point for point in candidates(g, memories) if (memories @ point >= -1e-9).all()]
    assert float((z - g).norm()) == pytest.approx(min(float((point - g).norm()) for point in allowed), abs=1e-8)


def candidates(g, memories):
    for size in range(len(memories) + 1):
        for active in itertools.combinations(range(len(memories)), size):
            m = memories[list(active)]
            yield g - torch.linalg.pinv(m) @ (m @ g) if active else g


def test_without_a_conflict_nothing_changes():
    g, m = torch.tensor([1.0, 1.0]).double(), torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()
    assert torch.equal(project(g, m, margin=0.5), g)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Eight rows, and the same prompts with the other answer."""
    folder = tmp_path_factory.mktemp("rows")
    made = [{"prompt": f"Say {n}.\nAnswer:", "completion": "one" if n % 2 else "two three"} for n in range(8)]
    other = [row | {"completion": "five", "task": "0"} for row in made]
    return {
        "folder": folder,
        "rows": made,
        "train": write_jsonl(folder / "train.jsonl", made),
        "same": write_jsonl(folder / "same.jsonl", [row | {"task": "0"} for row in made]),
        "other": write_jsonl(folder / "other.jsonl", other),
    }


def sft(rows, tiny, out, *flags, method="hft"):
    batch = ["--global_batch_size", "8", "--per_device_train_batch_size", "8", "--max_steps", "2", "--save_steps", "2"]
    return main(command("sft", out, *RAW, *batch, *flags, model=tiny, data=rows["train"], method=method))


def test_memory_that_is_the_current_task_changes_nothing(rows, tiny, tmp_path):
    assert sft(rows, tiny, tmp_path / "plain") == 0
    assert sft(rows, tiny, tmp_path / "gem", "--strategy", "gem", "--strategy_data", str(rows["same"])) == 0
    plain, gem = tensors(tmp_path / "plain" / "checkpoint-2"), tensors(tmp_path / "gem" / "checkpoint-2")
    assert all(identical(plain[name], gem[name]) for name in plain)
    assert Manifest.load(tmp_path / "gem").strategy["memory_rows"] == 32


@pytest.mark.parametrize(("name", "margin"), [("gem", {"gem_margin": 0.0}), ("agem", {})])
def test_a_conflict_is_projected_to_the_boundary(rows, tiny, tmp_path, name, margin):
    from hft.runs.config import load_config
    from hft.runs.plan import load_tokenizer

    config = load_config("sft", "recipes/tiny/sft.yaml", model_name_or_path=str(tiny), chat_template_path="raw.jinja")
    tokenizer = load_tokenizer(config)
    messages = [
        {key: [{"role": role, "content": row[key]}] for key, role in (("prompt", "user"), ("completion", "assistant"))}
        for row in rows["rows"]
    ]
    from datasets import Dataset

    args = SFTConfig(str(tmp_path), per_device_train_batch_size=8, report_to="none", use_cpu=True, bf16=False)
    trainer = HFTSFTTrainer(
        str(tiny),
        args,
        selection=SelectionConfig(),
        train_dataset=Dataset.from_list(messages),
        processing_class=tokenizer,
    )
    ours = [tokenized(row, tokenizer) for row in rows["rows"]]
    assert ours == [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset]

    strategy = find_method("strategy", name)(strategy_data=str(rows["other"]), **margin)
    (projection,) = strategy.callbacks(trainer)
    trainer.model_wrapped, parameters = trainer.model, [p for p in trainer.model.parameters() if p.requires_grad]
    memory = loss_gradient(trainer, [tokenized(row, tokenizer) for row in read(rows["other"])], parameters)
    # A gradient that undoes what the memory learns, beside one that it does not see.
    before = loss_gradient(trainer, ours, parameters)
    for parameter, g, m in zip(parameters, before, memory, strict=True):
        parameter.grad = g - 3 * m
    assert dot_products([[p.grad for p in parameters], memory], args.device)[0, 1] < 0
    projection.on_pre_optimizer_step(args, trainer.state, None, model=trainer.model)
    # Nothing that is frozen has a gradient.
    assert [p for p in trainer.model.parameters() if p.grad is not None] == parameters
    gram = dot_products([take_gradient(parameters), memory], args.device)
    assert abs(float(gram[0, 1])) < 1e-4 * float(gram[1, 1])


def test_the_largest_entries_are_those_of_the_projected_gradient(rows, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(GEM, "weights", lambda self, gram: [1.0])  # as if the tasks conflicted
    one = ["--max_steps", "1", "--save_steps", "1", "--strategy", "gem", "--strategy_data", str(rows["other"])]
    assert sft(rows, tiny, tmp_path / "gem", *one, "--weight_decay", "0.1", method="gmt") == 0
    state = torch.load(tmp_path / "gem" / "checkpoint-1" / "optimizer.pt")["state"].values()
    assert len(state) == len(tensors(tiny))
    for moments in state:
        average = moments["exp_avg"]
        assert 0 < average.count_nonzero() <= round(0.2 * average.numel())


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_replay_takes_the_first_rows_of_earlier_tasks_and_the_alignment_set():
    tasks = [[{"prompt": f"{task} {n}", "completion": ""} for n in range(20)] for task in "abc"]
    lima = [{"prompt": "lima", "completion": ""}]
    wanted = [*tasks[0][:2], *tasks[1][:2], *lima]
    after, mixed = Replay(), Replay(replay_mode="mixed")
    assert (after.training_rows(tasks, lima), after.replay_rows(tasks, lima)) == (tasks[2], wanted)
    assert (mixed.training_rows(tasks, lima), mixed.replay_rows(tasks, lima)) == (tasks[2] + wanted, [])
    assert after.replay_rows(tasks[:1], lima) == lima


def test_gem_remembers_some_rows_of_each_earlier_task():
    tasks = [[{"prompt": f"{task} {n}", "completion": ""} for n in range(9)] for task in "abc"]
    kept = GEM(memory_rows=4).remembered_rows(tasks)
    assert [row["prompt"][0] for row in kept] == ["a"] * 4 + ["b"] * 4
    assert kept == GEM(memory_rows=4).remembered_rows(tasks) != GEM(memory_rows=4, memory_seed=1).remembered_rows(tasks)
    assert GEM().remembered_rows(tasks[:1]) == []


def test_self_replay_holds_the_model_to_its_own_text(rows, tiny, tmp_path, monkeypatch):
    modes = set()

    def observed(model, batch):
        modes.add((model.training, torch.is_grad_enabled()))
        return next_token_logits(model, batch)

    monkeypatch.setattr("hft.continual.strategies.self_replay.next_token_logits", observed)
    own = ["--strategy", "self-replay", "--replay_texts", "8", "--replay_tokens", "12", "--replay_batch", "8"]
    own += ["--learning_rate", "2e-3", "--lr_scheduler_type", "constant", "--max_steps", "6", "--save_strategy", "no"]
    assert sft(rows, tiny, tmp_path / "held", *own, "--kl_weight", "100", method="fft") == 0
    assert sft(rows, tiny, tmp_path / "free", *own, "--kl_weight", "0", method="fft") == 0
    texts = json.loads((tmp_path / "held" / "self_replay.json").read_text())
    assert texts == json.loads((tmp_path / "free" / "self_replay.json").read_text())
    assert all(text[0] == 1 and 1 < len(text) <= 12 for text in texts)
    assert modes == {(False, False), (True, True)}  # the reference evaluates, and the model always trains
    held, free = (divergence(tiny, tmp_path / name, texts) for name in ("held", "free"))
    assert 0 < held < free / 2


def divergence(base, tuned, texts):
    """Mean KL(base || tuned) over the tokens of some texts."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (base, tuned)]
    with torch.no_grad():
        p, q = (torch.cat([m(torch.tensor([t])).logits[0, :-1].log_softmax(-1) for t in texts]) for m in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_an_adapter_goes_on_from_the_run_before(rows, tiny, tmp_path, capsys):
    assert sft(rows, tiny, tmp_path / "a", method="lora-qv") == 0
    own = ["--strategy", "lora", "--previous_run", str(tmp_path / "a"), "--learning_rate", "0"]
    assert sft(rows, tiny, tmp_path / "b", *own, method="lora-qv") == 0
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert any(value.any() for name, value in before.items() if "lora_B" in name)
    assert all(identical(before[name], after[name]) for name in before)
    capsys.readouterr()
    assert sft(rows, tiny, tmp_path / "c", *own, method="hft") == 2
    assert "strategy lora needs an adapter" in error_of(capsys)
    assert sft(rows, tiny, tmp_path / "c", "--strategy", "gem", method="lora-qv") == 2
    assert "strategy gem does not work with an adapter" in error_of(capsys)


def test_moments_are_carried_by_name(rows, tiny, tmp_path):
    carry = ["--strategy", "seqft", "--carry_moments", "true"]
    assert sft(rows, tiny, tmp_path / "1", *carry) == 0
    assert sft(rows, tmp_path / "1", tmp_path / "2", *carry) == 0
    one, two = (load_file(tmp_path / name / MOMENTS_NAME) for name in "12")
    trained_in = [set(Manifest.load(tmp_path / name).trained_parameters) for name in "12"]
    for name in trained_in[0] | trained_in[1]:
        steps = 2 * ((name in trained_in[0]) + (name in trained_in[1]))
        assert two[f"{name}|step"] == steps, name
    only_first = next(iter(trained_in[0] - trained_in[1]))
    assert identical(one[f"{only_first}|exp_avg"], two[f"{only_first}|exp_avg"])
