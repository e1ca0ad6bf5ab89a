"""How far models have moved from their start."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hft.cli import main
from hft.merging.checkpoint import Checkpoint
from hft.merging.diff import compare, comparison_text
from hft.record.manifest import Manifest
from tests.conftest import error_of, tensors
from tests.model.test_architectures import small


def nudged(source: Path, folder: Path, by: float) -> Path:
    """A copy without its past in which every element is `by` greater; exact in fp32."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("hft_manifest.json", "*.yaml", "*.png"))
    content = {name: tensor + by for name, tensor in tensors(source).items()}
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny) -> Path:
    """The tiny model in fp32, with values on a grid, so that sums are exact."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("diff") / "start")
    content = {name: (tensor.float() * 256).round() / 256 for name, tensor in tensors(tiny).items()}
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def rounds(tmp_path_factory, start) -> tuple[Path, Path]:
    """Three rounds in which everything moves by 1/8 (fft), and in which half of it does (hft), by resetting."""
    folder = tmp_path_factory.mktemp("rounds")
    fft = hft = start
    for number in (1, 2, 3):
        fft = nudged(fft, folder / f"fft{number}", 0.125)
        tuned = nudged(hft, folder / f"tuned{number}", 0.125)
        words = ["--tuned", str(tuned), "--base", str(hft), "--out", str(folder / f"hft{number}")]
        assert main(["reset", *words]) == 0
        hft = folder / f"hft{number}"
    return fft, hft


def test_changes_grow_with_the_rounds_in_which_a_unit_trained(start, rounds, tmp_path, capsys):
    words = ["diff", str(start), *map(str, rounds), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    found = json.loads((tmp_path / "out" / "diff.json").read_text())
    assert list(found["rounds"]) == ["hft3"]
    rows = found["rounds"]["hft3"]
    assert [row["what"] for row in rows] == ["0", "1", "2", "3"]
    for row in rows:
        assert row["change"] == pytest.approx({"fft3": 0.375, "hft3": 0.125 * int(row["what"])}, abs=1e-9)
    manifest = Manifest.load(rounds[1])
    frozen = [set(one["frozen_units"]) for one in manifest.earlier] + [set(manifest.frozen_units)]
    never = set.intersection(*frozen)
    content = tensors(start)
    assert rows[0]["elements"] == sum(t.numel() for name, t in content.items() if name.rpartition(".")[0] in never)
    assert sum(row["elements"] for row in rows) == sum(t.numel() for n, t in content.items() if ".layers." in n)
    text = capsys.readouterr().out
    assert "units by the rounds in which they were trained in hft3" in text
    assert "3.75e-01" in text
    assert (tmp_path / "out" / "diff.png").stat().st_size > 5000


def test_a_start_with_rounds_of_its_own_counts_from_there(start, rounds):
    first = Checkpoint.open(str(rounds[1].parent / "hft1"))
    found = compare(first, [Checkpoint.open(str(rounds[1]))])
    assert [row["what"] for row in found["rounds"]["hft3"]] == ["0", "1", "2"]
    assert found["rounds"]["hft3"][2]["change"]["hft3"] == pytest.approx(0.25)


def test_a_block_is_the_mean_over_its_elements(start, tmp_path):
    """One norm moves by 1, so that its block moves by half of that; one matrix of layer 2 by 1 in a quarter of it."""
    moved = shutil.copytree(start, tmp_path / "moved")
    content = tensors(start)
    content["model.layers.1.input_layernorm.weight"] -= 1
    content["model.layers.2.self_attn.q_proj.weight"][::4] += 1
    content["lm_head.weight"] += 0.5
    save_file(content, moved / "model.safetensors", metadata={"format": "pt"})
    found = compare(Checkpoint.open(str(start)), [Checkpoint.open(str(moved))])
    rows = {(row["what"], row["block"]): row["change"]["moved"] for row in found["layers"]}
    expected = {("1", "norm"): 0.5, ("2", "attention"): 1 / 16}
    assert len(rows) == 12
    assert all(value == pytest.approx(expected.get(key, 0), abs=1e-7) for key, value in rows.items())
    assert {row["what"]: row["change"]["moved"] for row in found["outside"]} == pytest.approx(
        {"embeddings": 0.25, "others": 0}
    )

    found = compare(Checkpoint.open(str(start)), [Checkpoint.open(str(moved))], group=2)
    rows = {(row["what"], row["block"]): row["change"]["moved"] for row in found["layers"]}
    assert len(rows) == 6
    assert rows["0-1", "norm"] == pytest.approx(0.25)
    assert rows["2-3", "attention"] == pytest.approx(1 / 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["S", "S"], "are the same model"),
        (["S", "gone"], "not found"),
        (["S", "M", "--group", "0"], "group is a number of layers"),
        (["S", "M", "--out", "full"], "File exists; give another path"),
        (["--group", "0", "S", "M"], "group is a number of layers"),
        (["S", "nan"], "model.norm.weight holds NaN or infinity in"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_sentence(start, tmp_path, capsys, words, message):
    places = {"S": start, "gone": tmp_path / "gone", "full": tmp_path / "full", "nan": tmp_path / "nan"}
    places["full"].write_text("a file")
    if "nan" in words:
        content = tensors(nudged(start, tmp_path / "nan", 0.125))
        content["model.norm.weight"][3] = torch.nan
        save_file(content, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    if "M" in words:
        places["M"] = nudged(start, tmp_path / "M", 0.125)
    assert main(["diff", *(str(places.get(word, word)) for word in words)]) == 2
    assert message in error_of(capsys)


def test_ranges_of_a_fused_tensor_count_with_their_own_unit(tmp_path):
    """In phi3 a tensor holds q, k and v, of which some may be back at the start and some not."""
    model = small("phi3")
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    words = ["--tuned", tmp_path / "tuned", "--base", tmp_path / "start", "--out", tmp_path / "hft"]
    assert main(["reset", *map(str, words)]) == 0
    start, hft = Checkpoint.open(str(tmp_path / "start")), Checkpoint.open(str(tmp_path / "hft"))
    found = compare(start, [hft])
    assert [row["change"]["hft"] for row in found["rounds"]["hft"]] == [0, pytest.approx(1, abs=1e-6)]
    assert sum(row["elements"] for row in found["rounds"]["hft"]) == sum(row["elements"] for row in found["layers"])

    manifest = Manifest.load(tmp_path / "hft")
    manifest.selection |= {"policy": "random-element"}
    manifest.save(tmp_path / "hft")
    found = compare(start, [hft])
    assert not found["rounds"]
    assert "no rounds of hft: the random-element policy trained its units in part" in comparison_text(found)


@pytest.mark.parametrize("words", [["S"], ["S", "M", "--ot", "x"]])
def test_diff_prints_its_usage_after_a_mistake(capsys, words):
    assert main(["diff", *words]) == 2
    assert "usage: hft diff [-h] [--out OUT] [--group GROUP] START MODEL" in capsys.readouterr().err


def test_twins_by_name_keep_their_paths(start, tmp_path):
    twins = [nudged(start, tmp_path / letter / "model", 0.125) for letter in "ab"]
    found = compare(Checkpoint.open(str(start)), [Checkpoint.open(str(folder)) for folder in twins])
    assert found["layers"][0]["change"] == {str(folder): 0.125 for folder in twins}
