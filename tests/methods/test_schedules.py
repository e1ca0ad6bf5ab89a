"""Methods that change which units train during a run."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hft.cli import main
from hft.methods import method_of
from hft.methods.autofreeze import AutoFreeze, next_start
from hft.methods.badam import BAdam
from hft.methods.callback import ScheduleCallback, move
from hft.methods.dynamic import Dynamic
from hft.methods.lisa import Lisa
from hft.methods.schedule import from_row, outside_layers, to_row, units_of_layers
from hft.model.anatomy import anatomy_of, meta_model
from hft.planning.memory import memory_of
from hft.record.manifest import Manifest
from hft.selection import SelectionConfig, select
from tests.conftest import ROOT, command, error_of, identical, tensors
from tests.processes import torchrun
from tests.selection.test_selection import anatomy_of_recipe

SMALL = ["--per_device_train_batch_size", "4", "--global_batch_size", "4", "--max_length", "48"]
# Every step has its checkpoint, moves every weight, and would decay the frozen ones too if the optimizer saw them.
STEPWISE = [*SMALL, "--save_steps", "1", "--warmup_steps", "0", "--weight_decay", "0.1", "--learning_rate", "3e-3"]
# What the draws of seed 0 are to stay on every machine and version.
LISA_GOLDEN = [[9, 27], [9, 27], [1, 26], [1, 31], [7, 26], [10, 14]]
BADAM_GOLDEN = [9, 27, 29, 8, 2, 22]
FLAGS = {
    "dynamic": [],
    "lisa": ["--switch_every", "3"],
    "badam": ["--switch_every", "3", "--schedule_seed", "2"],  # its second pass begins where the first ends
    "autofreeze": [],
    "smartfrz": ["--intervals", "4"],
}


@pytest.fixture(scope="module")
def llama2_7b():
    os.chdir(ROOT)
    return select(anatomy_of_recipe("llama2-7b"), SelectionConfig(policy="all"))


@pytest.fixture(scope="module")
def tiny_selection(tiny):
    return select(anatomy_of(meta_model(AutoConfig.from_pretrained(tiny))), SelectionConfig(policy="all"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny, data):
    """Runs at a stretch with a checkpoint after each step, made when they are first asked for."""
    made = {}

    def run(method: str, *flags: str) -> Path:
        if (method, *flags) not in made:
            steps = 12 if flags else 20
            out = tmp_path_factory.mktemp("straight") / method
            words = [*STEPWISE, *FLAGS[method], *flags, "--max_steps", str(steps)]
            assert main(command("sft", out, *words, method=method, model=tiny, data=data)) == 0
            made[method, *flags] = out
        return made[method, *flags]

    return run


def layers(selection, names):
    return [index for index in range(selection.anatomy.num_layers) if units_of_layers(selection, [index]) <= names]


@pytest.mark.parametrize("method", FLAGS)
def test_exactly_what_the_schedule_says_moves_at_each_step(straight, tiny, tiny_selection, method):
    # With a pull towards the base, which must not move what is frozen for now.
    pull = ["--update", "l2sp", "--l2sp_strength", "10"] if method == "lisa" else []
    out = straight(method, *pull)
    manifest = Manifest.load(out)
    record = manifest.schedule
    assert record["config"]["schedule"] == method
    steps = record["steps"]
    assert record["history"][0]["step"] == 0
    assert len(record["history"]) > 1
    phases = [from_row(tiny_selection, row) for row in record["history"]]
    before = {name: tensor.float() for name, tensor in tensors(tiny).items()}
    for step in range(steps):
        names = next(names for first, names in reversed(phases) if first <= step)
        trained = {p for unit in tiny_selection.anatomy.units if unit.name in names for p in unit.parameters} | names
        after = {name: tensor.float() for name, tensor in tensors(out / f"checkpoint-{step + 1}").items()}
        for name, tensor in before.items():
            assert identical(tensor, after[name]) == (name not in trained), (step, name)
        before = after
    assert main(["verify", str(out)]) == 0
    assert (out / "selection.png").stat().st_size > 1000
    fractions = json.loads((out / "results.json").read_text())["schedule_fractions"]
    assert fractions == record["fractions"]
    assert 0 < fractions["mean"] < 1


@pytest.mark.parametrize("method", ["dynamic", "lisa", "badam"])
def test_a_run_keeps_to_the_pure_schedule(straight, tiny_selection, method):
    manifest, card = Manifest.load(straight(method)), (straight(method) / "README.md").read_text()
    record = manifest.schedule
    assert f"| schedule | {method}: " in card
    assert f"; of the layers {record['fractions']['mean']:.1%} at a time, on average" in card
    assert sum(trained for trained, _ in manifest.counts.values()) == len(manifest.trained_units)
    schedule = method_of(record["config"]).schedule
    selection = tiny_selection
    if method == "badam":
        selection = select(tiny_selection.anatomy, SelectionConfig(policy="all", freeze_embeddings=True))
    for step in range(20):
        row = [row for row in record["history"] if row["step"] <= step][-1]
        assert from_row(selection, row)[1] == schedule.trained_at(selection, step, 20)


def test_dpo_trains_with_a_schedule_too_and_wandb_gets_its_picture(tmp_path, dpo, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    flags = ["--max_steps", "10", "--save_steps", "10", "--report_to", "wandb"]
    assert dpo(tmp_path / "out", *SMALL, *flags, method="dynamic") == 0
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("files/media/images/schedule*.png"))
    record = Manifest.load(tmp_path / "out").schedule
    assert [row["step"] for row in record["history"]] == list(range(10))
    assert record["fractions"]["last"] < 0.2


def test_dynamic_freezes_a_tenth_after_each_tenth(llama2_7b):
    phases = Dynamic().phases(llama2_7b, 5098)
    assert [step for step, _ in phases] == [0, 510, 1020, 1530, 2040, 2549, 3059, 3569, 4079, 4589]
    ends = set(outside_layers(llama2_7b))
    sizes = {unit.name: unit.numel for unit in llama2_7b.anatomy.units}
    for tenth, (_, names) in enumerate(phases):
        trained = sum(size for name, size in sizes.items() if name in names) / llama2_7b.anatomy.numel_in_layers
        assert trained == pytest.approx(1 - tenth / 10, abs=0.005)
        assert ends <= names
        assert not tenth or names < phases[tenth - 1][1]
    other = Dynamic(schedule_seed=1).phases(llama2_7b, 5098)
    assert other[0] == phases[0]
    assert other[1] != phases[1]


def test_lisa_draws_two_layers_every_20_steps(llama2_7b):
    lisa = Lisa()
    drawn = [layers(llama2_7b, lisa.trained_at(llama2_7b, step, 100)) for step in range(100)]
    assert [drawn[step] for step in (0, 19, 20, 40, 60, 80)] == LISA_GOLDEN
    assert all(len(pair) == 2 for pair in drawn)
    assert all(drawn[step] == drawn[step - step % 20] for step in range(100))
    assert lisa.trained_at(llama2_7b, 0, 100) >= set(outside_layers(llama2_7b))
    assert lisa.trained_at(llama2_7b, 99, 10**6) == lisa.trained_at(llama2_7b, 99, 100)
    count = [0] * 32
    for interval in range(2000):
        for layer in layers(llama2_7b, lisa.trained_at(llama2_7b, 20 * interval, 40_000)):
            count[layer] += 1
    assert 80 < min(count) <= max(count) < 175  # 125 each on average: uniform, not by importance


def test_badam_visits_every_layer_once_a_pass(llama2_7b):
    selection = select(llama2_7b.anatomy, SelectionConfig(policy="all", freeze_embeddings=True))

    def passes(order, count=2):
        badam = BAdam(switch_every=1, block_order=order)
        names = [badam.trained_at(selection, step, 64) for step in range(32 * count)]
        assert not any(set(outside_layers(selection)) & step for step in names)
        assert all(len(layers(selection, step)) == 1 for step in names)
        visited = [layers(selection, step)[0] for step in names]
        return [visited[32 * index : 32 * index + 32] for index in range(count)]

    assert passes("ascending") == [list(range(32))] * 2
    assert passes("descending") == [list(range(31, -1, -1))] * 2
    first, second = passes("random")
    assert sorted(first) == sorted(second) == list(range(32))
    assert first != second
    assert first[:6] == BADAM_GOLDEN
    whole = BAdam(switch_every=1, block_order="ascending")
    assert whole.trained_at(llama2_7b, 32, 64) == set(outside_layers(llama2_7b))


@pytest.mark.parametrize(
    ("before", "now", "start", "percentile", "expected"),
    [
        ([10, 10, 10, 10], [9, 8, 15, 20], 0, 50, 2),  # changes .1 .2 .5 1: the median .35 is first reached by layer 2
        ([10, 10, 10, 10], [20, 15, 8, 9], 0, 50, 0),  # the first layer changes most
        ([10, 10, 10, 10], [9, 8, 15, 20], 0, 100, 3),
        ([10, 10, 10, 10], [9, 8, 15, 20], 0, 0, 0),
        ([0, 0, 10, 10], [0, 0, 9, 20], 2, 50, 3),  # what is frozen has no say
        ([0, 0, 0, 10], [0, 0, 0, 20], 3, 50, 3),  # the last layer never freezes
        ([0, 10, 10, 10], [1, 10, 10, 10], 0, 50, 0),
        ([10, 10, 10, 10], [float("nan"), 1, 2, 3], 1, 50, 1),
        ([10, float("nan"), 10, 10], [1, 1, 2, 3], 1, 50, 1),
    ],
)
def test_autofreeze_goes_to_the_first_layer_that_still_changes(before, now, start, percentile, expected):
    assert next_start(before, now, start, percentile) == expected


def test_autofreeze_freezes_a_prefix_and_the_embeddings_with_it(straight, tiny_selection):
    history = Manifest.load(straight("autofreeze")).schedule["history"]
    for earlier, row in pairwise(history):
        assert row["layers"] == list(range(row["layers"][0], 4))
        assert row["layers"][0] > earlier["layers"][0]
        assert row["outside"] == ["lm_head.weight", "model.norm.weight"]
    assert history[0]["layers"] == [0, 1, 2, 3]
    assert "model.embed_tokens.weight" in history[0]["outside"]


def test_autofreeze_averages_the_l1_norms_of_the_steps(tiny, tiny_selection):
    model = AutoModelForCausalLM.from_pretrained(tiny).float()
    schedule, measured = AutoFreeze(intervals=2), {}
    schedule.decide(tiny_selection, 0, 4, model, measured)
    for factor in (1, 3):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, -factor)
        schedule.on_gradients(tiny_selection, model, measured)
    schedule.decide(tiny_selection, 2, 4, model, measured)
    sizes = [sum(unit.numel for unit in tiny_selection.anatomy.layer(layer)) for layer in range(4)]
    assert measured["means"] == [2 * size for size in sizes]
    assert measured["sums"] == [0] * 4


def test_rows_read_back_as_what_was_written(llama2_7b):
    for schedule in (Dynamic(), Lisa(), BAdam()):
        for phase in schedule.phases(llama2_7b, 100):
            assert from_row(llama2_7b, json.loads(json.dumps(to_row(llama2_7b, *phase)))) == phase


def optimizer_state(checkpoint):
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_a_frozen_layer_loses_or_keeps_its_optimizer_state(straight, tiny_selection, policy):
    out = straight("lisa", *([] if policy == "reset" else ["--optimizer_state", policy]))
    lisa = Lisa(switch_every=3)
    sizes = {unit.name: unit.numel for unit in tiny_selection.anatomy.units}
    sizes |= tiny_selection.anatomy.embeddings | tiny_selection.anatomy.others
    for step in (0, 5, 6, 11):
        counted = range(step + 1) if policy != "reset" else [step]
        names = frozenset().union(*(lisa.trained_at(tiny_selection, s, 20) for s in counted))
        moments = sum(entry["exp_avg"].numel() for entry in optimizer_state(out / f"checkpoint-{step + 1}").values())
        assert moments == sum(sizes[name] for name in names)


def test_kept_state_trains_on_another_way_than_fresh_state(straight):
    kept = [straight("lisa", "--optimizer_state", policy) / "checkpoint-12" for policy in ("keep", "offload")]
    keep, offload, reset = map(tensors, [*kept, straight("lisa", "--max_steps", "12") / "checkpoint-12"])
    assert all(identical(keep[name], offload[name]) for name in keep)
    assert not all(identical(keep[name], reset[name]) for name in keep)


def test_badam_starts_every_block_with_fresh_state(straight):
    out = straight("badam")
    for step in range(20):
        state = optimizer_state(out / f"checkpoint-{step + 1}")
        assert {int(entry["step"]) for entry in state.values()} == {step % 3 + 1}
        assert len(state) == 9


def test_a_gradient_left_over_moves_nothing(tiny, tiny_selection):
    """Optimizers update whatever has a gradient, whether or not it requires one."""
    model = AutoModelForCausalLM.from_pretrained(tiny).float()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    schedule = ScheduleCallback(tiny_selection, Lisa(optimizer_state="keep"))
    schedule._trained = units_of_layers(tiny_selection, [2])
    schedule.enforce(model, optimizer, clear=False)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert identical(before[name], parameter.detach()) == (not name.startswith("model.layers.2."))


def test_offloading_moves_the_moments_and_leaves_the_counters():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    move(optimizer.state[parameter], torch.device("meta"))
    devices = {key: value.device.type for key, value in optimizer.state[parameter].items()}
    assert devices == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


@pytest.mark.parametrize(
    ("method", "flags", "at"),
    [
        ("lisa", [], 10),  # within an interval
        ("lisa", ["--optimizer_state", "keep"], 9),  # between two: the switch is still to come
        ("badam", [], 15),
        ("autofreeze", [], 11),
        ("smartfrz", [], 13),
    ],
)
def test_a_killed_run_goes_on_exactly_where_it_was(tmp_path, straight, sft, method, flags, at):
    done = straight(method, *flags)
    steps = Manifest.load(done).schedule["steps"]
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(done / "config.yaml", out)
    shutil.copytree(done / f"checkpoint-{at}", out / f"checkpoint-{at}")
    words = [*STEPWISE, *FLAGS[method], *flags, "--max_steps", str(steps), "--save_steps", str(steps)]
    assert sft(out, *words, method=method) == 0
    ours, theirs = (tensors(folder / f"checkpoint-{steps}") for folder in (out, done))
    assert all(identical(ours[name], theirs[name]) for name in theirs)
    assert Manifest.load(out).schedule == Manifest.load(done).schedule
    ours, theirs = (optimizer_state(folder / f"checkpoint-{steps}") for folder in (out, done))
    assert ours.keys() == theirs.keys()
    for index, entry in theirs.items():
        assert all(torch.equal(ours[index][key], value) for key, value in entry.items())


def test_what_never_trained_counts_as_frozen_at_the_end(tmp_path, tiny, sft):
    out = tmp_path / "out"
    assert sft(out, *SMALL, "--switch_every", "2", "--block_order", "descending", method="badam") == 0
    manifest, base = Manifest.load(out), tensors(tiny)
    assert len(manifest.trained_units) == len(manifest.frozen_units) == 18
    assert {name.split(".")[2] for name in manifest.frozen_units} == {"0", "1"}
    ends = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert ends <= manifest.frozen_checksums.keys()
    assert set(manifest.trained_parameters) | manifest.frozen_checksums.keys() == base.keys()
    assert all(identical(tensors(out)[name], base[name]) for name in manifest.frozen_checksums)
    assert main(["verify", str(out)]) == 0
    half_way = Manifest.load(out / "checkpoint-2")
    assert half_way.schedule["fractions"] == {"first": 0.25, "last": 0.25, "mean": 0.25}
    assert not half_way.frozen_checksums.keys() - {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "category"], "schedule lisa decides itself which units train, so it goes with policy all"),
        (["--active_layers", "5"], "active_layers is 5, but the model has 4 layers"),
        (
            ["--intervals", "3"],
            "intervals is a key of schedule autofreeze, dynamic, smartfrz; remove it, or give that",
        ),
        (["--percentile", "3"], "percentile is a key of schedule autofreeze; remove it"),
        (["--switch_every", "0"], "switch_every: expected a number greater than 0, got '0'"),
        (["--schedule", "none"], "is a key of schedule badam, lisa; remove it"),
        (["--optimizer_state", "lose"], "optimizer_state: expected 'reset', 'keep' or 'offload', got 'lose'"),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], "set use_reentrant: false"),
        (["--restore_callback_states_from_checkpoint", "true"], "remove restore_callback_states_from_checkpoint"),
    ],
)
def test_what_a_schedule_cannot_do_is_refused_in_a_sentence(tmp_path, sft, capsys, words, message):
    assert sft(tmp_path / "out", *words, method="lisa") == 2
    assert message in error_of(capsys)


def test_resuming_with_another_schedule_is_refused(tmp_path, straight, sft, capsys):
    out = tmp_path / "out"
    shutil.copytree(straight("dynamic") / "checkpoint-11", out / "checkpoint-11")
    shutil.copy(straight("dynamic") / "config.yaml", out)
    words = [*STEPWISE, "--max_steps", "20"]
    for method, flags, message in (
        ("dynamic", ["--intervals", "5"], "intervals 10 there, 5 here"),
        ("dynamic", ["--schedule_seed", "1"], "schedule_seed 0 there, 1 here"),
        ("lisa", [], "schedule dynamic there, lisa here"),
        ("fft", [], "schedule dynamic there, unset here"),
        ("dynamic", ["--max_steps", "30"], "was planned for 20 steps; this run has 30"),
    ):
        assert sft(out, *words, *flags, method=method) == 2
        assert message in error_of(capsys)


def test_the_plan_tells_what_will_train(tmp_path, sft, capsys, llama2_7b):
    assert sft(tmp_path / "out", *SMALL, "--dry_run", "true", "--switch_every", "1", method="lisa") == 0
    out = capsys.readouterr().out
    assert "lisa schedule, seed 0: 4 phases, in which 18 of 36 units train" in out
    assert "trainable fraction of the layers 50.0% at first, 50.0% at last, 50.0% on average" in out
    assert "100.0% at first, 10.0% at last, 55.0% on average" in Dynamic().describe(llama2_7b, 5098)
    # LISA keeps a master of everything, but gradient and moments of two layers, embeddings, head and norm only.
    ends = llama2_7b.num_trained - llama2_7b.num_trained_in_layers
    peak = ends + llama2_7b.anatomy.numel_in_layers // 16
    assert Lisa().peak_numel(llama2_7b) == peak
    assert Lisa(optimizer_state="keep").peak_numel(llama2_7b) == llama2_7b.num_trained
    memory, whole = (memory_of(method_of({"policy": "all", **s}), llama2_7b) for s in ({"schedule": "lisa"}, {}))
    assert (memory.master_weights, memory.gradients, memory.moments) == (4 * llama2_7b.num_trained, 4 * peak, 8 * peak)
    assert whole.total == 16 * llama2_7b.num_trained


def test_two_processes_agree_with_one(tmp_path, tiny, data):
    """Layers that freeze and thaw after DDP has wrapped the model, and under gradient checkpointing."""
    settings = ["--bf16", "false", "--per_device_train_batch_size", "4", "--global_batch_size", "8", "--max_steps", "8"]
    settings += ["--switch_every", "2", "--gradient_checkpointing", "true", "--save_steps", "8"]
    inputs = {"method": "lisa", "model": tiny, "data": data}
    assert main(command("sft", tmp_path / "one", *settings, **inputs)) == 0
    torchrun(2, main, *command("sft", tmp_path / "two", *settings, **inputs))
    assert Manifest.load(tmp_path / "one").schedule == Manifest.load(tmp_path / "two").schedule
    ours, theirs = (tensors(tmp_path / name / "checkpoint-8") for name in ("one", "two"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)
