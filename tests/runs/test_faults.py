"""A NaN loss, an output that cannot be written, a wandb outage: one sentence each, and nothing is lost."""

import json
import os
import re
import shutil
import signal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import lm_eval
import pytest
from transformers import Trainer

from hft.cli import COMMANDS, main
from hft.record.checkpoints import last_checkpoint
from hft.record.scores import scores_of
from tests.conftest import error_of
from tests.cpi.test_cpi import words as cpi


def test_weights_that_are_not_finite_are_not_saved(tmp_path, sft, capsys):
    out = tmp_path / "out"
    spoiled = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--save_steps", "1"]
    assert sft(out, *spoiled) == 2  # the first step has rate 0, the second ruins the weights
    first = out / "checkpoint-1"
    assert error_of(capsys) == (
        f"hft: the norm of the weights is inf at step 2; {first} is the last good checkpoint; a resume keeps its "
        "learning rates, so train again with a lower --learning_rate or --max_grad_norm, or more --warmup_steps, and "
        "--resume_from_checkpoint none"
    )
    assert last_checkpoint(out) == str(first)
    assert not list(out.glob("checkpoint-2/*"))
    assert not (out / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_ends_a_run(tmp_path, dpo, capsys):
    assert dpo(tmp_path / "out", "--learning_rate", "1e30", "--max_grad_norm", "0", "--save_strategy", "no") == 2
    assert "hft: the loss is nan at step 3; no checkpoint was saved; " in error_of(capsys)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path, sft, tiny, capsys):
    assert sft("/proc/out") == 2
    assert "hft: cannot write to output_dir /proc/out: " in error_of(capsys)
    (tmp_path / "file").write_text("")
    for out in ("/proc/out", tmp_path / "file" / "out"):
        assert main(cpi(tiny, tmp_path, out)) == 2
        assert f"hft: cannot write to output_dir {out}: " in error_of(capsys)


def test_a_read_only_file_system_is_named(tmp_path, monkeypatch, sft, capsys):
    """As the root user, whom permissions do not stop."""

    def refuse(*_):
        raise OSError(30, "Read-only file system", str(tmp_path / "out" / "optimizer.pt"))

    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", refuse)
    assert sft(tmp_path / "out") == 2
    error = error_of(capsys)
    assert error.endswith("optimizer.pt: Read-only file system; choose a folder that you may write to")


@pytest.mark.parametrize("command", ["eval", "continual", "cpi", "diff"])
@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_every_command_in_a_sentence(capsys, monkeypatch, command, number, status):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    module, _, function = COMMANDS[command][0].partition(":")
    monkeypatch.setattr(f"{module}.{function}", lambda words: signal.raise_signal(signal.Signals[number]))
    assert main([command, *(["--num_processes", "1"] if command != "diff" else [])]) == status
    more = "" if command == "diff" else "; run the same command again to continue from what is complete"
    assert error_of(capsys) == f"hft: stopped by {number}{more}"


def test_ctrl_c_waits_for_an_import_which_packages_may_hide_it_in(tmp_path, capsys, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (tmp_path / "late.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\n"
        "def main(words):\n    return 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "diff", ("late:main", ""))
    assert main(["diff"]) == 130
    assert error_of(capsys) == "hft: stopped by SIGINT"


def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path, sft, capsys, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def pressed_twice(*_, **__):
        signal.raise_signal(signal.SIGINT)
        assert "finishing the step and saving; Ctrl-C again ends the run at once" in capsys.readouterr().out
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "training_step", pressed_twice)
    assert sft(tmp_path / "out") == 130
    assert error_of(capsys).startswith("hft: stopped by SIGINT; run the same command again")
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_an_evaluation_that_is_stopped_keeps_what_is_scored(finished, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    words, evaluate, calls = ["eval", str(out), "--tasks", "drift", "task", "--limit", "2"], lm_eval.evaluate, []

    def stopped_in_the_second(**settings):
        calls.append(settings)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(**settings)

    monkeypatch.setattr(lm_eval, "evaluate", stopped_in_the_second)
    assert main(words) == 143
    assert "run the same command again to continue" in error_of(capsys)
    assert {score.task for score in scores_of(out)["quick"].scores} == {"drift"}
    assert main(words) == 0
    assert len(calls) == 3
    assert {score.task for score in scores_of(out)["quick"].scores} == {"drift", "task"}


def test_one_of_several_processes_that_fails_ends_at_once(tmp_path, capsys, monkeypatch):
    """Python's own end would abort it while gloo's threads need the GIL, and the status would be SIGABRT's."""
    ends = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", ends.append)
    main(["verify", str(tmp_path)])
    assert "has no hft_manifest.json" in error_of(capsys)
    monkeypatch.setattr("hft.record.verification.main", lambda words: 1 / 0)
    main(["verify", str(tmp_path)])
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert ends == [2, 1]


@pytest.fixture
def wandb_online(tmp_path, monkeypatch):
    """wandb with a key that looks valid, which waits for its server briefly."""
    settings = {"API_KEY": "0" * 40, "BASE_URL": "http://127.0.0.1:9", "DIR": str(tmp_path)}
    settings |= {"INIT_TIMEOUT": "2", "FINISH_TIMEOUT": "1", "HTTP_TIMEOUT": "1"}
    for key, value in settings.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    monkeypatch.delenv("WANDB_MODE")


def test_wandb_out_of_reach_from_the_start(tmp_path, sft, capsys, wandb_online):
    assert sft(tmp_path / "out", "--report_to", "wandb", "--max_steps", "1") == 0
    printed = capsys.readouterr().out
    assert "wandb is offline (" in printed
    assert f"upload later with `wandb sync {tmp_path / 'wandb' / 'offline-run-'}" in printed


class Server(BaseHTTPRequestHandler):
    """As much of wandb's server as a run needs to start."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(body) if self.path == "/graphql" else {}
        name = asked.get("variables", {}).get("name") or "run"
        run = {"id": "id", "name": name, "displayName": name, "project": {"name": "hft", "entity": {"name": "me"}}}
        viewer = {"id": "me", "entity": "me", "username": "me", "teams": {"edges": []}}
        data = {"viewer": viewer, "serverInfo": {"features": []}, "upsertBucket": {"bucket": run, "inserted": True}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def test_wandb_out_of_reach_midway(tmp_path, sft, capsys, wandb_online, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    for what in ("INIT", "HTTP"):
        monkeypatch.setenv(f"WANDB_{what}_TIMEOUT", "60")
    step = Trainer.training_step

    def last_seen(trainer, *args, **kwargs):
        server.shutdown()
        server.server_close()
        monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", last_seen)
    assert sft(tmp_path / "out", "--report_to", "wandb", "--max_steps", "1") == 0
    printed = capsys.readouterr().out
    assert "wandb: http://127.0.0.1" in printed
    assert "verify passed" in printed
    (folder,) = re.findall("wandb cannot be reached; upload the rest later with `wandb sync (.*)`", printed)
    (log,) = Path(folder).glob("*.wandb")
    assert b"train/loss" in log.read_bytes()
