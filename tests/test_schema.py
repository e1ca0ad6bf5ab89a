"""The JSON schema that editors check recipes by."""

import json
from pathlib import Path

import jsonschema
import pytest

from hft.config import read_yaml
from hft.schema import schema

RECIPES = sorted(path for path in Path("recipes").glob("*/*.yaml") if path.parent.name != "launch")
KINDS = {"methods": "sft", "cpi": "cpi", "merges": "merge"}  # of a folder's files; others are named as their kind


@pytest.fixture(scope="module")
def made() -> dict:
    return json.loads(json.dumps(schema()))


def wrong(made: dict, kind: str, values: dict) -> list[str]:
    one = made if kind == "any" else {"$ref": f"#/$defs/{kind}", "$defs": made["$defs"]}
    return [error.message for error in jsonschema.Draft202012Validator(one).iter_errors(values)]


def test_every_recipe_is_valid_and_names_the_schema(made):
    for path in RECIPES:
        assert not wrong(made, KINDS.get(path.parent.name, path.stem), read_yaml(path)), path
        assert path.read_text().startswith("# yaml-language-server: $schema=../schema.json\n"), path


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("sft", {"lerning_rate": 1e-5}, "('lerning_rate' was unexpected)"),
        ("sft", {"beta": 0.1}, "('beta' was unexpected)"),
        ("sft", {"learning_rate": "fast"}, "'fast' is not of type 'number'"),
        ("cpi", {"tasks": {"a": {"dataset": "a"}}}, "('dataset' was unexpected)"),
        ("cpi", {"probe": {"steps": 3}}, "('steps' was unexpected)"),
        ("merge", {"method": "mean"}, "'mean' is not valid under any of"),
        ("any", {"lerning_rate": 1e-5}, "is not valid under any of the given schemas"),
    ],
)
def test_a_mistake_is_refused(made, kind, values, message):
    assert message in " ".join(wrong(made, kind, values))


def test_the_schema_beside_the_recipes_is_current(made):
    saved = json.loads(Path("recipes/schema.json").read_text())
    if saved["$comment"] != made["$comment"]:
        pytest.skip(f"made with {saved['$comment']}; here are {made['$comment']}")
    assert saved == made, "make schema"


def test_keys_say_what_they_do(made):
    assert made["$defs"]["global_batch_size"]["description"].startswith("Rows per step over all devices")
    assert made["$defs"]["learning_rate"]["description"]


def test_the_older_name_of_a_key_is_valid_too(made):
    assert not wrong(made, "sft", {"gradient_checkpointing": False})
