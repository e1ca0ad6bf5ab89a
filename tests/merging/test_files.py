"""Model files as transformers reads them, and what a merge may write beside the weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft.cli import main
from hft.merging.checkpoint import Checkpoint, check_alike, new_folder
from hft.model.weights import Weights, weight_files
from tests.conftest import error_of, identical, tensors


@pytest.fixture
def other(tiny, tmp_path):
    """A second model of the same kind."""
    folder = shutil.copytree(tiny, tmp_path / "other")
    content = {name: tensor + 0.01 for name, tensor in tensors(tiny).items()}
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def average(a, b, out) -> int:
    return main(["merge", "--method", "average", "--models", str(a), str(b), "--out", str(out)])


def test_one_file_is_read_before_an_older_index(tiny, other):
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(other / "shards", max_shard_size="500KB")
    for path in (other / "shards").glob("model*"):
        shutil.copy(path, other)
    assert weight_files(other) == [other / "model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(other).state_dict()
    assert all(identical(tensor, loaded[name]) for name, tensor in Weights(other).items())


def test_old_torch_files_are_read(tiny, tmp_path):
    torch.save(tensors(tiny), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    stored = Weights(tmp_path)
    assert all(identical(stored[name], tensor) for name, tensor in tensors(tiny).items())


def test_whatever_is_not_weights_comes_along(tiny, other, tmp_path):
    (other / "additional_chat_templates").mkdir()
    (other / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    for name in ("NOTICE", "modeling_mine.py", "training_args.bin", "optimizer.pt", "model.safetensors.index.json"):
        (other / name).write_text("{}")
    (other / "model.safetensors.index.json").unlink()
    (other / "README.md").write_text("another model's card")
    assert average(other, tiny, tmp_path / "out") == 0
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"NOTICE", "modeling_mine.py", "additional_chat_templates/tool_use.jinja", "chat_template.jinja"} <= names
    assert not {"training_args.bin", "optimizer.pt", "README.md"} & names


def test_two_tokens_under_one_id_are_refused(tiny, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.resize_token_embeddings(2056)
    for name, token in (("a", "<|user|>"), ("b", "<call>")):
        model.save_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
        tokenizer.save_pretrained(tmp_path / name)
    assert average(tmp_path / "a", tmp_path / "b", tmp_path / "out") == 2
    assert "id 2048 is '<|user|>' in the first and '<call>' in the second" in error_of(capsys)


def test_configs_are_compared_by_what_they_mean(tiny, other, tmp_path, capsys):
    config = json.loads((other / "config.json").read_text())
    spelled = config | {"rope_parameters": {"type": "default", "rope_theta": 10000.0}}
    (other / "config.json").write_text(json.dumps(spelled))
    check_alike(Checkpoint.open(str(tiny)), Checkpoint.open(str(other)))
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert average(tiny, other, tmp_path / "out") == 2
    assert "rms_norm_eps is 1e-06 in the first and 0.001 in the second" in error_of(capsys)


def test_a_second_writer_is_told(tiny, other, tmp_path, capsys):
    with new_folder(tmp_path / "out") as folder:
        assert average(tiny, other, tmp_path / "out") == 2
        assert f"another process is writing {tmp_path / 'out'}" in error_of(capsys)
        (folder / "note").write_text("mine")
    assert (tmp_path / "out" / "note").read_text() == "mine"
    assert not list(tmp_path.glob(".out*"))
