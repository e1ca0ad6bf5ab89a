"""A wheel is enough: recipes, fetch, demo data and a run, in an empty folder."""

import os
import subprocess
import sys
import zipfile

from tests.conftest import ROOT


def test_an_installed_wheel_works_in_an_empty_folder(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source, work = tmp_path / "source", tmp_path / "work"
    work.mkdir()
    # From a copy, since setuptools builds in the tree.
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "hft", "recipes"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in [*files.stdout.split(), "pyproject.toml", "setup.py", "README.md", "LICENSE"]:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = tmp_path.glob("half_fine_tuning-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")

    ours = [name for name in files.stdout.split() if name.startswith("hft/")]
    assert [name for name in ours if not (tmp_path / "site" / name).exists()] == []

    def python(*words: str) -> str:
        env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        run = subprocess.run([sys.executable, *words], cwd=work, env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        return run.stdout

    listed = python("-m", "hft", "recipes")
    assert all(f"\n  {name} " in listed for name in ("tiny/sft", "hft", "cpi/dpi", "merges/ties-sd"))
    assert "sky" not in listed
    short = "--max_steps 2 --eval_strategy no --eval_on_start false --report_to none"
    commands = f"""\
recipes copy tiny/sft my.yaml
fetch tiny
demo
sft --config tiny/sft hft {short} --output_dir out
sft --config out/config.yaml fft --output_dir fft --dry_run true
sft --config my.yaml lora {short} --output_dir lora --dry_run true
plan sft --config llama2-7b/sft lisa --max_steps 9 --gpus 8 --gpu_memory 80GiB
paper 5"""
    # In one process, since imports take longer than all else.
    loop = "import sys; from hft.cli import main; assert not any(main(line.split()) for line in sys.argv[1:])"
    printed = python("-c", loop, *commands.splitlines())
    first, copied = (ROOT / "recipes/tiny/sft.yaml").read_text().split("\n", 1)
    assert (work / "my.yaml").read_text() == copied
    assert (tmp_path / "site/hft/recipes/x" / first.partition("=")[2]).resolve().is_file()
    assert (work / "out" / "README.md").exists()
    for line in ("tiny is in models/tiny", "data/sft/train.jsonl", "verify passed", "out/config.yaml fft --output_dir"):
        assert line in printed
    assert printed.count("stopped here: no weights were loaded") == 3
    assert "make sft-lora MODEL=llama2-7b" in printed
