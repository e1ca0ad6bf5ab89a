"""The documentation: its links, its code, its commands, and the errors and keys that it names."""

import ast
import contextlib
import functools
import io
import itertools
import pkgutil
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import trl
import yaml
from datasets import Dataset
from transformers import AutoConfig

import hft
from hft.catalog import METHODS, find_recipe, names
from hft.cli import COMMANDS, main
from hft.config import Keys, RunConfig
from hft.errors import HFTError
from hft.methods import all_classes
from hft.model.anatomy import meta_model
from hft.runs.config import load_config
from tests.conftest import ROOT

DOCS = sorted(path.relative_to(ROOT) for path in ROOT.glob("docs/*.md"))
PAGES = [*map(Path, ("README.md", "AGENTS.md", "CONTRIBUTING.md", "recipes/README.md")), *DOCS]
RESULTS = sorted(path.relative_to(ROOT) for path in ROOT.glob("results/**/*.md"))


def blocks(page: Path | str, language: str) -> list[str]:
    """The fenced code of a page in a language; "" is that of shell lines."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@functools.cache
def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=str)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for path, anchor in re.findall(r"\]\(([^)\s:#]*)(?:#([^)\s]*))?\)", text):
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), path
        assert not anchor or anchor in anchors(found), f"{path}#{anchor}"


def test_the_site_has_every_page_and_every_public_name():
    config = (ROOT / "mkdocs.yml").read_text()
    for path in DOCS:
        assert f": {path.name}\n" in config
    described = set(re.findall(r"^::: hft\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    assert set(hft.__all__) == described | {"HFTSFTTrainer", "HFTDPOTrainer"}
    for name in re.findall(r"^::: (hft\.\S+\.\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE):
        assert pkgutil.resolve_name(name)
    listed = (ROOT / "recipes/README.md").read_text()
    assert all(f"[{path.stem}](methods/{path.name})" in listed for path in METHODS.glob("*.yaml"))


EXAMPLES = "".join(path.read_text() for path in (ROOT / "docs/examples").glob("*.py")).splitlines()
# Pages with more than excerpts of docs/examples/, but the one whose loops tests/test_api.py runs.
RUNNABLE = [page for page in PAGES if {*"".join(blocks(page, "python")).splitlines()} - {*EXAMPLES}]
RUNNABLE.remove(Path("docs/your-own-loop.md"))


@pytest.mark.parametrize("page", RUNNABLE, ids=str)
def test_the_code_of_a_page_runs(page, tiny, data, rows, tmp_path, monkeypatch):
    short = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none"}
    for name in {*re.findall(r"\w+Config", "".join(blocks(page, "python")))} - {"SelectionConfig"}:
        more = {"num_generations": 2, "max_completion_length": 4} if name == "GRPOConfig" else {}
        monkeypatch.setattr(trl, name, functools.partial(getattr(trl, name), **short, **more))
    turns = [row["messages"][-2:] for row in rows[:4]]
    dataset = {
        "any-trainer.md": [{"prompt": [a], "completion": [b], "label": i % 2 > 0} for i, (a, b) in enumerate(turns)],
        "README.md": [{"prompt": [a]} for a, _ in turns],
    }.get(page.name, rows[:4])
    model_config = AutoConfig.from_pretrained(tiny, num_hidden_layers=32)
    scope = {"dataset": Dataset.from_list(dataset), "reward": lambda completions, **_: [1.0] * len(completions)}
    scope |= {"model_config": model_config, "selection": hft.select(hft.anatomy_of(meta_model(model_config)))}
    monkeypatch.chdir(tmp_path)
    for link, folder in {"models/tiny": tiny, "data/sft": data}.items():
        Path(link).parent.mkdir()
        Path(link).symlink_to(folder)
    for code in blocks(page, "python"):
        exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny)), scope)


@pytest.mark.parametrize("page", ["docs/fork-a-recipe.md"])
def test_a_recipe_on_a_page_is_one(page, tmp_path):
    for number, text in enumerate(blocks(page, "yaml")):
        (tmp_path / f"{number}.yaml").write_text(text)
        assert load_config("sft", tmp_path / f"{number}.yaml", "hft").values.keys() >= yaml.safe_load(text).keys()


@functools.cache
def flags_of(*command: str) -> set[str]:
    """The flags that `hft COMMAND --help` lists."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*command, "--help"]) == 0
    return set(re.findall(r"--(\w[\w-]*)", printed.getvalue()))


