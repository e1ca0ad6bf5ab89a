"""The Makefile and the commands that the documents and recipes quote."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import hft
from hft.objectives import OBJECTIVES
from hft.reporting.paper import read_runs
from hft.runs.config import parse_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [Path(name) for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md", "recipes/README.md")]
DOCUMENTS += sorted(path.relative_to(ROOT) for path in ROOT.glob("docs/*.md"))
RECIPES = sorted(Path("recipes").glob("*/*.yaml"))
# Targets that the paper's tables name before the Makefile has them; once it does, their commands are tested too.
TO_COME = tuple(
    start for start in ("trace-", "cpi") if not re.search(f"^{start}", (ROOT / "Makefile").read_text(), re.MULTILINE)
)


def make(
    *words: str, cwd: Path = ROOT, check: bool = True, typed: str = "", **variables: str | None
) -> subprocess.CompletedProcess:
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS", "MODEL")  # of the make that runs the tests
    environment = {key: value for key, value in os.environ.items() if key not in outer}
    environment |= {"NUM_GPUS": ""} | variables  # no flags of the launcher
    environment = {key: value for key, value in environment.items() if value is not None}
    command = ["make", "-f", str(ROOT / "Makefile"), *words]
    return subprocess.run(command, cwd=cwd, env=environment, input=typed, capture_output=True, text=True, check=check)


def commands(*words: str, **variables: str | None) -> list[str]:
    """The hft commands that a make command would run, without the folder of the executable."""
    text = make("-n", *words, **variables).stdout.replace("\\\n", " ")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line.split("/bin/", 1)[1] for line in lines if re.match(r"\S+/bin/hft ", line)]


def quoted(path: Path) -> list[list[str]]:
    """The make commands that a file quotes: lines of their own, lines of a comment, and code in a sentence or table."""
    text = path.read_text()
    found = re.findall(r"^[#\s]*(make .*)$|`(make [^`]+)`", text, re.MULTILINE)
    lines = [part for one in found for part in "".join(one).split("&&")]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["make"] and words[1:]]


def can_be_shown(words: list[str]) -> bool:
    """Whether a quoted command has no placeholder, needs no recipe of the reader's own, and has a target by now."""
    return not words[0].startswith(TO_COME) and not any(
        re.search(r"[A-Z]{3,}$|-[A-Z]+$|\.\.\.|mine|outer-layers", word) for word in words
    )


QUOTED = sorted(
    {tuple(words) for path in [*DOCUMENTS, *RECIPES] for words in quoted(ROOT / path) if can_be_shown(words)}
)


def test_the_documents_quote_commands():
    assert len(QUOTED) > 60
    assert ("sweep-seeds", "MODEL=llama2-7b") in QUOTED


@pytest.mark.parametrize("words", QUOTED, ids=" ".join)
def test_a_quoted_command_names_recipes_that_exist(words):
    shown = make(*(["-n"] if "-n" not in words else []), *words).stdout
    assert shown
    for path in re.findall(r"recipes/\S+\.yaml", shown):
        assert (ROOT / path).exists(), path


def test_the_commands_of_the_papers_rows_leave_the_runs_that_their_scores_are_read_from():
    checked = 0
    for run, (_, made) in read_runs().items():
        words = shlex.split(made[-1])[1:]
        if words[0] == "eval" or not can_be_shown(words):
            continue
        *_, last = commands(*words)
        _, objective, *flags = shlex.split(last)
        if not (objective in OBJECTIVES or "--out" in flags):
            continue  # a sequence of runs, whose folder parse_config does not name
        out = flags[len(flags) - flags[::-1].index("--out")] if "--out" in flags else None
        assert (out or str(parse_config(objective, flags).out)) == f"runs/{run}"
        checked += 1
    assert checked > 60


SFT = "hft sft --config recipes/llama2-7b/sft.yaml recipes/methods/"


def test_ten_ratios_are_fft_hft_and_eight_others():
    shown = commands("sweep-ratios", "MODEL=llama2-7b", "ARGS=--max_steps 2")
    assert shown[:2] == [f"{SFT}fft.yaml --max_steps 2", f"{SFT}hft.yaml --max_steps 2"]
    ratios = [(0.25, 0), (0, 0.333), (0.25, 0.333), (0.5, 0.333), (0.5, 0.667), (0.75, 0.667), (1, 0.667), (0.75, 1)]
    assert shown[2:] == [
        f"{SFT}hft-ratio.yaml --attention_fraction {attention} --mlp_fraction {mlp} --max_steps 2"
        for attention, mlp in ratios
    ]


