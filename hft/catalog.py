"""The recipes and methods that come with hft: found by name, listed, copied."""

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from hft.errors import HFTError, did_you_mean, neighbor, read_text

HERE = Path(__file__).parent
RECIPES = HERE / "recipes" if (HERE / "recipes").is_dir() else HERE.parent / "recipes"  # of a wheel, or a checkout
METHODS = RECIPES / "methods"
MODELINE = re.compile("# yaml-language-server:.*\n")  # tells editors the schema, beside the recipes


def names() -> list[str]:
    """What `--config` takes without a file of that name: `llama2-7b/sft`, ..., and methods by their bare names."""
    paths = [path for path in RECIPES.glob("*/*.yaml") if path.parent.name != "launch"]
    return sorted(path.stem if path.parent == METHODS else f"{path.parent.name}/{path.stem}" for path in paths)


def find_recipe(name: str | Path) -> Path:
    """A YAML file: one on disk, or else a recipe or method that comes with hft, such as `llama2-7b/sft` or `hft`."""
    path = Path(name)
    if path.is_file():
        return path
    bare = str(name).removeprefix("recipes/").removeprefix("methods/").removesuffix(".yaml")
    for folder in (RECIPES, METHODS):
        if (found := folder / f"{bare}.yaml").is_file():
            return found
    if path.is_dir():
        raise HFTError(f"cannot read {name}: it is a folder; give a file in it")
    hint = neighbor(path) or did_you_mean(bare, names(), "; `hft recipes` lists those that come with hft")
    raise HFTError(f"cannot read {name}: no such file or recipe{hint}")


def main(arguments: Sequence[str]) -> int:
    """`hft recipes` lists, `hft recipes copy NAME FILE.yaml` copies one."""
    parser = argparse.ArgumentParser(prog="hft recipes", description="List the recipes and methods, or copy one.")
    copy = parser.add_subparsers(dest="action", metavar="[copy NAME FILE.yaml]").add_parser("copy")
    copy.add_argument("name", metavar="NAME", help="such as llama2-7b/sft or hft")
    copy.add_argument("file", metavar="FILE.yaml", type=Path, help="where to; it must not exist")
    options = parser.parse_args(arguments)
    if options.action is None:
        print(listing())
        return 0
    text = MODELINE.sub("", read_text(find_recipe(options.name)))
    try:
        with options.file.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise HFTError(f"cannot write {options.file}: {error.strerror}; choose another name") from error
    print(f"{options.file} is a copy of {options.name}: hft COMMAND --config {options.file}")
    return 0


def listing() -> str:
    kinds: dict[str, list[str]] = {"recipes": [], "methods": [], "arms of hft cpi": [], "merges": []}
    for name in names():
        folder = name.partition("/")[0]
        kind = {name: "methods", "cpi": "arms of hft cpi", "merges": "merges"}.get(folder, "recipes")
        kinds[kind].append(f"  {name:28} {title(find_recipe(name))}")
    lines = [line for kind, listed in kinds.items() for line in (kind, *listed, "")]
    lines += ["hft COMMAND --config RECIPE [METHOD] [--key value ...]    such as: hft sft --config tiny/sft hft"]
    return "\n".join([*lines, "hft recipes copy RECIPE FILE.yaml                         a copy to edit"])


def title(path: Path) -> str:
    """The first sentence of the comment that a file starts with."""
    comment = re.match(r"(?:# .*\n)*", MODELINE.sub("", path.read_text(encoding="utf-8")))[0]
    sentence = re.split(r"(?<=[.:])(?<!al\.) ", " ".join(comment.replace("# ", "").split()))[0].rstrip(".:")
    return textwrap.shorten(sentence, 88, placeholder=" ...")
