"""`hft kto`: an objective that is one file, a recipe, and a reader of rows."""

import re
import shutil

from hft.cli import main
from hft.config import RunConfig
from hft.data import load_data, load_split
from hft.data.rows import unpaired_rows
from hft.runs.result import RunResult
from tests.conftest import command, identical, tensors


def test_answers_alternate_and_the_row_before_is_another_prompts(pairs):
    rows, _ = unpaired_rows(load_split(str(pairs), "train"), "pairs")
    assert len(rows) == 2 * 80
    assert rows["label"][:] == [True, False] * 80
    prompts = [prompt[-1]["content"] for prompt in rows["prompt"]]
    assert all(one != other for one, other in zip(prompts, prompts[1:] + prompts[:1], strict=True))
    given = {(row["prompt"][-1]["content"], row[kept][0]["content"], kept == "chosen")
             for row in load_split(str(pairs), "train") for kept in ("chosen", "rejected")}  # fmt: skip
    answers = zip(prompts, rows["completion"], rows["label"], strict=True)
    assert {(prompt, completion[0]["content"], label) for prompt, completion, label in answers} == given


def test_both_answers_to_a_prompt_are_held_out_together(pairs):
    run = RunConfig(dataset_name=str(pairs / "train.jsonl"), dataset_test_split=None, eval_rows=16)
    data = load_data(run, unpaired_rows, evaluate=True)
    assert (len(data.train), len(data.test)) == (144, 16)
    assert not {*data.train["row"]} & {*data.test["row"]}
    assert sum(data.test["label"]) == 8


def test_a_run_resumes_and_is_reported_as_any_other(tiny, pairs, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    evaluation = ["--eval_strategy", "steps", "--eval_on_start", "true", "--eval_steps", "4", "--eval_rows", "16"]

    def kto(folder):
        flags = ["--max_length", "128", *evaluation]
        return main(command("kto", folder, *flags, model=tiny, data=pairs))

    assert kto(out) == 0
    text = capsys.readouterr().out
    assert "160 training answers, 4 steps" in text
    assert "reference: shares the frozen half with the policy" in text
    assert "18 of 18 tensors bit-identical" in text
    result = RunResult.load(out)
    assert [len(values) for values in result.held_out.values()] == [2, 2]
    assert result.held_out["loss"][0] == 0.5
    card = (out / "README.md").read_text()
    assert re.search(r"- kto$", card, re.M)

    again.mkdir()
    shutil.copytree(out / "checkpoint-2", again / "checkpoint-2")
    shutil.copy(out / "config.yaml", again)
    assert kto(again) == 0
    assert "resuming from" in capsys.readouterr().out
    assert all(identical(tensor, tensors(again)[name]) for name, tensor in tensors(out).items())

    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert "| out | hft | 4 | passed, 18 frozen" in (tmp_path / "report" / "report.md").read_text()


def test_a_plan_counts_what_is_computed_without_gradients(capsys):
    words = ["--max_steps", "9", "--gpus", "8", "--gpu_memory", "80GiB", "--per_device_train_batch_size", "4"]
    flops = {}
    for objective in ("dpo", "kto"):
        recipe = f"recipes/llama2-7b/{objective}.yaml"
        rows = ["--global_batch_size", "64", *words]
        assert main(["plan", objective, "--config", recipe, "recipes/methods/hft.yaml", *rows]) == 0
        cost = capsys.readouterr().out.partition("per token:")[2]
        flops[objective] = {name: float(value) for name, value in re.findall(r"^ +(\w+) +[\d.]+ +([\d.]+)", cost, re.M)}
    assert flops["dpo"]["reference"] == flops["dpo"]["forward"] == flops["kto"]["forward"]
    assert round(flops["kto"]["reference"] / flops["kto"]["forward"]) == 3  # the KL term's answer takes two of them
