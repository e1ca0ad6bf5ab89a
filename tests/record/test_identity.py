"""What a number depends on."""

import json
import shutil

import pytest

from hft.record.identity import digests_of


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.safetensors", "weights"),
        ("config.json", "config"),
        ("generation_config.json", "generation_config"),
        ("tokenizer.json", "tokenizer"),
        ("chat_template.jinja", "chat_template"),
    ],
)
def test_a_number_depends_on_every_part_of_a_model(tiny, tmp_path, name, part):
    model = shutil.copytree(tiny, tmp_path / "model")
    before = digests_of(model)
    assert before == digests_of(tiny)  # wherever it lies
    content = (model / name).read_bytes()
    (model / name).write_bytes(
        json.dumps(json.loads(content) | {"x": 1}).encode() if "config" in name else content + b" "
    )
    assert [key for key, value in digests_of(model).items() if value != before[key]] == [part]


@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.bpe.model", "tekken.json", "added_tokens.json"])
def test_a_number_depends_on_a_tokenizer_of_any_name(tiny, tmp_path, name):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / name).write_text("{}")
    found = digests_of(model)
    assert [key for key, value in digests_of(tiny).items() if value != found[key]] == ["tokenizer"]


def test_a_number_does_not_depend_on_who_wrote_a_config(tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_version": "0", "_name_or_path": "x"}))
    assert digests_of(model) == digests_of(tiny)
