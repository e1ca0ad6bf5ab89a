"""What hft takes from other libraries in spite of its underscore is on CONTRIBUTING.md's list, and nothing else."""

import ast
import re
from pathlib import Path

import tqdm
import trl
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback

TRAINERS = [getattr(trl, name) for name in dir(trl) if name.endswith("Trainer")]
LIBRARIES = [Trainer, TrainerCallback, PreTrainedModel, PreTrainedConfig, Accelerator, tqdm.tqdm, *TRAINERS]
PRIVATE = re.compile(r"_[a-z]\w*")
SUBCLASSES = ("hft/training", "hft/methods")  # what subclasses other libraries' classes


def private_names() -> tuple[set[str], set[str]]:
    """The underscored names that hft/ defines where it subclasses, and those that it uses or spells out."""
    defined, used = set(), set()
    for path in Path("hft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found, name = defined, node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found, name = defined, node.id
            elif isinstance(node, ast.Attribute):
                is_own = getattr(node.value, "id", "") in ("self", "cls") and isinstance(node.ctx, ast.Store)
                found, name = (defined if is_own else used), node.attr
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
                found, name = used, ast.unparse(node.args[1]).strip("'")
            else:
                continue
            if PRIVATE.fullmatch(name) and (found is used or path.as_posix().startswith(SUBCLASSES)):
                found.add(name)
    return defined, used


def test_private_names_of_other_libraries_are_listed_with_a_reason():
    defined, used = private_names()
    theirs = {name for cls in LIBRARIES for name in dir(cls) if PRIVATE.fullmatch(name)}
    section = Path("CONTRIBUTING.md").read_text().partition("## Private names")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    listed = {name.strip("`"): test for name, _, test in rows}
    assert (used | defined) & theirs == set(listed)
    for name, test in listed.items():
        path, _, function = test.strip("`").partition("::")
        assert f"def {function}(" in Path(path).read_text(), f"{name}: no test {test}"
