"""docs/new-method.md: a user's own schedule and update, by its own words."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from hft.cli import main
from hft.record.manifest import Manifest
from tests.conftest import command, error_of, tensors

DOC = Path("docs/new-method.md")


@pytest.mark.parametrize("name", ["gradual_unfreezing", "small_steps"])
def test_the_document_shows_the_example(name):
    example = Path(f"docs/examples/{name}.py").read_text()
    shown = [code for code in re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL) if code in example]
    assert len(shown) == 1
    assert f"docs/examples/{name}.py:" in DOC.read_text()


def flags(name: str) -> list[str]:
    """The flags of the last make command that names an example."""
    return shlex.split([args for args in re.findall(r'ARGS="(.*?)"', DOC.read_text()) if name in args][-1])


def test_an_own_schedule_trains_what_it_says_and_resumes(tmp_path, tiny, data):
    words = [*flags("gradual_unfreezing"), "--max_steps", "6", "--save_steps", "3"]
    run = command("sft", tmp_path / "out", *words, method="fft", model=tiny, data=data)
    assert main(run) == 0
    history = Manifest.load(tmp_path / "out").schedule["history"]
    assert [row["layers"] for row in history] == [[3], [2, 3], [1, 2, 3]]
    straight = tensors(tmp_path / "out")
    for path in (tmp_path / "out" / "results.json", tmp_path / "out" / "checkpoint-6" / "trainer_state.json"):
        path.unlink()
    assert main(run) == 0
    assert all(torch.equal(straight[name], tensor) for name, tensor in tensors(tmp_path / "out").items())
    base = tensors(tiny)
    moved = {name.split(".")[2] for name in base if ".layers." in name and not torch.equal(base[name], straight[name])}
    assert moved == {"1", "2", "3"}


def test_an_own_update_moves_weights_as_it_says(tmp_path, tiny, data, capsys):
    more = ["--trust_ratio", "1e-3", "--warmup_steps", "0", "--max_steps", "1", "--save_steps", "1"]
    words = [*flags("small_steps"), *more, "--learning_rate", "0.1"]
    assert main(command("sft", tmp_path / "out", *words, model=tiny, data=data)) == 0
    base, after = tensors(tiny), tensors(tmp_path / "out" / "checkpoint-1")
    ratios = [((after[name] - base[name].float()).norm() / base[name].float().norm()).item() for name in base]
    assert max(ratios) == pytest.approx(1e-3, rel=1e-3)
    assert "docs/examples/small_steps.py:SmallSteps" in Manifest.load(tmp_path / "out").update["update"]
    capsys.readouterr()
    for wrong, message in (
        ("docs/examples/small_steps.py:BigSteps", "has no class BigSteps that extends Update"),
        ("docs/examples/none.py:SmallSteps", "docs/examples/none.py is not a Python file"),
    ):
        assert main(command("sft", tmp_path / "no", "--update", wrong, model=tiny, data=data)) == 2
        assert message in error_of(capsys)
