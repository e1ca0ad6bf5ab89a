"""CPI-FT: cores, groups, fusion, and groups that leave the cores of earlier ones as they are."""

import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from hft.cli import main
from hft.config import Given
from hft.cpi.config import CPIPlan, parse_stages, plan_stages
from hft.cpi.fuse import write_fused
from hft.cpi.group import chance, connected, group_tasks, groups_of, jaccard, overlaps, selection_of
from hft.cpi.probe import Core, check_probe, write_core, write_random_core
from hft.cpi.scores import measures
from hft.demo.tasks import write_tasks
from hft.errors import HFTError
from hft.merging.checkpoint import Checkpoint
from hft.record.manifest import Manifest
from hft.record.scores import Score
from hft.selection.masks import MASKS_NAME, Masks
from tests import faults
from tests.conftest import command, error_of, identical, tensors, write_jsonl
from tests.processes import torchrun
from tests.training.fsdp2_on_cpu import command_sharded

NAMES = ("sum", "reverse", "sort")


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny) -> dict[str, Path]:
    """The tiny model in fp32, and three that moved from it; the third one by few distinct amounts, so that many tie."""
    folder = tmp_path_factory.mktemp("models")
    config = AutoConfig.from_pretrained(tiny, dtype="float32")
    found = {}
    for seed, name in enumerate(("base", "a", "b", "c")):
        generator, found[name] = torch.Generator().manual_seed(seed), folder / name
        shutil.copytree(tiny, found[name])
        config.save_pretrained(found[name])
        content = {key: tensor.float() for key, tensor in tensors(tiny).items()}
        for key in content if seed else ():
            change = 1e-2 * torch.randn(content[key].shape, generator=generator)
            content[key] = content[key] + (change if name != "c" else (change * 100).round() / 128)
        save_file(content, found[name] / "model.safetensors", metadata={"format": "pt"})
    return found


@pytest.fixture(scope="module")
def cores(tmp_path_factory, models) -> dict[str, Path]:
    """The cores of 1% of the models that moved."""
    folder = tmp_path_factory.mktemp("cores")
    return {name: core_of(models, name, folder / name, 1.0) for name in ("a", "b", "c")}


def core_of(models: dict[str, Path], name: str, out: Path, percent: float) -> Path:
    write_core(out, name, *(Checkpoint.open(str(models[key])) for key in (name, "base")), percent)
    return out


def flat(tensors: dict[str, torch.Tensor], order: list[str]) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in order])


@pytest.mark.parametrize(("name", "percent"), [("a", 0), ("a", 0.01), ("c", 1), ("c", 29), ("a", 100)])
def test_a_core_is_the_exact_share_that_moved_furthest(tmp_path, models, name, percent):
    core = Core.load(core_of(models, name, tmp_path / "core", percent))
    order = Checkpoint.open(str(models["base"])).parameters
    change = (flat(tensors(models[name]), order) - flat(tensors(models["base"]), order)).abs()
    count = round(percent * 10**6) * len(change) // 10**8
    assert (core.elements, core.total) == (count, len(change)) == (count, 1_328_256)
    # A stable sort keeps equal changes in model order, so the first of them are taken.
    expected = torch.zeros(len(change), dtype=torch.bool)
    expected[change.sort(descending=True, stable=True).indices[:count]] = True
    masks = Masks(tmp_path / "core")
    assert torch.equal(flat({key: mask.tensor() for key, mask in masks.items()}, order), expected)
    assert core.smallest == (change[expected].min() if count else 0)
    assert core.unmoved == (change[expected] == 0).sum()


def test_a_core_does_not_depend_on_blocks_and_is_small(tmp_path, models, cores, monkeypatch):
    monkeypatch.setattr("hft.merging.operators.BLOCK_NUMEL", 999)
    again = core_of(models, "c", tmp_path / "again", 1.0)
    one, other = (load_file(core / MASKS_NAME) for core in (again, cores["c"]))  # the order of metadata varies
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sum(path.stat().st_size for path in again.iterdir()) < 1_328_256 / 8 + 20_000


