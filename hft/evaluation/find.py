"""Tasks of lm-eval that are in no suite of ours: by name or by the path of a YAML file."""

import functools
import re
from importlib.util import find_spec
from pathlib import Path

from hft.errors import HFTError, did_you_mean
from hft.evaluation.suites import SUITES, Benchmark

LM_EVAL = "lm_eval"  # the suite that their scores are saved under
# What a file defines: a name after `task`, `group` or `tag`, or a list of tags. lm-eval itself parses all 14,000 files.
NAMES = re.compile(r"^(?:task|group|tag):[ \t]*([\"'\w.\-]+)[ \t]*$|^tag:[ \t]*((?:\n[ \t]*- .+)+)", re.MULTILINE)


def find_task(word: str) -> Benchmark:
    """The task that a word of `--tasks` names, as NAME, NAME:METRIC or the path of a YAML file."""
    path, colon, metric = word.partition(":")
    if path.endswith((".yaml", ".yml")):
        if not Path(path).is_file():
            raise HFTError(f"there is no task file {path}")
        name = Path(path).stem + colon + metric
        groups = re.findall(r"^group: *(\S+)", Path(path).read_text(encoding="utf-8"), re.MULTILINE)
        folders = (str(Path(path).parent.resolve()),) if groups else ()  # where lm-eval finds its members
        return Benchmark(name, groups[0] if groups else path, only=metric or None, folders=folders)
    files = _files()
    if path not in files:
        known = [*files, *(benchmark.name for suite in SUITES.values() for benchmark in suite)]
        hint = did_you_mean(path, known, "; `lm-eval ls tasks` lists them")
        raise HFTError(f"lm-eval has no task {path!r}{hint}")
    folders = tuple(dict.fromkeys(str(file.parent) for file in files[path]))
    return Benchmark(word, path, only=metric or None, folders=folders)


@functools.cache
def _files() -> dict[str, list[Path]]:
    """The files of lm-eval that define each task, group or tag."""
    found: dict[str, list[Path]] = {}
    for path in sorted((Path(find_spec("lm_eval").origin).parent / "tasks").rglob("*.yaml")):
        for one, several in NAMES.findall(path.read_text(encoding="utf-8")):
            for name in [one] if one else re.findall(r"- +([^\s#:]+)", several):
                found.setdefault(name.strip("\"'"), []).append(path)
    return found
