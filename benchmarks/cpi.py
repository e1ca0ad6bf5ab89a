"""CPI-FT and what it is compared with, on four real sets: python benchmarks/cpi.py DATA OUT [ARM ...] [--key value].

DATA is a folder with gsm8k_sft.jsonl, code_gpteacher_sft.jsonl, superni_sft.jsonl and dolly_sft.jsonl, all of messages.
ARM is `cpi-ft` or a file of recipes/cpi/; by default all. Flags are those of `hft cpi`, on top of the smollm2-135m
recipe. Writes OUT/ARM and the table OUT.md. The arms share the probes, and what is finished is not run again.
"""

import json
import sys
from pathlib import Path

import yaml

from hft.cpi.command import run_stages
from hft.cpi.config import parse_stages
from hft.cpi.group import load_groups
from hft.cpi.scores import SCORES_NAME

TASKS = {"gsm8k": "gsm8k", "code": "code_gpteacher", "superni": "superni", "dolly": "dolly"}
GROUPS = {"gsm8k": "reasoning", "code": "code", "superni": "instructions", "dolly": "instructions"}  # by hand, ours
HEAD = ["", "groups, in order", *(f"{task} (forgetting)" for task in TASKS), "of single-task SFT"]


def run(arm: str, data: str, out: Path, flags: list[str]) -> str:
    """Run an arm.

    Returns:
        Its row of the table: of each task the loss in nats/token with its standard error over rows, and the forgetting.
    """
    tasks = {name: {"dataset_name": f"{data}/{stem}_sft.jsonl", "group": GROUPS[name]} for name, stem in TASKS.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    files = ["recipes/smollm2-135m/cpi.yaml", f"{out}/tasks.yaml"]
    files += [] if arm == "cpi-ft" else [f"recipes/cpi/{arm}.yaml"]
    folders = ["--output_dir", f"{out}/{arm}", "--probe_dir", f"{out}/probes", "--report_to", "none"]
    plan = parse_stages(["--config", *files, *folders, *flags])
    run_stages(plan, plan.stages)
    found = json.loads((plan.out / SCORES_NAME).read_text())
    *_, final = found["scores"].values()
    cells = [arm, " / ".join("+".join(names) for names in load_groups(plan))]
    for task in TASKS:
        score = final[task]
        cells.append(f"{score['value']:.3f} ± {score['stderr']:.3f} ({found['forgetting'][task]:+.1f}%)")
    cells.append(f"{found['normalized']:.3f}" if "normalized" in found else "")
    return f"| {' | '.join(cells)} |"


first_flag = next((index for index, word in enumerate(sys.argv) if word.startswith("--")), len(sys.argv))
data, out, *arms = sys.argv[1:first_flag]
table = [f"| {' | '.join(HEAD)} |", "| --- |" + " --- |" * (len(HEAD) - 1)]
for arm in arms or ["cpi-ft", *sorted(path.stem for path in Path("recipes/cpi").glob("*.yaml"))]:
    table.append(run(arm, data, Path(out), sys.argv[first_flag:]))
    Path(f"{out}.md").write_text("\n".join(table) + "\n")
