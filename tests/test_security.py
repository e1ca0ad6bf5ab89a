"""No code that came with a model, weights or a recipe runs, and no key is written down."""

import json
import shutil

import pytest
import torch

from hft.cli import main
from tests.conftest import error_of, tensors

KEYS = {"HF_TOKEN": "hf_" + "secretHub" * 4, "WANDB_API_KEY": "secret0wandb" * 4}
CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (CODE.format(marker=str(self.marker)),)


@pytest.fixture
def marker(tmp_path):
    """A file that only code which should not run makes."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def test_no_key_is_written_down(tmp_path, sft, capfd, monkeypatch):
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert sft(tmp_path / "out", "--report_to", "wandb", "--max_steps", "1") == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "results.json", "hft_manifest.json", "README.md"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    printed = capfd.readouterr()
    for key in KEYS.values():
        assert not [path for path in files if key.encode() in path.read_bytes()]
        assert key not in printed.out + printed.err


@pytest.mark.parametrize("command", ["sft", "dpo", "cpi", "continual"])
@pytest.mark.parametrize(("key", "value"), [("hub_token", "secret"), ("model_init_kwargs", {"token": "secret"})])
def test_a_key_in_a_recipe_is_refused(tmp_path, capsys, command, key, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({key: value}))
    recipe = {"continual": "trace"}.get(command, command)
    words = [command, "--config", f"recipes/tiny/{recipe}.yaml", str(path), "--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert "token would be saved with the config; remove it, and set HF_TOKEN" in printed.err
    assert "secret" not in printed.out + printed.err
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_not_executed(tmp_path, tiny, sft, capsys, marker):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save(tensors(tiny) | {"more": Malicious(marker)}, model / "pytorch_model.bin")
    assert sft(tmp_path / "out", model=model) == 2
    assert "is incomplete" in error_of(capsys)
    assert main(["merge", "--method", "average", "--models", str(model), str(tiny), "--out", str(tmp_path / "m")]) == 2
    assert "is incomplete" in error_of(capsys)


def test_a_models_own_code_does_not_run(tmp_path, tiny, sft, capsys, marker):
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(CODE.format(marker=str(marker)))
    for more in ([], ["--trust_remote_code", "true"]):
        assert sft(tmp_path / "out", *more, model=model) == 2
        assert "comes with its own code, which hft never runs" in error_of(capsys)


def test_yaml_makes_no_objects(tmp_path, capsys, marker):
    for text in (f"!!python/object/apply:os.mknod ['{marker}']", f"!!python/object/new:os.mknod ['{marker}']"):
        (tmp_path / "recipe.yaml").write_text(f"run_name: {text}\n")
        assert main(["sft", "--config", str(tmp_path / "recipe.yaml")]) == 2
        assert "is not valid YAML: could not determine a constructor for the tag" in error_of(capsys)
        assert main(["cpi", "--config", "recipes/tiny/cpi.yaml", "--probe", f"{{a: {text}}}"]) == 2
        assert "could not determine a constructor for the tag" in error_of(capsys)
