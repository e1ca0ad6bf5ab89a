"""The model card of a run, written once it is verified and again once it is scored."""

from pathlib import Path
from typing import Any

from hft.record.card import write_card
from hft.record.manifest import Manifest
from hft.runs.config import is_neutral, read_saved_config
from hft.runs.result import CONFIG_NAME, RunResult


def write_run_card(result: RunResult, out: Path, into: Path | None = None, model_id: str | None = None) -> None:
    """Write the model card of a finished run, with the scores that are there by now; `into` a copy of its folder."""
    config = read_saved_config(out / CONFIG_NAME)
    tags, model_id = ("trl", result.objective, "hft"), model_id or config.get("hub_model_id")
    write_card(into or out, Manifest.load(out), card_settings(config), tags, verified=result.verify, model_id=model_id)


def card_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What of a run's config is in its model card: what makes it this run, wherever it ran."""
    return {key: value for key, value in config.items() if not is_neutral(key, config)}
