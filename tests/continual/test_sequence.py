"""Sequences by the command line: rounds, matrix, resume, and what a user may get wrong."""

import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft.cli import main
from hft.continual.command import PlannedRun, plan_runs
from hft.continual.config import SequencePlan, parse_sequence
from hft.continual.data import SequenceData, read_task, shortened
from hft.continual.matrix import Matrix
from hft.continual.metrics import SUITE, benchmark_of
from hft.continual.strategies import gem as gem_strategy
from hft.continual.strategies.self_replay import SelfReplay, sample_texts
from hft.demo.tasks import write_tasks
from hft.errors import HFTError
from hft.evaluation.evaluate import evaluate
from hft.evaluation.suites import Settings
from hft.planning.memory import engine_of, memory_of
from hft.record.manifest import Manifest
from hft.record.scores import scores_of
from hft.reporting.paper import read_runs
from hft.runs.plan import load_model_config, make_plan
from hft.runs.train import make_trainer
from hft.userfile import file_digest
from tests.conftest import error_of, identical, tensors

RAW = "hft/demo/templates/raw.jinja"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """The demo tasks, in TRACE's layout."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def sequence(tiny, tasks, out, *flags: str, strategy: str = "seqft", method: str = "hft", steps: int = 2) -> list[str]:
    """The words of `hft continual` on two tasks, few steps and few test rows; flags win."""
    settings = {"model_name_or_path": tiny, "trace_dir": tasks, "output_dir": out, "report_to": "none", "bf16": "false"}
    settings |= {"strategy": strategy, "max_steps": steps, "save_steps": 1, "test_rows": 8, "logging_steps": 1}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    files = ["--config", "recipes/tiny/trace.yaml", f"recipes/methods/{method}.yaml"]
    words += ["--tasks", "First", "Swap", "--metrics", "{First: edit_similarity, Swap: choice}"]
    return ["continual", *files, *words, *flags]


@pytest.fixture(scope="module")
def gem(tmp_path_factory, tiny, tasks) -> Path:
    """Two rounds of GEM with HFT."""
    out = tmp_path_factory.mktemp("sequence") / "gem"
    assert main(sequence(tiny, tasks, out, "--memory_rows", "4", strategy="gem")) == 0
    return out


def test_each_round_is_a_run_with_another_half(gem, tiny):
    one, two = (Manifest.load(gem / name) for name in ("01-First", "02-Swap"))
    assert (one.base, two.base) == (str(tiny), str(gem / "01-First"))
    assert [one.selection["round"], two.selection["round"]] == [1, 2]
    assert one.frozen_units != two.frozen_units
    assert main(["verify", str(gem / "02-Swap")]) == 0
    assert two.strategy == {
        "strategy": "gem",
        "memory_rows": 4,
        "memory_seed": 0,
        "gem_margin": 0.5,
        "carry_moments": False,
        "strategy_data": str(memory := gem / "data" / "02-Swap-memory.jsonl"),
        "file of strategy_data": file_digest(memory),
    }


def test_the_matrix_has_a_row_for_the_start_and_each_round(gem):
    saved = json.loads((gem / "matrix.json").read_text())
    assert (saved["tasks"], saved["rounds"]) == (["First", "Swap"], ["start", "First", "Swap"])
    assert saved["metrics"] == ["edit_similarity", "accuracy"]
    assert [[value is None for value in row] for row in saved["scores"]] == [[False] * 2, [False, True], [False] * 2]
    assert all(0 <= value <= 100 for row in saved["scores"] for value in row if value is not None)
    assert len({row[0] for row in saved["scores"]}) > 1  # similarity of code sees small changes
    assert saved["others"]["first_letter"][0] == [None, 0.0]
    assert saved["counts"] == [8, 8]
    assert saved["op"][-1] == pytest.approx(sum(saved["scores"][2]) / 2)
    assert saved["about"]["dtype"] == "float32"
    whole = scores_of(gem)["trace"]  # what `hft paper 3` reads
    assert whole.find("op", "op").value == saved["op"][-1]
    assert whole.find("bwt", "bwt").value == saved["bwt"][-1]


def test_a_printed_command_repeats_its_round_bit_for_bit(gem, tiny, tasks, tmp_path, capsys):
    capsys.readouterr()
    assert main(sequence(tiny, tasks, gem, "--memory_rows", "4", "--dry_run", strategy="gem")) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  hft sft ")]
    assert len(commands) == 2
    assert main([*commands[1][1:], "--output_dir", str(tmp_path / "again")]) == 0
    ours, theirs = tensors(gem / "02-Swap"), tensors(tmp_path / "again")
    assert all(identical(ours[name], theirs[name]) for name in ours)


def test_a_killed_sequence_goes_on_and_a_finished_one_is_left_alone(gem, tiny, tasks, tmp_path):
    again = sequence(tiny, tasks, gem, "--memory_rows", "4", strategy="gem")
    matrix, weights = (gem / "matrix.json").read_text(), tensors(gem / "02-Swap")
    written = (gem / "02-Swap" / "model.safetensors").stat().st_mtime_ns
    assert main(again) == 0
    assert (gem / "02-Swap" / "model.safetensors").stat().st_mtime_ns == written
    # As if killed in the second round: after its first step, before its scores.
    cut = Matrix.load(gem)
    for rows in (cut.rounds, cut.scores, *cut.others.values()):
        rows.pop()
    cut.save(gem)
    shutil.rmtree(gem / "02-Swap" / "checkpoint-2")
    shutil.rmtree(gem / "02-Swap" / "scores")
    for name in ("results.json", "model.safetensors"):
        (gem / "02-Swap" / name).unlink()
    assert main(again) == 0
    assert (gem / "matrix.json").read_text() == matrix
    assert all(identical(weights[name], tensor) for name, tensor in tensors(gem / "02-Swap").items())


def test_a_folder_of_another_sequence_is_refused(gem, tiny, tasks, capsys):
    capsys.readouterr()
    assert main(sequence(tiny, tasks, gem, "--memory_rows", "5", strategy="gem")) == 2
    assert "holds another sequence (memory_rows 4 there, 5 here)" in error_of(capsys)


def test_sequence_yaml_is_the_same_sequence(gem, capsys):
    capsys.readouterr()
    assert main(["continual", "--config", str(gem / "sequence.yaml")]) == 0
    assert "| OP |" in capsys.readouterr().out


def test_one_task_with_a_replay_pass_keeps_its_half(tmp_path, tiny, tasks):
    folder = tmp_path / "tasks"
    shutil.copytree(tasks / "Swap", folder / "Swap")
    rows = json.loads((folder / "Swap" / "train.json").read_text())[:20]
    rows += [{"prompt": "nothing", "answer": " "}]  # nothing to learn
    (folder / "Swap" / "train.json").unlink()
    (folder / "Swap" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "Lima").mkdir()
    (folder / "Lima" / "train.json").write_text(json.dumps(rows[:4]))
    out = tmp_path / "out"
    words = sequence(tiny, folder, out, "--tasks", "Swap", "--metrics", "{Swap: accuracy}", "--score_start", "false")
    words += ["--max_steps", "-1", "--num_train_epochs", "2", "--strategy", "replay", "--alignment", "Lima"]
    assert main(words) == 0
    first, replay = (Manifest.load(out / name) for name in ("01-Swap", "01-Swap-replay"))
    assert first.frozen_units == replay.frozen_units
    assert replay.base == str(out / "01-Swap")
    steps = [json.loads((out / name / "results.json").read_text())["steps"] for name in ("01-Swap", "01-Swap-replay")]
    assert steps == [2 * 2, 1]  # 20 rows in batches of 16; one epoch over 4
    matrix = Matrix.load(out)
    assert (matrix.rounds, len(matrix.scores)) == (["Swap"], 1)
    assert matrix.summary()["bwt_earlier_tasks"] is None
    assert "BWT over earlier tasks only -" in matrix.report()


def test_an_adapter_goes_through_the_tasks_and_unseen_ones_are_scored(tmp_path, tiny, tasks):
    words = sequence(tiny, tasks, tmp_path / "out", "--score_unseen", method="lora-qv", strategy="lora", steps=1)
    assert main(words) == 0
    assert Manifest.load(tmp_path / "out" / "02-Swap").strategy["previous_run"] == str(tmp_path / "out" / "01-First")
    assert all(value is not None for row in Matrix.load(tmp_path / "out").scores for value in row)


def test_scores_do_not_depend_on_the_batch(tiny, tmp_path):
    prompts = ["one", "one two three", "four five six seven eight", "nine", "ten eleven"]  # padded in a batch
    letters = "abcdefghijklmnopqrstuvwxyz etaoinshrdlu"  # similar to whatever is generated
    rows = [{"context": prompt, "prompt": prompt, "completion": letters} for prompt in prompts]
    benchmarks = [benchmark_of("First", rows, "edit_similarity", 8)]
    settings = (Settings(chat=False, batch_size=size) for size in (1, 5))
    one, five = (evaluate(str(tiny), SUITE, each, benchmarks=benchmarks).scores for each in settings)
    assert one == five
    assert one[0].value > 0


def test_a_long_prompt_loses_its_middle_and_a_long_answer_its_end(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = Path(RAW).read_text()
    body = " ".join(f"word{n}" for n in range(400))
    row = {"prompt": f"Summarize this text.\n{body}\nSummary:", "completion": body}
    [short] = shortened([row], tokenizer, 64, 16)
    assert short["prompt"].startswith("Summarize this text.\nword0 ")
    assert short["prompt"].endswith("word399\nSummary:")
    assert row["completion"].startswith(short["completion"])
    whole = [{"role": "user", "content": short["prompt"]}]
    assert 60 <= len(tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]) <= 65
    assert len(tokenizer(short["completion"])["input_ids"]) == 15  # and its EOS
    assert shortened([short], tokenizer, 70, 16) == [short]


def test_dry_run_writes_nothing(tmp_path, tiny, tasks, capsys):
    capsys.readouterr()
    assert main(sequence(tiny, tasks, tmp_path / "out", "--tasks", "Swap", "First", "--dry_run")) == 0
    assert not (tmp_path / "out").exists()
    out = capsys.readouterr().out
    assert out.index("01-Swap") < out.index("02-First")
    assert "training rows, 2 steps" in out


@pytest.fixture
def planned(tmp_path):
    """Plan all runs of a sequence."""

    def plan_all(*words) -> tuple[list[PlannedRun], SequencePlan]:
        plan, machine = parse_sequence([str(word) for word in words])
        return plan_runs(plan, SequenceData(plan), machine, tmp_path / "rows"), plan

    return plan_all


def test_flags_win_over_files_and_a_tasks_own_epochs_over_the_common_ones(tmp_path, planned, tiny, tasks):
    """And `sequence.yaml` is the same sequence."""
    recipe = tmp_path / "recipe.yaml"
    common = yaml.safe_load(Path("recipes/tiny/trace.yaml").read_text()) | {"max_steps": -1}

    def epochs(content: dict, *flags: str) -> list[float | None]:
        recipe.write_text(yaml.safe_dump(common | content))
        words = sequence(tiny, tasks, tmp_path / "out", "--max_steps", "-1", *flags)[1:]
        words[1] = str(recipe)
        runs, plan = planned(*words)
        recipe.write_text(yaml.safe_dump(plan.keys))
        again, _ = planned("--config", recipe)
        assert [(run.run.flags, run.steps) for run in runs] == [(run.run.flags, run.steps) for run in again]
        return [run.steps / 25 for run in runs]  # 400 rows, 16 at once

    own = {"epochs": {"First": 3, "Swap": 2}}
    assert epochs(own) == [3, 2]
    assert epochs(own | {"num_train_epochs": 1}) == [3, 2]
    assert epochs(own, "--num_train_epochs", "1") == [1, 1]
    assert epochs({"num_train_epochs": 4}, "--epochs", "{First: 3}") == [3, 4]
    assert epochs(own, "--epochs", "{First: 5}", "--num_train_epochs", "1") == [5, 1]
    assert epochs(own, "--tasks", "First", "--metrics", "{First: accuracy}") == [3]


def test_a_sequence_without_a_folder_is_named_after_what_it_is(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder, out in {"~": Path("runs/tiny-trace-hft-seqft-more"), "~/mine": tmp_path / "mine"}.items():
        (tmp_path / "more.yaml").write_text(f"output_dir: {folder}\nrun_name: ~\nmodel_name_or_path: {tiny}")
        plan, _ = parse_sequence(["--config", "recipes/tiny/trace.yaml", str(tmp_path / "more.yaml")])
        assert (plan.out, plan.keys["output_dir"]) == (out, str(out))


def test_a_replay_pass_is_one_epoch_and_takes_nothing_else_from_the_rounds(tmp_path, planned, tiny, tasks):
    flags = ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_rows", "50", "--load_best_model_at_end", "true"]
    flags += ["--save_strategy", "best", "--warmup_steps", "50", "--metric_for_best_model", "loss"]
    runs, plan = planned(*sequence(tiny, tasks, tmp_path, *flags, strategy="replay")[1:])
    assert [(run.run.name, len(run.run.rows), run.steps) for run in runs] == [
        ("01-First", 400, 2),
        ("02-Swap", 400, 2),
        ("02-Swap-replay", 40, 3),
    ]
    values = plan.config(runs[-1].run.flags).values
    assert (values["max_steps"], values["num_train_epochs"], values["warmup_steps"]) == (-1, 1.0, 0)
    assert (values["eval_strategy"], values["load_best_model_at_end"], values["save_strategy"]) == ("no", False, "no")


def test_every_round_is_planned_before_the_first(tmp_path, planned, tiny, tasks, capsys):
    """GEM's memory grows by a gradient per task; FFT of a 13B model has room for seven on 8 x 80 GiB."""
    recipe = "recipes/llama2-chat-13b/trace.yaml"
    for task in yaml.safe_load(Path(recipe).read_text())["tasks"]:
        shutil.copytree(tasks / "Swap", tmp_path / "trace" / task)
    words = ["--config", recipe, "recipes/methods/fft.yaml", "--trace_dir", tmp_path / "trace", "--strategy", "gem"]
    words += ["--output_dir", tmp_path / "out", "--gpus", "8", "--dry_run", "true", "--report_to", "none"]
    runs, plan = planned(*words, "--gpu_memory", "80GiB")
    assert not [run.misfit for run in runs if run.misfit]
    gradient = 4 * 13_015_864_320 / 8
    assert [b.size - a.size for a, b in pairwise(runs[1:])] == pytest.approx([gradient] * 6)
    assert runs[-1].flops / runs[-1].steps > 2 * runs[0].flops / runs[0].steps
    assert main(["continual", *map(str, words), "--gpu_memory", "75GiB"]) == 0
    out = capsys.readouterr().out
    assert "08-20Minuten does not fit: short by 2.4 GiB" in out
    assert "07-NumGLUE-ds does not fit" not in out
    assert not plan.out.exists()


