"""A wheel is enough: fetch, demo data and a run from a YAML of one's own, in an empty folder."""

import os
import subprocess
import sys

import yaml

from tests.conftest import ROOT


def test_an_installed_wheel_works_in_an_empty_folder(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source, work = tmp_path / "source", tmp_path / "work"
    work.mkdir()
    # From a copy, since setuptools builds in the tree.
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "hft"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in [*files.stdout.split(), "pyproject.toml", "README.md", "LICENSE"]:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("hft-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)

    def hft(*words: str) -> str:
        env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        command = [sys.executable, "-m", "hft", *words]
        run = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        return run.stdout

    assert "tiny is in models/tiny" in hft("fetch", "tiny")
    assert "data/sft/train.jsonl" in hft("demo")
    mine = {"model_name_or_path": "models/tiny", "dataset_name": "data/sft", "chat_template_path": "tulu.jinja"}
    mine |= {"assistant_only_loss": True, "max_length": 64, "max_steps": 2, "eval_strategy": "no", "report_to": "none"}
    (work / "mine.yaml").write_text(yaml.safe_dump(mine | {"output_dir": "out", "per_device_train_batch_size": 2}))
    assert "verify passed" in hft("sft", "--config", "mine.yaml")
    assert (work / "out" / "README.md").exists()
    assert "make sft-lora MODEL=llama2-7b" in hft("paper", "5")