# A reader's file, a placeholder, or what a run has written.
YOURS = re.compile(r"mine|^[A-Z]+$|^runs/|^(config|sequence|RECIPE)\.yaml$")


def hft_commands(page: Path) -> list[list[str]]:
    """The words after `hft` of each command in shell lines or in code within a sentence."""
    shell = "\n".join(one for one in blocks(page, "") if "$ " not in one).replace("\\\n", " ")
    inside = re.findall(r"(?:`|^\$ )((?:\.venv/bin/)?hft [^`\n]+)", (ROOT / page).read_text(), re.MULTILINE)
    lines = [line.strip().removeprefix(".venv/bin/") for line in (*shell.splitlines(), *inside)]
    words = [shlex.split(line.replace("\n", " "), comments=True) for line in lines if line.startswith("hft ")]
    return [line[1:] for line in words if not {"...", "COMMAND", "NAME"} & {*line}]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_have_flags_and_recipes_that_exist(page):
    for words in hft_commands(page):
        command, given = words[0], {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        if command == "--help":
            continue
        assert command in COMMANDS, words
        sub = words[1:2] if command == "plan" else []
        assert not given - flags_of(command, *sub) - {"config", "help", "version"}, words
        if "--config" in words:
            after = words[words.index("--config") + 1 :]
            for name in itertools.takewhile(lambda word: not word.startswith("--"), after):
                assert YOURS.search(name) or find_recipe(name)


def test_a_page_has_commands():
    assert len([words for page in PAGES for words in hft_commands(page)]) > 40


def sentences() -> list[str]:
    """The strings of hft/, an ellipsis where an f-string has a value."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "hft").rglob("*.py")]
    texts = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    return ["".join(p.value if isinstance(p, ast.Constant) else "..." for p in text.values) for text in texts]


def test_the_faq_quotes_errors_that_there_are():
    quoted = re.findall(r"^### `(.*)`$", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 10
    known = sentences()
    for error in quoted:
        parts = [part for part in error.replace(", did you mean ...?", "").split("...") if part.strip(" :;'")]
        assert any(all(part.strip(" '") in sentence for part in parts) for sentence in known), error


def test_keys_of_other_tools_stand_beside_ours():
    text = (ROOT / "docs/coming-from.md").read_text().partition("## Keys")[2].partition("## Launch")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    configs = [trl.SFTConfig, trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments]
    theirs = {f.name for cls in configs for f in fields(cls)} | {"accelerate_config"}
    ours = {f.name for cls in (*configs[:2], RunConfig, hft.SelectionConfig, *all_classes()) for f in fields(cls)}
    ours |= {"engine", "auto"} | set(names())
    keys = Keys((RunConfig, hft.SelectionConfig, trl.SFTConfig))
    # Commands, a file, what names a method, and what another row answers.
    elsewhere = {"trl", "rl", "stage", "beta", "dataset_info", "datasets", "finetuning_type"}
    elsewhere |= {"disable_gradient_checkpointing"}
    for _, *others, mine in rows:
        for cell, known in ((others[0], theirs), (mine, ours)):
            for key in re.findall(r"`-{0,2}(\w+)`", cell):
                assert key in known, f"{key}: {cell}"
        for key in set(re.findall(r"`([a-z_0-9]+)", " ".join(others))) - keys.types.keys() - elsewhere:
            with pytest.raises(HFTError, match="did you mean") as caught:
                keys.convert(key, "x")
            hint = str(caught.value).partition("did you mean")[2]
            assert any(one in hint for one in re.findall(r"[a-z_]+", mine)), f"{caught.value}; ours are {mine}"