def test_a_round_that_this_machine_cannot_hold_is_named_before_anything_is_written(
    tmp_path, tiny, tasks, capsys, monkeypatch
):
    monkeypatch.setattr("hft.planning.fit.device_bytes", lambda **_: 18 * 1_328_256)
    words = sequence(tiny, tasks, tmp_path / "out", "--use_cpu", "true", strategy="gem", method="fft")
    assert main(words) == 2
    assert "02-Swap does not fit" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_gems_gradients_are_those_of_its_plan(tmp_path, planned, tiny, tasks, monkeypatch):
    """The step's own, and one per earlier task, in fp32; no parameter has another at the same time."""
    runs, _ = planned(*sequence(tiny, tasks, tmp_path / "out", "--memory_rows", "4", strategy="gem")[1:])
    made, seen = make_plan(runs[1].config), []
    trainer = make_trainer(made)

    def dot_products(gradients, device):
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        seen.append(sum(tensor.nbytes for gradient in gradients for tensor in gradient))
        return original(gradients, device)

    original = gem_strategy.dot_products
    monkeypatch.setattr(gem_strategy, "dot_products", dot_products)
    trainer.train()
    memory = memory_of(made.config.method, made.selection, engine_of(made.config, load_model_config(made.config)))
    assert set(seen) == {memory.gradients + memory.method}


