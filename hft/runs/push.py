"""`hft push`: a finished run goes to the Hub, without the paths of the machine that it ran on."""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import HfApi

from hft.config import read_yaml, to_yaml
from hft.errors import HFTError, reason
from hft.machine import say
from hft.record.card import CARD_NAME, portable
from hft.record.manifest import MANIFEST_NAME, Manifest, write_json, write_text
from hft.record.scores import SCORES_FOLDER
from hft.runs.config import read_saved_config
from hft.runs.result import CONFIG_NAME, RESULTS_NAME, WANDB_NAME, RunResult

STAYS = (CARD_NAME, WANDB_NAME, "training_args.bin", "moments.safetensors")


def main(arguments: Sequence[str]) -> int:
    """Verify a finished run and upload it; 1 if verify finds a difference."""
    parser = argparse.ArgumentParser(prog="hft push", description="Upload a finished run to the Hub.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("repo", metavar="REPO", nargs="?", help="default: the run's hub_model_id, or its folder's name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    options = parser.parse_args(arguments)
    result = RunResult.load(options.run).verified(options.run)
    repo = options.repo or read_saved_config(options.run / CONFIG_NAME).get("hub_model_id")
    return 0 if push(result, options.run, repo, private=options.private or None) else 1


def push(result: RunResult, out: Path, repo: str | None, *, private: bool | None, revision: str | None = None) -> bool:
    if not result.ok:
        say("not pushed to the Hub: verify failed")
        return False
    api, base, repo = HfApi(), Manifest.load(out).base, repo or out.resolve().name
    try:
        repo = api.create_repo(repo_id=repo, private=private, exist_ok=True).repo_id
        if not Path(base).is_dir() and api.file_exists(base, CARD_NAME):
            api.hf_hub_download(base, CARD_NAME)  # it says the license
        with portable_copy(result, out, repo) as folder:
            more = {"revision": revision, "commit_message": f"{out.resolve().name}, trained with hft"}
            api.upload_folder(repo_id=repo, folder_path=folder, **more)
    except (OSError, HTTPError, ValueError) as error:
        raise HFTError(f"cannot push {out} to {repo}: {reason(error)}") from error
    say(f"pushed to https://huggingface.co/{repo}")
    return True


@contextmanager
def portable_copy(result: RunResult, out: Path, model_id: str | None = None) -> Iterator[Path]:
    """A folder with what of a run may leave this machine: its files, linked, or copied without local paths."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, out.resolve().name)
        scores = list((out / SCORES_FOLDER).rglob("*.json"))  # without the rows behind them, which may be private
        for path in filter(Path.is_file, [*out.iterdir(), *scores, *out.glob("additional_chat_templates/*")]):
            if path.name in STAYS or path.name.startswith("."):
                continue
            target = folder / path.relative_to(out)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.name == CONFIG_NAME:
                write_text(target, to_yaml(portable(read_yaml(path))))
            elif path.name in (MANIFEST_NAME, RESULTS_NAME) or path.name.endswith("config.json") or path in scores:
                write_json(target, portable(json.loads(path.read_text(encoding="utf-8"))))
            else:
                target.symlink_to(path.resolve())
        result.write_card(out, folder, model_id)
        yield folder