def test_random_cores_are_as_large_and_overlap_by_chance(tmp_path, models, cores):
    base, masks = Checkpoint.open(str(models["base"])), []
    for seed, task in ((0, "a"), (0, "b"), (0, "a"), (1, "a")):
        out = tmp_path / f"{len(masks)}"
        write_random_core(out, replace(Core.load(cores["a"]), task=task, percent=20.0), base, seed)
        masks.append(Masks(out))
    counts, _ = overlaps(masks)
    assert counts.diagonal().tolist() == [1_328_256 // 5] * 4
    found = jaccard(counts)
    assert found[0, 2] == 1
    for other in (found[0, 1], found[0, 3]):
        assert other == pytest.approx(chance(20), abs=3e-3)


def test_similarity_is_symmetric_and_counts_elements(cores, models):
    masks = [Masks(cores[name]) for name in ("a", "b", "c")]
    counts, by_parameter = overlaps(masks)
    found = jaccard(counts)
    assert torch.equal(found, found.T)
    assert found.diagonal().tolist() == [1, 1, 1]
    order = Checkpoint.open(str(models["base"])).parameters
    a, b, _ = (flat({name: mask.tensor() for name, mask in core.items()}, order) for core in masks)
    assert found[0, 1] == (a & b).sum().item() / (a | b).sum().item()
    assert sum(by_parameter.values()).tolist() == [13_282] * 3


SIMILARITY = torch.tensor([[1.0, 0.3, 0.0, 0.0], [0.3, 1.0, 0.1, 0.0], [0.0, 0.1, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (0.0, [["a", "b", "c", "d"]]),
        (0.1, [["a", "b", "c"], ["d"]]),  # a and c are joined by b; at least tau, not above it
        (0.2, [["a", "b"], ["c"], ["d"]]),
        (1.1, [["a"], ["b"], ["c"], ["d"]]),
    ],
)
def test_groups_are_connected_components(tau, expected):
    assert sorted(connected("abcd", SIMILARITY, tau)) == expected
    assert connected("a", SIMILARITY[:1, :1], tau) == [["a"]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def words(tiny: Path, tasks: Path, out: Path, *flags: str, names=NAMES, stage: str = "") -> list[str]:
    """The words of `hft cpi` with the tiny recipe and a few rows and steps."""
    own = {name: {"dataset_name": str(tasks / name), "dataset_train_split": "train[:48]"} for name in names}
    settings = {"model_name_or_path": tiny, "tasks": json.dumps(own), "output_dir": out, "report_to": "none"}
    settings |= {"probe": "{max_steps: 3}", "train": "{max_steps: 3}", "sample_rows": 16, "tau": 0.9, "eval_rows": 4}
    settings |= {"weight_decay": 0.1, "per_device_train_batch_size": 8, "global_batch_size": 8}
    given = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return ["cpi", *([stage] if stage else []), "--config", "recipes/tiny/cpi.yaml", *given, *flags]


def plan_of(words: list[str]) -> CPIPlan:
    return parse_stages(words[1:])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny, tasks) -> CPIPlan:
    """All stages on two tasks, each a group, but the scores."""
    out = tmp_path_factory.mktemp("cpi") / "out"
    for stage in ("probe", "group", "fuse", "train"):
        assert main(words(tiny, tasks, out, names=NAMES[:2], stage=stage)) == 0
    return plan_of(words(tiny, tasks, out, names=NAMES[:2]))


def test_the_core_of_the_first_group_stays_while_the_second_trains(finished, tiny):
    groups = json.loads((finished.out / "groups.json").read_text())["groups"]
    assert sorted(groups) == [["reverse"], ["sum"]]
    first, second = (name for [name] in groups)
    for stages in ("backbone", "groups"):
        before, after = (tensors(finished.out / stages / name) for name in (f"1-{first}", f"2-{second}"))
        manifest = Manifest.load(finished.out / stages / f"2-{second}")
        masks = Masks(finished.core_of(first))
        assert sum(mask.count() for mask in masks.values()) == 13_282
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= manifest.masks.keys()
        for name, mask in masks.items():
            core = mask.tensor()
            assert identical(after[name][core], before[name][core]), name
            # Rows of tokens that do not occur move too, by weight decay.
            assert (after[name][~core] != before[name][~core]).float().mean() > 0.9
        assert main(["verify", str(finished.out / stages / f"2-{second}")]) == 0
    assert (finished.out / "cores.png").stat().st_size > 1000


def test_what_is_there_is_used_again(finished, tiny, tasks, capsys):
    paths = [finished.core_of("sum") / "core.json", finished.out / "fused" / "model.safetensors"]
    paths += [finished.probe_of("sum") / "model.safetensors"]
    before = [path.stat().st_mtime_ns for path in paths]
    for stage in ("probe", "fuse"):
        assert main(words(tiny, tasks, finished.out, names=NAMES[:2], stage=stage)) == 0
    assert [path.stat().st_mtime_ns for path in paths] == before
    # Another p finds other cores of the same probes.
    flags = ("--percent", "2", "--probe_dir", str(finished.probes))
    assert main(words(tiny, tasks, finished.out.with_name("p2"), *flags, names=NAMES[:2], stage="probe")) == 0
    assert "26,565 of 1,328,256 elements" in capsys.readouterr().out
    assert paths[2].stat().st_mtime_ns == before[2]


def test_a_run_on_other_rows_than_are_there_is_refused(finished, tiny, tasks, capsys):
    [rows] = (finished.out / "data").glob("1-*/train.jsonl")
    stat, before = rows.stat(), rows.read_text()
    rows.write_text("".join(before.splitlines(keepends=True)[::-1]))
    os.utime(rows, ns=(stat.st_mtime_ns, stat.st_mtime_ns))  # as old as the run's rows, and as long
    assert main(words(tiny, tasks, finished.out, names=NAMES[:2], stage="train")) == 2
    rows.write_text(before)
    assert "it was trained with other settings (sha256" in error_of(capsys)


def test_the_saved_config_repeats_a_stage(finished, capsys):
    assert main(["cpi", "group", "--config", str(finished.out / "config.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "of two random cores of 1%: 0.50" in printed
    assert "groups, by similarity >= 0.9" in printed


def test_groups_do_not_depend_on_the_order_in_which_tasks_are_listed(tiny, tasks, tmp_path):
    orders = []
    for names in (NAMES, NAMES[::-1]):
        plan = plan_of(words(tiny, tasks, tmp_path, "--freeze", "nothing", "--fusion", "false", names=names))
        plan = replace(plan, config=replace(plan.config, grouping="random"))
        orders.append(group_tasks(plan))
        by_hand = replace(plan, config=replace(plan.config, order=["sort", "sum", "reverse"]))
        assert group_tasks(by_hand) == [["sort"], ["sum"], ["reverse"]]
        together = replace(plan, config=replace(plan.config, grouping="together"))
        assert groups_of(together, sorted(names), None) == [["reverse", "sort", "sum"]]
        given = {name: replace(task, group="a" if name == "sort" else "b") for name, task in plan.tasks.items()}
        given = replace(plan, config=replace(plan.config, grouping="given"), tasks=given)
        assert sorted(groups_of(given, sorted(names), None)) == [["reverse", "sum"], ["sort"]]
    assert orders[0] == orders[1]
    other = replace(plan, config=replace(plan.config, draw_seed=3))
    assert group_tasks(other) != orders[0]


def fused(models, cores, out) -> dict[str, torch.Tensor]:
    names = [str(models[name]) for name in cores], [str(core) for core in cores.values()]
    write_fused(out, str(models["base"]), *names)
    return tensors(out)


def test_elements_in_one_core_are_exactly_its_probes(tmp_path, models, cores):
    chosen = {name: cores[name] for name in ("a", "b", "c")}
    found = fused(models, chosen, tmp_path / "fused")
    masks = {name: Masks(core) for name, core in chosen.items()}
    for key, tensor in found.items():
        claims = sum(masks[name][key].tensor().int() for name in masks)
        for name in masks:
            alone = masks[name][key].tensor() & (claims == 1)
            assert identical(tensor[alone], tensors(models[name])[key][alone])
    record = json.loads((tmp_path / "fused" / "fuse.json").read_text())
    assert sum(record["branches"].values()) == 39
    assert sum(record["elements_in_cores"].values()) == 1_328_256


def test_the_interpolation_counts_all_models_alike_in_any_order(tmp_path, models):
    """Where angles are small; a random model's are not, so it is made of larger weights."""
    large = {name: tmp_path / name for name in models}
    for name, folder in large.items():
        shutil.copytree(models[name], folder)
        ones = {key: 1 + tensor / 4 for key, tensor in tensors(models[name]).items()}
        save_file(ones, folder / "model.safetensors", metadata={"format": "pt"})
    empty = {name: core_of(large, name, tmp_path / f"core-{name}", 0) for name in ("a", "b", "c")}
    reverse = dict(reversed(empty.items()))
    one, two = (fused(large, cores, tmp_path / f"fused-{i}") for i, cores in enumerate((empty, reverse)))
    for key, tensor in one.items():
        values = [tensors(folder)[key] for folder in large.values()]
        torch.testing.assert_close(tensor, sum(values) / 4)
        torch.testing.assert_close(two[key], tensor)
    assert json.loads((tmp_path / "fused-0" / "fuse.json").read_text())["branches"] == {"line": 39}


def test_a_large_angle_takes_the_arc(tmp_path, models):
    """p = 0 and one task is plain SLERP; the formula is written out here."""
    found = fused(models, {"a": core_of(models, "a", tmp_path / "core", 0)}, tmp_path / "out")
    base, tuned = tensors(models["base"]), tensors(models["a"])
    taken = {"arc": 0, "line": 0}
    for key, tensor in found.items():
        x, y = base[key].double(), tuned[key].double()
        angle = torch.arccos((x * y).sum() / x.norm() / y.norm())
        taken["arc" if torch.cos(angle) < 0.9995 else "line"] += 1
        on_arc = torch.sin(angle / 2) * (x + y) / torch.sin(angle)
        expected = on_arc if torch.cos(angle) < 0.9995 else (x + y) / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
    assert json.loads((tmp_path / "out" / "fuse.json").read_text())["branches"] == taken
    assert min(taken.values()) > 0


def test_a_core_of_everything_of_one_task_is_its_probe(tmp_path, models):
    found = fused(models, {"a": core_of(models, "a", tmp_path / "core", 100)}, tmp_path / "out")
    assert all(identical(tensor, tensors(models["a"])[key]) for key, tensor in found.items())


def test_elements_in_several_cores_are_the_mean_of_their_probes(tmp_path, models):
    cores = {name: core_of(models, name, tmp_path / name, 60) for name in ("b", "a")}
    found = fused(models, cores, tmp_path / "out")
    a, b = (tensors(models[name]) for name in ("a", "b"))
    for key, tensor in found.items():
        of_a, of_b = (Masks(cores[name])[key].tensor() for name in ("a", "b"))
        both = of_a & of_b
        assert both.any()
        assert identical(tensor[of_a & ~of_b], a[key][of_a & ~of_b])
        assert identical(tensor[of_b & ~of_a], b[key][of_b & ~of_a])
        torch.testing.assert_close(tensor[both], ((a[key] + b[key]) / 2)[both], rtol=0, atol=1e-7)


def test_lota_trains_nothing_but_the_core(tmp_path, tiny, data, cores, capsys):
    out = tmp_path / "out"
    flags = ["--cores", str(cores["a"]), str(cores["b"]), "--weight_decay", "0.1", "--learning_rate", "0.1"]
    assert main(command("sft", out, *flags, method="lota", model=tiny, data=data)) == 0
    before, after = tensors(tiny), tensors(out)
    masks = {name: mask.tensor() for name, mask in Masks(cores["a"]).items()}
    masks = {name: mask | Masks(cores["b"])[name].tensor() for name, mask in masks.items()}
    for name, core in masks.items():
        assert identical(after[name][~core], before[name][~core])
    moved = sum((after[name] != before[name]).sum().item() for name in masks)
    assert 0.95 < moved / sum(core.sum().item() for core in masks.values()) <= 1
    assert Manifest.load(out).trainable_fraction["model"] == pytest.approx(
        sum(core.sum().item() for core in masks.values()) / 1_328_256
    )
    capsys.readouterr()
    assert main(command("sft", tmp_path / "none", method="lota", model=tiny, data=data)) == 2
    assert "needs --cores FOLDER" in error_of(capsys)


def test_what_a_group_leaves_as_it_is(finished):
    groups = [["sum"], ["reverse"]]

    def of(how: str, index: int) -> dict:
        return selection_of(replace(finished, config=replace(finished.config, freeze=how)), groups, index)

    sum_, reverse = (str(finished.core_of(task)) for task in ("sum", "reverse"))
    assert of("cores", 0) == of("nothing", 1) == {"policy": "all"}
    assert of("cores", 1) == {"policy": "core", "cores": [sum_]}
    assert of("half", 1) == {"policy": "category", "fraction": 0.5}
    assert of("all-but-own-cores", 1) == {"policy": "core", "cores": [reverse], "train_core": True}
    with pytest.raises(HFTError, match=r"sum-1%-random not found: run `hft cpi probe` first"):
        of("random-cores", 1)


def test_forgetting_and_normalized_scores():
    def scores(**values: float) -> dict[str, Score]:
        return {
            "a": Score("a", "acc", values["a"], None, 10),
            "b": Score("b", "loss", values["b"], None, 10, "nats/token", higher_is_better=False),
        }

    found = {"base": scores(a=10, b=4), "a alone": scores(a=50, b=4), "b alone": scores(a=10, b=2)}
    found |= {"1-a": scores(a=40, b=4), "2-b": scores(a=30, b=2.5)}
    result = measures([["a"], ["b"]], found)
    assert result["forgetting"] == {"a": pytest.approx(25), "b": 0}
    assert result["normalized"] == pytest.approx((30 / 50 + 2 / 2.5) / 2)


def test_all_stages_in_one_command_end_with_scores(tmp_path, tiny, tasks, capsys):
    flags = ["--grouping", "together", "--fusion", "false", "--freeze", "nothing"]
    assert main(words(tiny, tasks, tmp_path / "out", *flags, names=NAMES[:2])) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "out" / "probes" / "runs").exists()  # nothing looks at cores here
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert list(scores) == ["base", "1-reverse+sum"]
    assert scores["1-reverse+sum"]["sum"]["value"] < scores["base"]["sum"]["value"]
    assert (scores["base"]["sum"]["n"], scores["base"]["sum"]["unit"]) == (4, "nats/token")
    assert "forgetting, %" in printed
    assert "the final model is" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--percent", "101"], "percent: expected a number less than or equal to 100, got '101'"),
        (["--tasks", "{a: {dataset_name: x}}"], "needs at least two of them, got 1"),
        (
            ["--tasks", "{a: {dataset_nam: x}, b: {}}"],
            "task a: unknown key 'dataset_nam', did you mean 'dataset_name'?",
        ),
        (["--tasks", "{a: {prompt: x}, b: {}}"], "task a: dataset_name is needed"),
        (["--tasks", "{a: {dataset_name: x, benchmark: gsm}, b: {}}"], "no suite of hft eval has a benchmark 'gsm'"),
        (["--train", "{max_step: 3}"], "train: unknown key 'max_step', did you mean 'max_steps'?"),
        (["--eval", "{limit: all}"], "eval: limit: expected an integer, got 'all'"),
        (["--dataset_name", "x"], "dataset_name is not for hft cpi"),
        (["--order", "sum"], "order must name each task once (sum, reverse, sort), got sum"),
        (["--grouping", "given"], "grouping given needs the group of each task; task sum has none"),
        (["--freeze", "core"], "freeze: expected 'cores', 'random-cores'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, tiny, tasks, capsys, flags, message):
    assert main(words(tiny, tasks, tmp_path / "out", *flags)) == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("group", "run `hft cpi probe` first"),
        ("fuse", "groups.json not found: run `hft cpi group` first"),
        ("train", "groups.json not found: run `hft cpi group` first"),
        ("score", "groups.json not found: run `hft cpi group` first"),
    ],
)
def test_a_missing_stage_is_named(tmp_path, tiny, tasks, capsys, stage, message):
    assert main(words(tiny, tasks, tmp_path / "out", stage=stage)) == 2
    assert message in error_of(capsys)


def test_a_task_without_rows_is_named(tmp_path, tiny, tasks, capsys):
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    flags = ["--tasks", json.dumps({"sum": {"dataset_name": str(tasks / "sum")}, "x": {"dataset_name": str(empty)}})]
    assert main(words(tiny, tasks, tmp_path / "out", *flags, stage="probe")) == 2
    assert f"task x: dataset {empty} is empty" in error_of(capsys)


def test_rows_are_rendered_by_templates(tmp_path, tiny, capsys):
    rows = [{"question": f"q{i}", "answer": i} for i in range(20)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    task = {"dataset_name": str(source), "prompt": "Q: {{ question }}", "completion": "{{ answer + 1 }}"}
    tasks = {"a": task, "b": task | {"completion": "{{ missing }}"}}
    assert main(words(tiny, tmp_path, tmp_path / "out", "--tasks", json.dumps(tasks), stage="probe")) == 2
    assert (
        "task b: row 0 (the first is 0): prompt and completion do not fit the columns question, answer: 'missing'"
        in error_of(capsys)
    )
    written = (tmp_path / "out/probes/data/a/train.jsonl").read_text().splitlines()
    held_out = (tmp_path / "out/probes/data/a/test.jsonl").read_text().splitlines()
    assert (len(written), len(held_out)) == (16, 4)
    messages = [json.loads(line)["messages"] for line in written + held_out]
    expected = {(f"Q: q{i}", str(i + 1)) for i in range(20)}
    assert {(user["content"], assistant["content"]) for user, assistant in messages} == expected


def test_probes_that_say_nothing_of_the_task_are_refused(models, tiny, finished, capsys):
    base = Checkpoint.open(str(models["base"]))
    with pytest.raises(HFTError, match=r"stores .* in torch.bfloat16, and rounding would decide"):
        check_probe(Checkpoint.open(str(tiny)), base)
    probe = Checkpoint.open(str(finished.probe_of("sum")))
    check_probe(probe, Checkpoint.open(str(finished.probes / "base")))
    with pytest.raises(HFTError, match=r"was trained from .*/probes/base, not from .*/models.*/base; train it again"):
        check_probe(probe, base)
    other = ["--model_name_or_path", str(models["base"]), "--probe_dir", str(finished.probes)]
    assert main(["cpi", "train", "--config", str(finished.out / "config.yaml"), *other]) == 2
    assert "holds probes of another base; give another --probe_dir" in error_of(capsys)
    [half] = (finished.out / "groups").glob("2-*")
    with pytest.raises(HFTError, match="was trained with parts of it frozen"):
        check_probe(Checkpoint.open(str(half)), Checkpoint.open(Manifest.load(half).base))


def test_cores_of_another_model_are_refused(tmp_path, models, cores, tiny, data, sft, capsys):
    shutil.copytree(cores["a"], tmp_path / "core")
    bits = load_file(tmp_path / "core" / MASKS_NAME)
    shapes = dict(Masks(cores["a"]).shapes) | {"lm_head.weight": (8, 128)}
    bits["lm_head.weight"] = bits["lm_head.weight"][:128]
    metadata = {name: json.dumps(shape) for name, shape in shapes.items()}
    save_file(bits, tmp_path / "core" / MASKS_NAME, metadata=metadata)
    with pytest.raises(HFTError, match="the cores are of different models"):
        overlaps([Masks(cores["a"]), Masks(tmp_path / "core")])
    with pytest.raises(HFTError, match="is not a core of a model like"):
        fused(models, {"a": tmp_path / "core"}, tmp_path / "fused")
    assert sft(tmp_path / "out", "--policy", "core", "--cores", str(tmp_path / "core"), method="fft") == 2
    assert "was made for another model: it has no lm_head.weight of that size" in error_of(capsys)
    assert sft(tmp_path / "out", "--policy", "core", "--cores", str(tmp_path), method="fft") == 2
    assert f"{MASKS_NAME} is missing" in error_of(capsys)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, tiny, tasks, capsys):
    assert main(words(tiny, tasks, tmp_path / "out", "--dry_run", "true")) == 0
    printed = capsys.readouterr().out
    assert "core: 1% of 1,328,256 elements" in printed
    assert "two random cores have a similarity of 0.50%" in printed
    assert not (tmp_path / "out").exists()


def test_the_plan_names_the_stage_that_does_not_fit(tmp_path, tiny, tasks, capsys, monkeypatch):
    """Each stage with its own optimizer; where a part of a matrix trains, the base's values are kept whole."""

    def sums(*flags: str) -> list[float]:
        assert main(words(tiny, tasks, tmp_path / "out", "--dry_run", "true", "--bf16", "false", *flags)) == 0
        printed = capsys.readouterr().out
        return [float(size) for size in re.findall(r"sum +([\d.]+) GiB", printed)]

    elements = 1_328_256
    kept = 4 * sum(tensor.numel() for name, tensor in tensors(tiny).items() if "proj" in name)
    assert sums("--percent", "0") == pytest.approx([16 * elements / 2**30, (16 * elements + kept) / 2**30], abs=1e-3)
    by_sgd = sums("--percent", "0", "--train", "{optim: sgd}")[1]
    assert by_sgd == pytest.approx((8 * elements + kept) / 2**30, abs=1e-3)
    monkeypatch.setattr("hft.planning.fit.device_bytes", lambda **_: 12 * elements)
    flags = ["--probe", "{optim: sgd}", "--use_cpu", "true"]
    assert main(words(tiny, tasks, tmp_path / "out", *flags)) == 2
    assert "a run of stage train: 0.0B parameters need" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_folders_are_named_by_what_the_runs_depend_on():
    values = {"model_name_or_path": "x/y", "tasks": {"a": {"dataset_name": "x"}, "b": {"dataset_name": "y"}}}
    recipe = ["recipes/tiny/cpi.yaml"]

    def folders(method: str | None = None, **flags) -> tuple[str, str]:
        plan = plan_stages(Given(recipe, [values | ({"method": method} if method else {})], flags))
        return str(plan.out), str(plan.probes)

    assert folders() == ("runs/tiny-cpi", "runs/tiny-cpi-probes")
    assert folders("dpi", percent=5.0) == ("runs/tiny-cpi-dpi-percent=5.0", "runs/tiny-cpi-probes")
    assert folders(learning_rate=0.1)[1] == "runs/tiny-cpi-probes-learning_rate=0.1"
    assert folders(output_dir="out") == ("out", "out/probes")


@pytest.mark.slow
def test_all_stages_under_fsdp2(tmp_path, tiny, tasks):
    """Cores reach the embeddings and the head, which FSDP2 shards too; verify fails the command if one moves."""
    flags = ["--bf16", "true", "--per_device_train_batch_size", "4"]
    printed = torchrun(2, command_sharded, *words(tiny, tasks, tmp_path / "out", *flags, names=NAMES[:2]))
    assert printed.count("of them part of a tensor") == 2  # once in the backbone, once after the fusion
    assert "now in one process: hft cpi score --config" in printed


@pytest.mark.slow
def test_stages_that_are_killed_end_with_the_same_bits(tmp_path, tiny, tasks):
    """At ten random moments of the stages: of their rows, models, cores, runs and scores."""
    out, straight = tmp_path / "out", tmp_path / "straight"
    assert faults.run(words(tiny, tasks, straight, names=NAMES[:2]), straight, trace=True) == [0]
    every = faults.moments(straight)
    moments = [every[index] for index in sorted(random.Random(0).sample(range(len(every)), 10))]
    faults.killed_at(moments, words(tiny, tasks, out, names=NAMES[:2]), out)
    ours, theirs = (sorted(path.relative_to(one) for path in one.rglob("*.safetensors")) for one in (out, straight))
    assert ours == theirs
    for name in ours:  # the order of a file's metadata is not always the same, so tensors are compared
        one, other = load_file(out / name), load_file(straight / name)
        assert one.keys() == other.keys()
        assert all(identical(one[key], other[key]) for key in one), name
    scores = (json.loads((one / "scores.json").read_text()) for one in (out, straight))
    assert next(scores) == next(scores)