def test_texts_are_sampled_whatever_the_bases_generation_config_says(tiny):
    """As those of chat models, which are about answers to people."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    args = SimpleNamespace(process_index=0, world_size=1, device=torch.device("cpu"), bf16=False)
    trainer = SimpleNamespace(args=args, processing_class=tokenizer)
    texts = []
    for changed in ({}, {"repetition_penalty": 5.0, "min_p": 0.5, "max_new_tokens": 2, "num_beams": 2}):
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        model.generation_config.update(**changed)
        texts.append(sample_texts(model, trainer, SelfReplay(replay_texts=8, replay_tokens=16)))
    assert texts[0] == texts[1]
    assert max(map(len, texts[0])) == 16


def test_other_tasks_than_the_recipes_need_no_metrics_of_its_own():
    words = ["--config", "recipes/smollm2-135m/trace.yaml", "--tasks", "ScienceQA", "Kind"]
    plan, _ = parse_sequence(words)
    assert plan.settings.metrics == {"ScienceQA": "choice_and_reason", "Kind": "choice"}
    with pytest.raises(HFTError, match="metrics has Swap"):
        parse_sequence([*words, "--metrics", "{Kind: choice, Swap: accuracy}"])


def test_the_documents_own_strategy_chooses_rows(tmp_path, tiny, tasks):
    example = Path("docs/examples/balanced_replay.py").read_text()
    [shown] = re.findall(r"```python\n(.*?)```", Path("docs/continual.md").read_text(), re.DOTALL)
    assert shown in example
    own = "docs/examples/balanced_replay.py:BalancedReplay"
    plan, _ = parse_sequence(sequence(tiny, tasks, tmp_path / "out", "--replay_seed", "1", strategy=own)[1:])
    [[first], [second]] = SequenceData(plan).rounds(plan)
    assert (len(first.rows), len(second.rows)) == (400, 800)
    assert {row["prompt"].split("\n")[0] for row in second.rows[400:]} == {"Give the first word."}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "First", "First"], "tasks has First twice"),
        (["--metrics", "{First: f1, Swap: accuracy}"], "unknown metric 'f1' of First; give one of accuracy, choice"),
        (["--metrics", "{First: accuracy}"], "Swap is not in TRACE and has no metric"),
        (["--metrics", "{First: accuracy, Swap: accuracy, FOMC: accuracy}"], "metrics has FOMC"),
        (["--epochs", "{Frist: 3}", "--max_steps", "-1"], "epochs has Frist, which is not among the tasks First, Swap"),
        (["--epochs", "{First: -1}", "--max_steps", "-1"], "epochs: expected a number greater than 0, got "),
        (["--epochs", "{First: 3}"], "epochs change nothing beside max_steps 2; add --max_steps -1"),
        (["--output_dir"], "output_dir: expected text, got no value"),
        (["--method", "fft"], "a method is a file, not a flag: --config RECIPE fft"),
        (["--strategy", "gme"], "unknown strategy 'gme', did you mean 'gem'?"),
        (["--strategy", "replay", "--alignment", "Lima"], "lacks Lima/train, as .json or .jsonl"),
        (["--tasks", "FOMC", "NumGLUE-cm", "--metrics", "{}"], "lacks FOMC/train, as .json or .jsonl"),
        (["--trace_dir", "nowhere"], "trace_dir nowhere does not exist"),
        (["--dataset_name", "data/sft"], "dataset_name is set by hft continual per run"),
        (["--replay_mode", "mixed"], "replay_mode is a key of strategy replay"),
        (["--test_rows", "0"], "test_rows: expected a number greater than 0, got '0'"),
        (["--strategy", "agem", "--memory_batch", "0"], "memory_batch: expected a number greater than 0, got '0'"),
        (["--config", "lora", "--strategy", "seqft"], "strategy seqft does not work with an adapter"),
        (["--push_to_hub", "true"], "push_to_hub would push every run"),
        (
            ["--resume_from_checkpoint", "runs/x/checkpoint-2"],
            "is one run's; remove it: each resumes",
        ),
        (["--gpus", "8"], "gpus is for a plan: add --dry_run true"),
        (["--strategy", "gem", "--fp16", "true"], "gem compares gradients, which fp16 scales"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:30],
)
def test_a_mistake_is_a_sentence(tmp_path, tiny, tasks, capsys, flags, message):
    capsys.readouterr()
    assert main(sequence(tiny, tasks, tmp_path / "out", *flags)) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "has no row with an answer"),
        ('[{"prompt": "a", "answer": ""}]', "has no row with an answer"),
        ('[{"prompt": "a"}]', "is not a list of rows with prompt and answer"),
        ('[{"prompt": "a", "answer": 3}]', "0.answer Input should be a valid string"),
        ("{", "is not a list of rows with prompt and answer"),
    ],
)
def test_a_file_that_is_no_task_is_named(tmp_path, content, message):
    (tmp_path / "FOMC").mkdir()
    (tmp_path / "FOMC" / "train.json").write_text(content)
    with pytest.raises(ValueError, match=r"FOMC/train\.json") as error:
        read_task(tmp_path, "FOMC", "train")
    assert message in str(error.value)


@pytest.mark.parametrize("recipe", sorted(Path("recipes").glob("*/trace.yaml")), ids=str)
def test_a_recipe_has_a_metric_for_each_task_and_the_papers_epochs(recipe, tmp_path, tiny, tasks):
    content = yaml.safe_load(recipe.read_text())
    for folder in (*content["tasks"], "Lima"):
        shutil.copytree(tasks / "Swap", tmp_path / folder)
    words = ["--config", str(recipe), "recipes/methods/hft.yaml", "--trace_dir", str(tmp_path), "--strategy", "replay"]
    plan, _ = parse_sequence([*words, "--model_name_or_path", str(tiny)])
    rounds = SequenceData(plan).rounds(plan)
    assert [len(runs) for runs in rounds] == [1 + ("alignment" in content), *([2] * (len(rounds) - 1))]
    if "llama2" in str(recipe):
        assert plan.config(rounds[0][0].flags).run.global_batch_size == 128
        assert [runs[0].flags["num_train_epochs"] for runs in rounds] == [5, 3, 7, 5, 3, 5, 5, 7]


def test_the_commands_of_the_papers_rows_leave_the_folders_that_their_scores_are_read_from():
    checked = 0
    for run, (_, made) in read_runs().items():
        target, *words = shlex.split(made[-1])[1:]
        if not target.startswith("trace-"):
            continue
        given = dict(word.split("=", 1) for word in words)
        files = [f"recipes/{given['MODEL']}/trace.yaml", f"recipes/methods/{target.removeprefix('trace-')}.yaml"]
        flags = ["--strategy", given["STRATEGY"], *shlex.split(given.get("ARGS", ""))]
        plan, _ = parse_sequence(["--config", *files, *flags])
        assert str(plan.out) == f"runs/{run}"
        checked += 1
    assert checked > 15
