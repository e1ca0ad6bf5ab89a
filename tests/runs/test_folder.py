"""What in a run's folder can be resumed, looked at without training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import hft
from hft.errors import HFTError
from hft.record.manifest import Manifest
from hft.runs.config import parse_config
from hft.runs.folder import check_complete
from tests.conftest import command, write_jsonl


@pytest.fixture
def zero3(tmp_path, finished) -> Path:
    """What is looked at in a checkpoint that two processes saved under ZeRO-3."""
    replace(Manifest.load(finished), processes=2).save(tmp_path)
    (tmp_path / "global_step2").mkdir()
    for rank in range(2):
        (tmp_path / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "scheduler.pt").touch()
    return tmp_path


def here(processes: int) -> SimpleNamespace:
    """As much as is looked at of the config of a run under ZeRO-3."""
    return SimpleNamespace(deepspeed="zero3.json", fsdp=None, world_size=processes)


def test_a_checkpoint_of_zero3_goes_with_as_many_processes_as_saved_it(zero3):
    check_complete(zero3, here(2))
    for processes in (1, 3):
        with pytest.raises(HFTError, match=f"2 saved it, the parts of 2 are here, and this run has {processes}"):
            check_complete(zero3, here(processes))


def test_a_checkpoint_of_zero3_without_the_parts_of_another_node_is_refused(zero3):
    next(zero3.glob("*/*_rank_1_*")).unlink()
    with pytest.raises(HFTError, match="2 saved it, the parts of 1 are here, and this run has 2"):
        check_complete(zero3, here(2))


@pytest.fixture
def killed(tmp_path, finished) -> Path:
    """A run that was killed after it had saved its last checkpoint."""
    out = shutil.copytree(finished, tmp_path / "killed")
    (out / "results.json").unlink()
    return out


def resumed(out: Path, tiny: Path, data: Path, *flags: str) -> hft.RunPlan:
    evaluation = ["--eval_strategy", "steps", "--eval_on_start", "true", "--eval_steps", "4"]
    words = command("sft", out, *evaluation, *flags, model=tiny, data=data)
    return hft.make_plan(parse_config(words[0], words[1:]))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optim", "adafactor"], "optim unset there, adafactor here"),
        (["--optim", "adamw_bnb_8bit"], "optim unset there, adamw_bnb_8bit here"),
        (["--optim", "sgd", "--optim_args", "momentum=0.9"], "optim unset there, sgd here; optim_args unset there"),
        (
            ["--lr_scheduler_type", "reduce_lr_on_plateau", "--warmup_steps", "0"],
            "lr_scheduler_type linear there, reduce_lr_on_plateau here",
        ),
        (["--optim", "adamw_torch"], None),  # whose state is that of the default
        (["--max_grad_norm", "0.5"], None),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_a_resume_with_an_optimizer_that_its_state_is_not_of_is_refused(killed, tiny, data, flags, said):
    if said is None:
        assert resumed(killed, tiny, data, *flags).start.resume_from == str(killed / "checkpoint-4")
        return
    with pytest.raises(HFTError, match=f"whose optimizer keeps its own settings: {said}"):
        resumed(killed, tiny, data, *flags)


def test_what_cannot_be_resumed_is_refused_with_a_remedy(killed, tmp_path, tiny, data):
    with pytest.raises(HFTError, match=f"checkpoint {killed / 'checkpoint-9'} not found"):
        resumed(killed, tiny, data, "--resume_from_checkpoint", str(killed / "checkpoint-9"))
    sentence = "whose optimizer keeps its own settings: learning_rate 0.001 there, 0.01 here; weight_decay"
    with pytest.raises(HFTError, match=sentence):
        resumed(killed, tiny, data, "--learning_rate", "1e-2", "--weight_decay", "0.1")
    (tmp_path / "latest").symlink_to(killed / "checkpoint-4")
    linked = ["--resume_from_checkpoint", str(tmp_path / "latest"), "--output_dir", str(tmp_path / "other")]
    with pytest.raises(HFTError, match="give the same ones, or the checkpoint as --model_name_or_path"):
        resumed(killed, tiny, data, *linked, "--learning_rate", "1e-2")


def test_a_finished_run_is_one_of_the_rows_that_are_there_now(tmp_path, finished, tiny, data):
    rows = shutil.copytree(data, tmp_path / "rows")
    out = shutil.copytree(finished, tmp_path / "out")
    config = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(config.replace(str(data), str(rows)))
    assert resumed(out, tiny, rows).start.is_finished
    made = [json.loads(line) for line in (rows / "train.jsonl").read_text().splitlines()]
    write_jsonl(rows / "train.jsonl", made[::-1])
    with pytest.raises(HFTError, match=r"trained with other settings \(sha256"):
        resumed(out, tiny, rows)


def test_a_resume_with_other_tokens_is_refused(finished):
    """As a chat template with a clock makes them the day after."""
    manifest = Manifest.load(finished)
    assert len(manifest.tokens) == 64
    manifest.check_resumable(finished)
    replace(manifest, tokens="").check_resumable(finished)
    with pytest.raises(HFTError, match="the same rows have become other tokens"):
        replace(manifest, tokens="0" * 64).check_resumable(finished)
