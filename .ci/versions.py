"""Print constraints for the lowest or the newest versions that pyproject.toml allows of what it names."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
named = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
for requirement in named:
    if found := re.match(r"([\w.-]+)(?:\[.*?\])?>=([\d.]+)", requirement):
        name, lowest = found.groups()
        print(f"{name}{'==' if sys.argv[1] == 'lowest' else '>='}{lowest}")
