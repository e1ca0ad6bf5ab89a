"""wandb, offline and as a stub: one run however often it is stopped, grouped, and with the model as it was saved."""

import json
import os
import signal
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from safetensors.torch import load_file
from transformers import Trainer
from wandb.proto import wandb_internal_pb2

from hft.runs.tracking import WandbRun
from tests.conftest import error_of


def records(folder) -> list:
    """What an offline run has recorded: protocol buffers in LevelDB's log format, after a header of 7 bytes."""
    (path,) = folder.glob("*.wandb")
    content, start, found, parts = path.read_bytes(), 7, [], b""
    while start + 7 <= len(content):
        length, kind = struct.unpack_from("<HB", content, start + 4)
        parts += content[start + 7 : start + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
        start += 7 + length
        if start // 32768 != (start + 6) // 32768:  # no header crosses a block
            start = -(-start // 32768) * 32768
    return found


def steps(found: list, key: str) -> list[int]:
    """The steps at which a key was logged."""
    rows = [
        {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in one.history.item}
        for one in found
    ]
    return [int(row["train/global_step"]) for row in rows if key in row]


def test_a_stopped_run_is_resumed_as_the_same_wandb_run(tmp_path, sft, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    out = tmp_path / "out-seed=1"
    flags = ["--logging_steps", "1", "--save_only_trained", "true", "--report_to", "wandb"]
    flags += ["--eval_strategy", "steps", "--eval_on_start", "true", "--eval_steps", "2"]
    step = Trainer.training_step

    def stopped_in_the_second(trainer, *args, **kwargs):
        if trainer.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stopped_in_the_second)
    assert sft(out, *flags) == 143
    assert sft(out, *flags) == 0
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime)
    runs = [next(one.run for one in records(folder) if one.HasField("run")) for folder in (first, second)]
    assert runs[0].run_id == runs[1].run_id == json.loads((out / "wandb_run.json").read_text())["id"]
    for run in runs:
        assert (run.run_group, run.job_type, list(run.tags)) == ("tiny sft", "hft", ["tiny", "sft", "hft"])
    logged = [records(first), records(second)]
    assert [steps(one, "train/loss") for one in logged] == [[1, 2], [3, 4]]
    assert [steps(one, "eval/loss") for one in logged] == [[0, 2], [4]]
    assert [bool(list(folder.glob("files/media/images/selection*"))) for folder in (first, second)] == [True, False]
    artifacts = [one.artifact for one in logged[1] if one.HasField("artifact")] or [
        one.request.log_artifact.artifact for one in logged[1] if one.request.HasField("log_artifact")
    ]
    (model,) = [one for one in artifacts if one.type == "model"]
    files = {entry.path: entry.local_path for entry in model.manifest.contents}
    assert "hft_model_config.json" in files
    assert "training_args.bin" not in files
    ours, saved = load_file(files["model.safetensors"]), load_file(out / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: t.dtype for name, t in saved.items()}
    assert str(tmp_path) not in Path(files["hft_manifest.json"]).read_text()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WANDB_PROJECT", "a/b", "Invalid project name 'a/b': cannot contain"),
        ("WANDB_MODE", "offlin", "Input should be 'online', 'offline', "),
        ("WANDB_TAGS", "", "Tag at index 0 is empty"),
        ("WANDB_FINISH_TIMEOUT", "soon", "Input should be a valid number"),
    ],
)
def test_a_variable_that_wandb_refuses_is_refused_before_anything_is_written(
    tmp_path, sft, capsys, monkeypatch, name, value, message
):
    monkeypatch.setenv(name, value)
    assert sft(tmp_path / "out", "--report_to", "wandb") == 2
    assert f"wandb does not take {name}: " in (error := error_of(capsys))
    assert message in error
    assert not (tmp_path / "out").exists()


def test_what_a_resumed_wandb_run_has_is_not_logged_again(monkeypatch):
    """As online, where the summary says what was logged before the process was killed."""
    log = []
    run = SimpleNamespace(summary={"train/global_step": 3}, id="id")
    monkeypatch.setattr(wandb, "run", run)
    monkeypatch.setattr(wandb, "log", log.append)
    callback, state = WandbRun(), SimpleNamespace(is_world_process_zero=True)
    callback._initialized = True
    for step, row in ((3, {"loss": 1}), (3, {"eval_loss": 1}), (2, {"eval_loss": 1}), (4, {"loss": 1})):
        state.global_step = step
        callback.on_log(None, state, None, logs=row)
    assert [row["train/global_step"] for row in log] == [3, 4]
