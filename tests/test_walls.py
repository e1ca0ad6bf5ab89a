"""The design's walls: which package may import which."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from hft.methods import all_classes
from hft.objectives import OBJECTIVES
from hft.selection.selection import POLICIES

# From the ground up: a module imports from its own floor and from those below it.
FLOORS = [
    {"errors", "jsonl", "machine", "text", "userfile"},
    {"catalog", "model", "demo"},
    {"config"},
    {"selection"},
    {"freezing", "methods", "parts"},
    {"record"},
    {"data", "loop", "objectives", "training"},
    {"runs"},
    {"merging", "planning"},
    {"evaluation"},
    {"reporting"},
    {"keep"},
    {"continual", "cpi"},
    {"launch", "schema"},
    {"cli", "completion"},
]


def test_modules_import_only_from_below_and_never_in_a_circle():
    paths = {".".join(p.with_suffix("").parts).removesuffix(".__init__"): p for p in Path("hft").rglob("*.py")}
    floor = {part: level for level, parts in enumerate(FLOORS) for part in parts}
    graph = {}
    for module, path in paths.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = [f"{n.module}.{alias.name}" for n in nodes if n.module.startswith("hft") for alias in n.names]
        graph[module] = {name if name in paths else name.rpartition(".")[0] for name in names} - {"hft"}
        for other in graph[module] if module not in ("hft", "hft.__main__") else ():
            if (module, other) != ("hft.runs.plan", "hft.planning.fit"):  # the one question that a run asks
                assert floor[other.split(".")[1]] <= floor[module.split(".")[1]], f"{module} may not import {other}"
    TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


def test_who_scores_and_reports_imports_no_trainer():
    for path in [*Path("hft/evaluation").rglob("*.py"), *Path("hft/reporting").rglob("*.py")]:
        nodes = ast.walk(ast.parse(path.read_text()))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not any(name.startswith(("trl", "hft.training", "hft.runs.train")) for name in names if name), path


def test_an_objective_is_one_file():
    """Others ask `Objective`: none compares its name, and only what trains by `hft sft` and the demo data name one."""
    naming = {"hft/demo/data.py": {"sft", "dpo"}, "hft/planning/forecast.py": {"sft"}, "hft/runs/scoring.py": {"sft"}}
    naming["hft/schema.py"] = {"sft"}
    for path in Path("hft").rglob("*.py"):
        if path.parent.name == "objectives":
            continue
        named = {"sft"} if path.parts[1] in ("continual", "cpi") else naming.get(path.as_posix(), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in OBJECTIVES:
                assert node.value in named, f"{path}:{node.lineno} names an objective"
            if isinstance(node, ast.Compare | ast.Match):
                words = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
                assert not words & {*OBJECTIVES}, f"{path}:{node.lineno} compares an objective's name"
            arguments = [node.arg] if isinstance(node, ast.keyword | ast.arg) else []
            assert "pairs" not in arguments or path.name == "prepared.py", f"{path}:{node.lineno} asks for pairs"


def test_no_file_but_its_own_compares_a_methods_name():
    """A method is one file: what depends on it is asked of its class."""
    names = {path.stem for path in Path("recipes/methods").glob("*.yaml")} | {cls.name for cls in all_classes()}
    names -= {"hft", "kl", *POLICIES}  # the program's own name, and a score's; policies are what selection is about
    for path in Path("hft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.Match):
                words = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
                own = path.stem.replace("_", "-")
                assert not words & (names - {own}), f"{path}:{node.lineno} compares a method's name"
