"""The notebook, with the tiny model."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# A line `!hft WORDS`, whose {names} a notebook replaces.
HFT = r'import subprocess, sys; subprocess.run([sys.executable, "-m", "hft", *f"\1".split()], check=True)'


@pytest.mark.slow
def test_the_cells_run_in_order(tmp_path):
    notebook = json.loads((ROOT / "docs" / "half-fine-tuning.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    script = re.sub(r"^!hft (.*)$", HFT, "\n".join(cells), flags=re.MULTILINE)
    env = os.environ | {"SMALL": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", script]
    run = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    for line in ("round 1: attention", "verify passed", "reference:", "tuned:", "round 2: attention"):
        assert line in run.stdout
    assert (tmp_path / "hft-notebook" / "runs" / "half" / "model.safetensors").exists()