def test_the_same_ratios_on_trace_are_ten_sequences():
    shown = commands("sweep-trace-ratios", "MODEL=llama2-chat-7b", "ARGS=--limit 9")
    trace = "hft continual --config recipes/llama2-chat-7b/trace.yaml recipes/methods/"
    assert shown[:2] == [f"{trace}{method}.yaml --strategy seqft --limit 9" for method in ("fft", "hft")]
    sft = commands("sweep-ratios", "MODEL=llama2-7b", "ARGS=--limit 9")[2:]
    start = f"{trace}hft-ratio.yaml --strategy seqft "
    assert shown[2:] == [start + line.split("hft-ratio.yaml ")[1] for line in sft]


def test_five_seeds_are_five_runs():
    shown = commands("sweep-seeds", "MODEL=llama2-7b")
    assert shown == [f"{SFT}hft.yaml"] + [f"{SFT}hft.yaml --selection_seed {seed}" for seed in (1, 2, 3, 4)]


def test_a_half_reset_goes_back_to_where_the_stage_started():
    reset = "hft reset --config recipes/methods/hft.yaml"
    sft, dpo = "runs/llama2-13b-sft-fft", "runs/llama2-13b-dpo-fft"
    assert commands("reset-sft", "reset-dpo", "MODEL=llama2-13b", S="no/model") == [
        f"{reset} --tuned {sft} --base meta-llama/Llama-2-13b-hf --out {sft}-reset",
        f"{reset} --tuned {dpo} --base {sft} --out {dpo}-reset",
    ]
    dpo = "runs/llama2-7b-dpo-fft-from-tulu-2-7b"
    assert commands("reset-dpo", "MODEL=llama2-7b", "S=allenai/tulu-2-7b") == [
        f"{reset} --tuned {dpo} --base allenai/tulu-2-7b --out {dpo}-reset"
    ]
    assert "smollm2-135m-dpo-fft-from-smollm2-135m-sft-fft " in commands("reset-dpo", "MODEL=smollm2-135m")[-1]


def test_runs_are_removed_only_when_asked_for(tmp_path):
    made, run = tmp_path / "models" / "tiny", tmp_path / "runs" / "mine"
    made.mkdir(parents=True)
    run.mkdir(parents=True)
    make("clean", cwd=tmp_path)
    assert (made.exists(), run.exists()) == (False, True)
    assert make("clean-runs", cwd=tmp_path, typed="n\n").stdout == "runs/mine\nremove these? [y/N] kept\n"
    assert run.exists()
    make("clean-runs", cwd=tmp_path, typed="y\n")
    assert not run.exists()
    assert make("clean-runs", cwd=tmp_path).stdout == "no runs here\n"


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["MODEL=llama2-7b"], ""),
        (["MODEL=llama2-7b", "NUM_GPUS=8"], " --num_processes 8"),
        (["MODEL=llama2-7b", "ENGINE=zero3"], " --engine zero3"),
        (["MODEL=llama2-7b", "NUM_GPUS=8", "ENGINE=zero3"], " --num_processes 8 --engine zero3"),
        (["MODEL=smollm2-135m"], " --num_processes 1"),
    ],
)
def test_make_hands_the_gpus_to_hft(words, flags):
    train = commands("sft-hft", *words, NUM_GPUS=None)[-1]
    assert train.endswith(f"recipes/methods/hft.yaml{flags}")
    assert commands("cpi", *words, NUM_GPUS=None)[-1].endswith(f"cpi.yaml{flags}")


def test_runtimes_are_relative_to_fft(tmp_path, sft):
    speeds = []
    for method in ("fft", "hft"):
        out = tmp_path / "runs" / f"tiny-sft-{method}"
        assert sft(out, "--max_steps", "1", "--save_steps", "1", method=method) == 0
        speeds.append(json.loads((out / "results.json").read_text())["tokens_per_second"])
    fft, hft = make("runtimes", "MODEL=tiny", cwd=tmp_path).stdout.splitlines()
    assert fft == "100.0% of the layers train  100.0% of the time of FFT  tiny-sft-fft"
    time = f"{100 * speeds[0] / speeds[1]:5.1f}%"
    assert hft == f" 50.0% of the layers train  {time} of the time of FFT  tiny-sft-hft"


def test_the_dockerfile_installs_as_make_does_from_files_that_exist():
    lines = [line for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines() if line]
    steps = [line.split() for line in lines if not line.startswith("#")]
    assert {words[0] for words in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
    copied = [source for words in steps if words[0] == "COPY" for source in words[1:-1]]
    assert all((ROOT / source).exists() for source in copied)
    assert ["RUN", "make", "install"] in steps
    read = {"Makefile", "pyproject.toml", "constraints.txt", "setup.py", "README.md", "hft", "recipes"}
    assert read <= set(copied[: copied.index(".")])


def test_the_version_has_its_section_in_the_changelog_and_the_citation():
    assert f"\n## {hft.__version__} (" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {hft.__version__}\n" in (ROOT / "CITATION.cff").read_text()
