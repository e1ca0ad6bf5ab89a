"""Demo data: questions about Python's standard library, answered by its own docstrings."""

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from hft.jsonl import write_jsonl

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}
QUESTIONS = {
    ast.Module: "What is the Python module `{}` for?",
    ast.ClassDef: "What is the Python class `{}` for?",
    ast.FunctionDef: "What does the Python function `{}` do?",
    ast.AsyncFunctionDef: "What does the Python coroutine `{}` do?",
}
# One in so many is held out, chosen by name so that a new Python version moves no row between the splits.
HELD_OUT = 10
LENGTHS = range(40, 500)


def as_messages(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def docstring_chats() -> Iterator[tuple[str, dict]]:
    """Dotted name and row of each public docstring; repeated ones once, so that no held-out answer is trained on."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if _is_public(path.relative_to(root)))
    seen = set()
    for path in tqdm(files, desc="reading the standard library's docstrings", unit="file"):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_bytes())
        for name, node in _public_nodes(tree, module):
            answer = " ".join(inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(answer) not in LENGTHS or answer in seen:
                continue
            seen.add(answer)
            yield name, as_messages(QUESTIONS[type(node)].format(name), answer)


def docstring_pairs(chats: Iterable[tuple[str, dict]]) -> Iterator[tuple[str, dict]]:
    """Preferences out of `docstring_chats`: the right answer over that to the next question of the same module."""
    for _, module in groupby(chats, key=lambda chat: chat[0].split(".")[0]):
        members = list(module)
        if len(members) == 1:
            continue
        for (name, row), (_, other) in zip(members, members[1:] + members[:1], strict=True):
            question, answer = row["messages"]
            yield name, {"prompt": [question], "chosen": [answer], "rejected": [other["messages"][1]]}


def write_demo_data(folder: str | Path) -> None:
    """Write `sft/{train,test}.jsonl` and `dpo/{train,test}.jsonl` below a folder."""
    splits: dict[str, list[tuple[str, dict]]] = {"train": [], "test": []}
    for name, row in docstring_chats():
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0
        splits["test" if held_out else "train"].append((name, row))
    for split, chats in splits.items():
        # Paired within its split, so that no held-out answer is trained on as another question's wrong one.
        for name, rows in (("sft", chats), ("dpo", docstring_pairs(chats))):
            write_jsonl(Path(folder, name, f"{split}.jsonl"), (row for _, row in rows), ensure_ascii=True)


def _is_public(path: Path) -> bool:
    parts = {*path.with_suffix("").parts} - {"__init__"}
    return not (SKIPPED_FOLDERS & parts or any(part.startswith("_") for part in parts))


def _public_nodes(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """A module or class with its members, theirs included; a function's body has none."""
    yield name, node
    for child in [] if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else node.body:
        if isinstance(child, tuple(QUESTIONS)) and not child.name.startswith("_"):
            yield from _public_nodes(child, f"{name}.{child.name}")
