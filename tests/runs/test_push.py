"""`hft push`: what leaves the machine, and what its card says."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl

from hft.cli import main
from tests.conftest import error_of, finished_run, identical, tensors


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder instead of the Hub: what is uploaded lies in it by repository."""

    def create(self, repo_id, **more):
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def upload(self, *, repo_id, folder_path, **more):
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id)

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return tmp_path / "hub"


def run_snippet(card: Path, where: Path) -> None:
    """Run the snippet of a card in a folder; it loads what the card is of, and generates."""
    code = re.search("```python\n(.*?)```", card.read_text(), re.DOTALL)[1]
    with contextlib.chdir(where):
        exec(code, {})


def test_a_finished_run_is_pushed_without_a_path_of_this_machine(finished, tiny, data, tmp_path, hub, capsys):
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: ours\n---\n# A base\n")
    out = finished_run("sft", tmp_path / "mine", model=base, data=data)
    assert main(["eval", str(out), "--tasks", "drift", "--limit", "1"]) == 0
    for name in ("config.json", "tokenizer_config.json"):  # as versions of transformers write them
        content = json.loads((out / name).read_text())
        (out / name).write_text(json.dumps(content | {"_name_or_path": str(base), "name_or_path": str(base)}))
    assert main(["push", str(out)]) == 0
    assert "pushed to https://huggingface.co/me/mine" in capsys.readouterr().out
    pushed = hub / "me" / "mine"
    names = {path.relative_to(pushed).as_posix() for path in pushed.rglob("*") if path.is_file()}
    assert {"model.safetensors", "hft_manifest.json", "config.yaml", "README.md"} <= names
    assert any(re.fullmatch(r"scores/quick/drift-\w+\.json", name) for name in names)
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "results.json", "selection.png"} <= names
    assert not [name for name in names if "checkpoint" in name or name in ("training_args.bin", "wandb_run.json")]
    here = [str(tmp_path), str(data), str(tiny.parent), str(Path.home())]
    for path in (pushed / name for name in names if not name.endswith((".png", ".safetensors"))):
        assert not [root for root in here if root in path.read_text()], path
    assert yaml.safe_load((pushed / "config.yaml").read_text())["dataset_name"] == data.name
    ours, theirs = tensors(pushed), tensors(out)
    assert all(identical(ours[name], theirs[name]) for name in theirs)
    assert main(["verify", str(pushed), "--base", str(base)]) == 0
    card = ModelCard.load(pushed / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "ours")
    assert "| data | `" + data.name + "`: `test.jsonl`, `train.jsonl` |" in card.text
    assert "quick | drift" in card.text
    assert 'name = "me/mine"' in card.text
    run_snippet(pushed / "README.md", hub)  # where me/mine is a folder
    run_snippet(out / "README.md", out)


def test_an_adapters_snippet_runs_too(tiny, data, tmp_path, sft, hub):
    out = tmp_path / "lora"
    assert sft(out, "--max_steps", "1", method="lora") == 0
    run_snippet(out / "README.md", out)
    assert main(["push", str(out), "team/other", "--private"]) == 0
    adapter = json.loads((hub / "team/other/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "tiny"


def test_what_is_unfinished_or_fails_verify_is_not_pushed(finished, tmp_path, hub, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "model.safetensors").write_bytes((out / "checkpoint-2" / "model.safetensors").read_bytes())
    manifest = json.loads((out / "hft_manifest.json").read_text())
    manifest["frozen_checksums"] = dict.fromkeys(manifest["frozen_checksums"], "0")
    (out / "hft_manifest.json").write_text(json.dumps(manifest))
    assert main(["push", str(out)]) == 1
    assert "not pushed to the Hub: verify failed" in capsys.readouterr().out
    (out / "results.json").unlink()
    assert main(["push", str(out)]) == 2
    assert "its run has not finished" in error_of(capsys)
    assert not hub.exists()


def test_a_hub_that_cannot_be_reached_is_a_sentence(finished, capsys):
    assert main(["push", str(finished)]) == 2
    assert f"hft: cannot push {finished} to {finished.name}: " in error_of(capsys)
