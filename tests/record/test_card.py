"""The model card in a run's folder, and what of it reaches the Hub."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl
from trl import SFTConfig

import hft
from hft.cli import main
from hft.data import load_split
from hft.jsonl import write_jsonl
from hft.record.card import write_card
from hft.record.scores import Score, Scores
from hft.runs.config import is_neutral
from tests.conftest import error_of

SAME = "passed: 18 of 18 frozen tensors bit-identical to the base"


def rows_of(card: ModelCard) -> dict[str, str]:
    """The facts of a card by name."""
    _, *lines = [line.strip("| ") for line in card.text.partition("## ")[0].splitlines() if line.startswith("| ")]
    return dict(line.split(" | ") for line in lines if line.strip("- |"))


def settings_of(card: ModelCard) -> dict:
    return yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])


def save_scores(folder) -> None:
    scores = [
        Score("gsm8k", "exact_match", 12.345, 3.21, 200),
        Score("drift", "loss", 2.5, None, 40, "nats/token", False),
    ]
    Scores("general", str(folder), "sha", "bfloat16", scores=scores).save(folder)


def test_a_run_leaves_a_card(finished, tiny, data):
    card = ModelCard.load(finished / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["trl", "sft", "hft"],
    }
    assert "# finished\n\n`tiny`, fine-tuned with hft" in card.text
    result, counts = hft.RunResult.load(finished), hft.Manifest.load(finished).counts
    assert counts == {"attention": [8, 16], "mlp": [6, 12], "norm": [4, 8]}
    assert rows_of(card) == {
        "method": "hft",
        "policy": "category: a fraction of each block of each layer trains (the paper's HFT, Algorithm 1)",
        "selection": "seed 0, round 1",
        "units that train": "attention 8 of 16, mlp 6 of 12, norm 4 of 8, embeddings and head all",
        "trainable fraction": f"50.0% of the layers, {result.trainable_fraction['model']:.1%} of the whole model",
        "data": f"`{data.name}`: `test.jsonl`, `train.jsonl`",
        "verify": f"{SAME}, {result.verify['changed']} of 21 trained tensors changed",
    }
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    here = {"model_name_or_path": "tiny", "dataset_name": data.name}
    assert settings_of(card) == {key: value for key, value in saved.items() if not is_neutral(key, saved)} | here
    assert "## Scores" not in card.text
    assert card.text.count("@article{hui2024hft") == card.text.count("@software{vonwerra2020trl") == 1
    assert str(tiny.parent) not in card.content
    assert str(finished.parent) not in card.content


def test_scores_are_in_the_card_once_there_are_any(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    save_scores(out)
    answer = {
        "prompt": [{"role": "user", "content": "1|2?"}],
        "reference": None,
        "answer": "a\n`b`",
        "base_answer": "c",
    }
    write_jsonl(out / "scores/answers.jsonl", [answer])
    again = ["sft", "--config", str(out / "config.yaml"), "--output_dir", str(out)]
    assert main(again) == 0
    text = (out / "README.md").read_text()
    assert "| general | gsm8k | exact_match | 12.35 % | 3.21 | 200 |\n" in text
    assert "| general | drift | loss | 2.50 nats/token |  | 40 |\n\n## Answers" in text
    assert "| prompt | tiny | out |\n| --- | --- | --- |\n| 1\\|2? | c | a<br>\\`b\\` |\n\n## How to use it" in text
    assert f"| verify | {SAME}" in text
    (out / "scores/general/gsm8k.json").write_text("[]")
    assert main(again) == 2
    assert "gsm8k.json holds no valid scores" in error_of(capsys)


def test_models_and_data_of_the_hub_are_linked_and_in_the_metadata(finished, tmp_path):
    llama = replace(
        hft.Manifest.load(finished), base="meta-llama/Llama-2-7b-hf", data={"id": "allenai/tulu", "revision": "abc"}
    )
    config = {"method": "fft", "hub_token": "secret", "policy": "/home/me/mine.py:choose", "list": ["~/x/y"]}
    text = write_card(tmp_path, llama, config, ["hft", "hft"], model_id="me/mine").read_text()
    card = ModelCard(text)
    assert (card.data.base_model, card.data.datasets) == ("meta-llama/Llama-2-7b-hf", ["allenai/tulu"])
    assert card.data.tags == ["hft"]
    assert "[meta-llama/Llama-2-7b-hf](https://huggingface.co/meta-llama/Llama-2-7b-hf), fine-tuned" in text
    assert rows_of(card)["data"] == "[allenai/tulu](https://huggingface.co/datasets/allenai/tulu) at abc"
    assert rows_of(card)["verify"] == "has not run yet"
    assert settings_of(card) == {"method": "fft", "policy": "mine.py:choose", "list": ["y"]}
    assert 'name = "me/mine"' in text
    # A second round from a folder: the Hub is told where the sequence began.
    second = replace(llama, base="/runs/first", earlier=[{"base": "meta-llama/Llama-2-7b-hf"}])
    card = ModelCard(write_card(tmp_path, second, {}, ["hft"], verified={"identical": 1, "broken": 2}).read_text())
    assert card.data.base_model == "meta-llama/Llama-2-7b-hf"
    assert "`first`, fine-tuned" in card.text
    assert rows_of(card)["selection"] == "seed 0, round 1, after 1 earlier"
    assert rows_of(card)["verify"] == "FAILED: 1 of 3 frozen tensors bit-identical to the base"


@pytest.fixture
def uploads(monkeypatch) -> list[tuple[str, str]]:
    """Repository and card of each upload to the Hub."""
    found = []

    def upload(self, *, repo_id, folder_path, **more):
        found.append((repo_id, (Path(folder_path) / "README.md").read_text()))

    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **more: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return found


PUSH = [
    "--push_to_hub",
    "true",
    "--hub_model_id",
    "me/mine",
    "--hub_strategy",
    "end",
    "--resume_from_checkpoint",
    "none",
]


def test_what_is_pushed_has_the_card_of_this_run_with_what_verify_found(finished, tmp_path, sft, uploads):
    out = shutil.copytree(finished, tmp_path / "out")
    save_scores(out)  # of the run before, which is trained again
    assert sft(out, *PUSH, "--resume_from_checkpoint", "none") == 0
    [(repository, text)] = uploads
    assert repository == "me/mine"
    assert text == (out / "README.md").read_text()
    assert 'name = "me/mine"' in text
    assert f"| verify | {SAME}" in text
    assert "## Scores" not in text


def test_a_token_in_a_config_is_refused(tmp_path, sft, capsys):
    assert sft(tmp_path / "out", "--hub_token", "secret") == 2
    assert "hub_token would be saved with the config; remove it, and set HF_TOKEN" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_trainer_of_ones_own_pushes_the_card_too(tiny, data, tmp_path, uploads):
    settings = {
        "learning_rate": 3e-5,
        "lr_scheduler_type": "cosine",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    args = SFTConfig(str(tmp_path), hub_model_id="me/mine", hub_token="secret", **settings)
    trainer = hft.HFTSFTTrainer(str(tiny), args, train_dataset=load_split(str(data), "train"))
    trainer.push_to_hub(tags="extra")
    [(_, text)] = uploads
    card = ModelCard(text)
    assert card.data.tags == ["trl", "sft", "hft", "extra"]
    assert settings_of(card)["learning_rate"] == 3e-5
    assert settings_of(card)["lr_scheduler_type"] == "cosine"
    assert rows_of(card)["verify"] == "has not run yet"
    assert "secret" not in text
    assert str(tmp_path) not in text
