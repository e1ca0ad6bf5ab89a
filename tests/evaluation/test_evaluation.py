"""Scores: known answers, lm-eval's own tasks on the same rows, and what plain torch computes."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft.cli import main
from hft.errors import HFTError
from hft.evaluation import evaluate as module
from hft.evaluation.evaluate import Settings, evaluate, suites_of
from hft.evaluation.rows import answer_rows, held_out_rows
from hft.evaluation.subject import folder_of, subject_of
from hft.evaluation.suites import SUITES
from hft.evaluation.tasks.quick import facts
from hft.jsonl import read_jsonl
from hft.record.scores import rows_of, scores_of
from tests.conftest import error_of, finished_run, tensors, write_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, data) -> Path:
    """A finished run, scored on the quick suite."""
    out = finished_run("sft", tmp_path_factory.mktemp("run"), model=tiny, data=data)
    assert main(["eval", str(out), "--limit", "6"]) == 0
    return out


def test_quick_saves_every_score_with_what_it_depends_on(run, tiny):
    scores = scores_of(run)["quick"]
    assert {(score.task, score.metric) for score in scores.scores} >= {
        ("facts", "acc_centered"),
        ("facts_capitals", "acc"),
        ("drift", "loss"),
        ("task", "loss"),
        ("kl", "kl"),
    }
    assert all(score.stderr is not None and score.n == (18 if score.task == "facts" else 6) for score in scores.scores)
    assert scores.find("facts", "choice_loss").higher_is_better is False
    assert {path.name.split("-")[0] for path in (run / "scores/quick").iterdir()} == {"facts", "drift", "task", "kl"}
    about = scores.of("kl")
    assert about.dtype == "float32"
    assert about.settings["limit"] == 6
    assert set(about.versions) == {"lm_eval", "torch", "transformers", "datasets", "hft"}
    assert {"weights", "config", "tokenizer", "chat_template"} <= set(about.inputs["model"])
    assert about.inputs["kl_base"]["model"]["weights"] != about.model_sha256 == about.inputs["model"]["weights"]


def test_losses_and_kl_are_what_torch_computes_on_the_ids_that_were_trained(run, tiny):
    tokenizer = AutoTokenizer.from_pretrained(run)
    tuned, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (run, tiny))
    losses, divergences = [], []
    for row in held_out_rows(run)[:6]:
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        mask = encoded["assistant_masks"][0, 1:].bool()
        with torch.no_grad():
            q, p = (model(encoded["input_ids"]).logits[0, :-1][mask].log_softmax(-1) for model in (tuned, base))
        losses.append(-q.gather(1, encoded["input_ids"][0, 1:][mask, None]).mean().item())
        divergences.append((p.exp() * (p - q)).sum(-1).mean().item())
    scores = scores_of(run)["quick"]
    assert rows_of(run, "quick", "task")["loss"].tolist() == pytest.approx(losses, rel=1e-5)
    assert rows_of(run, "quick", "kl")["kl"].tolist() == pytest.approx(divergences, rel=1e-3)
    assert scores.find("task").value == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert scores.find("kl").value == pytest.approx(sum(divergences) / 6, rel=1e-3)
    assert scores.find("kl").value > 0


def test_an_answer_ends_with_its_end_token(run):
    tokenizer = AutoTokenizer.from_pretrained(run)
    rows = held_out_rows(run)[:3]
    made = answer_rows(rows, tokenizer)
    assert made[0]["context"].endswith("<|assistant|>\n")
    assert made[0]["answer"] == rows[0]["messages"][-1]["content"].strip() + "</s>"
    tokenizer.chat_template = tokenizer.chat_template.replace("+ eos_token", "+ eos_token + '\\n'")
    assert answer_rows(rows, tokenizer) == made


def test_rows_add_up_to_the_score_and_pair_with_those_of_another_model(run, tiny, tmp_path):
    facts = rows_of(run, "quick", "facts")
    assert list(facts.columns) == ["row", "task", "acc", "acc_centered", "choice_loss", "answer"]
    scores = scores_of(run)["quick"]
    for metric in ("acc", "acc_centered", "choice_loss"):
        assert facts[metric].mean() == pytest.approx(scores.find("facts", metric).value)
    assert len(rows_of(run, "quick", "facts_capitals")) == 6
    assert facts["row"].is_unique
    settings = Settings(limit=6, tasks=["facts", "task"], task_data=str(run))
    evaluate(str(tiny), "quick", settings, tmp_path)
    for task in ("facts", "task"):
        assert rows_of(tmp_path, "quick", task)["row"].tolist() == rows_of(run, "quick", task)["row"].tolist()
    evaluate(str(tiny), "quick", Settings(limit=2, tasks=["facts"], log_samples=False), tmp_path)
    assert len(rows_of(tmp_path, "quick", "facts")) == 18  # the fuller one
    assert rows_of(tmp_path, "quick", "drift") is None


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "scores/quick").iterdir()}


def test_what_is_scored_is_not_asked_again_until_what_it_depends_on_changes(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    before, asked = contents(copy), []
    run_tasks = module._run_tasks
    monkeypatch.setattr(module, "_run_tasks", lambda b, *more: asked.append(b.name) or run_tasks(b, *more))
    assert main(["eval", str(copy), "--limit", "6"]) == 0
    assert main(["eval", str(copy), "--limit", "6", "--tasks", "facts"]) == 0
    assert (contents(copy), asked) == (before, [])
    assert main(["eval", str(copy), "--limit", "2", "--tasks", "drift", "facts"]) == 0  # deletes nothing
    assert asked == ["drift", "facts"]
    assert before.items() < contents(copy).items()
    assert scores_of(copy)["quick"].find("facts").n == 18

    def change(file: str, old: str, new: str) -> None:
        text = (copy / file).read_text()
        assert old in text
        (copy / file).write_text(text.replace(old, new))

    change("config.json", '"rope_theta": 10000', '"rope_theta": 20000')
    asked.clear()
    assert main(["eval", str(copy), "--limit", "6"]) == 0
    assert asked == ["facts", "drift", "task", "kl"]
    change("chat_template.jinja", "<|assistant|>", "<|model|>")
    asked.clear()
    assert main(["eval", str(copy), "--limit", "6", "--tasks", "drift", "kl"]) == 0
    assert asked == ["drift", "kl"]
    assert len(contents(copy)) == len(before) + 4  # those with --limit 2


class Says(LM):
    """A model that answers every prompt alike, or as a function says, and likes every choice alike."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer if callable(answer) else lambda prompt: answer
        self.prompts = []

    def generate_until(self, requests):
        self.prompts += [request.args[0] for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests):
        return [(float(self.answer(request.args[0]) == request.args[1].strip()), True) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


@pytest.fixture
def rows_of_ours(tmp_path) -> Path:
    """One folder with rows of the benchmarks in the documented forms."""
    questions = [("Who wrote Faust", ["Goethe"]), ("Where is ETH", ["Zürich", "Zurich"]), ("How many", ["1,234"])]
    closed = [{"question": question, "answers": answers} for question, answers in questions]
    for name in ("triviaqa", "nq_open", "hotpotqa"):
        write_jsonl(tmp_path / f"{name}.jsonl", closed)
    write_jsonl(
        tmp_path / "humaneval.jsonl",
        [
            {
                "task_id": "0",
                "prompt": "def one():\n",
                "entry_point": "one",
                "canonical_solution": "    return 1\n",
                "test": "def check(f):\n    assert f() == 1\n",
            }
        ],
    )
    return tmp_path


def _mmlu(subject: str, answer: int | str) -> dict:
    return {"question": "Which?", "choices": ["p", "q", "r", "s"], "answer": answer, "subject": subject}


def score_of(task: str, suite: str, answer, tiny, rows, monkeypatch, **settings):
    model = Says(answer)
    monkeypatch.setattr("hft.evaluation.engine.open_lm", lambda *_: model)
    settings = Settings(tasks=(task,), data=str(rows), chat=False, allow_code=True, **settings)
    return evaluate(str(tiny), suite, settings).find(task), model


@pytest.mark.parametrize("task", ["triviaqa", "nq_open", "hotpotqa"])
def test_closed_book_answers(task, tiny, rows_of_ours, monkeypatch):
    score, _ = score_of(task, "knowledge", " goethe", tiny, rows_of_ours, monkeypatch)  # leading space and case
    assert (score.value, score.n) == (pytest.approx(100 / 3), 3)
    if task == "triviaqa":
        for answer, correct in (("Zurich", 1), ("1234", 1), ("Bach", 0), ("", 0)):  # an alias, without the comma
            score, _ = score_of(task, "knowledge", answer, tiny, rows_of_ours, monkeypatch)
            assert score.value == pytest.approx(100 * correct / 3)


def test_a_failed_generation_is_an_error_and_never_a_zero(tiny, rows_of_ours, monkeypatch):
    def fail(prompt):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        score_of("triviaqa", "knowledge", fail, tiny, rows_of_ours, monkeypatch)


@pytest.mark.slow
def test_requests_scores_and_errors_equal_those_of_lm_evals_command(tiny, tmp_path, monkeypatch):
    """On 50 rows of each task that is lm-eval's own; ours read other files."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    closed = [{"question": f"Which city is number {i}", "answers": [f"{i}", "Bern"]} for i in range(50)]
    follow = {"instruction_id_list": ["punctuation:no_comma", "detectable_format:json_format"], "kwargs": [{}, {}]}
    instructions = [{"key": i, "prompt": f"Write {i} as JSON.", **follow} for i in range(50)]
    rows = {  # by benchmark: its suite, the split, rows as we document them and as lm-eval's dataset has them
        "triviaqa": ("knowledge", "validation", closed, [r | {"answer": {"aliases": r["answers"]}} for r in closed]),
        "nq_open": ("knowledge", "validation", closed, [r | {"answer": r["answers"]} for r in closed]),
        "ifeval": ("recent", "train", instructions, instructions),
    }
    for name, (_, split, local, original) in rows.items():
        write_jsonl(ours / f"{name}.jsonl", local)
        files = {"data_files": {split: str(write_jsonl(theirs / f"{name}.jsonl", original))}}
        (source,) = (Path(lm_eval.__file__).parent / "tasks" / name).glob("*.yaml")
        keys = {"include": str(source), "task": f"own_{name}", "dataset_path": "json", "dataset_name": None}
        keys |= {"dataset_kwargs": files, "training_split": None, "num_fewshot": 0}
        (theirs / f"{name}.yaml").write_text(yaml.safe_dump(keys))
    out, tasks = tmp_path / "out", [f"own_{name}" for name in rows]
    words = ["--model", "hf", "--model_args", f"pretrained={tiny},dtype=float32", "--device", "cpu", "--log_samples"]
    words += ["--tasks", ",".join(tasks), "--include_path", theirs, "--output_path", out, "--batch_size", "4"]
    subprocess.run([sys.executable, "-m", "lm_eval", "run", *words, "--gen_kwargs", "max_gen_toks=8"], check=True)
    (path,) = out.rglob("results_*.json")
    results, asked = json.loads(path.read_text())["results"], []
    generate = HFLM.generate_until
    monkeypatch.setattr(
        HFLM, "generate_until", lambda lm, all_: asked.extend(r.args for r in all_) or generate(lm, all_)
    )
    for name, (suite, *_) in rows.items():
        asked.clear()
        scores = evaluate(str(tiny), suite, Settings(tasks=(name,), data=str(ours), chat=False, max_gen_toks=8))
        (path,) = out.rglob(f"samples_own_{name}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        assert [prompt for prompt, _ in asked] == [sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples]
        assert [kwargs for _, kwargs in asked] == [sample["arguments"]["gen_args_0"]["arg_1"] for sample in samples]
        (benchmark,) = (one for one in SUITES[suite] if one.name == name)
        for metric, key in benchmark.metrics.items():
            score, error = scores.find(name, metric), results[f"own_{name}"][key.replace(",", "_stderr,")]
            assert score.n == len(samples) == 50
            assert score.value == pytest.approx(100 * results[f"own_{name}"][key])
            assert score.stderr == (None if error == "N/A" else pytest.approx(100 * error))


def test_facts_are_questions_with_one_right_answer_among_eight():
    for make in (facts.capitals, facts.currencies, facts.elements):
        rows = list(make()["test"])
        assert rows == list(make()["test"])
        assert len(rows) > 100
        assert all(len(set(row["choices"])) == 8 for row in rows)
        labels = [row["label"] for row in rows]
        assert max(labels.count(label) for label in range(8)) < 0.25 * len(rows)
    right = {row["prompt"]: row["choices"][row["label"]] for row in rows}
    assert right["The chemical symbol of gold is"] == "Au"
    right = {row["prompt"]: row["choices"][row["label"]] for row in facts.capitals()["test"]}
    assert right["The capital of France is"] == "Paris"


def test_code_runs_only_when_allowed(tiny, rows_of_ours, capsys, monkeypatch):
    monkeypatch.setattr("hft.evaluation.engine.open_lm", lambda *_: pytest.fail("nothing to ask"))
    assert main(["eval", str(tiny), "--suite", "general", "--tasks", "humaneval", "--data", str(rows_of_ours)]) == 0
    assert "humaneval is skipped: it runs generated code, which needs --allow_code" in capsys.readouterr().out


def test_another_backend_gets_the_model_and_its_own_arguments(tiny, rows_of_ours, monkeypatch):
    got = {}

    class Engine(Says):
        def __init__(self, **arguments):
            super().__init__("Goethe")
            got.update(arguments)

    monkeypatch.setattr("lm_eval.api.registry.get_model", {"vllm": Engine}.get)
    words = ["--suite", "knowledge", "--tasks", "nq_open", "--data", str(rows_of_ours), "--chat", "false"]
    assert main(["eval", str(tiny), *words, "--backend", "vllm", "--backend_args", '{"tensor_parallel_size": 2}']) == 0
    assert got["pretrained"] == str(tiny)
    assert got["tensor_parallel_size"] == 2
    assert scores_of(tiny)["knowledge"].of("nq_open").settings["backend"] == "vllm"
    monkeypatch.setattr("lm_eval.api.registry.get_model", lambda _: pytest.fail("the model was opened again"))
    assert main(["eval", str(tiny), *words, "--backend", "vllm", "--backend_args", '{"tensor_parallel_size": 2}']) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["none"], "none is neither a folder nor found on the Hub"),
        (
            ["TINY", "--suite", "quick", "--tasks", "gsm8k"],
            "suite quick has no gsm8k, only facts, drift, task, kl; without --suite ",
        ),
        (["TINY", "--tasks", "arc_eazy"], "lm-eval has no task 'arc_eazy', did you mean 'arc_easy'?"),
        (["TINY", "--tasks", "mine.yaml"], "task file mine.yaml does not exist"),
        (["TINY", "--tasks", "facts", "--data", "test"], "data test does not exist, did you mean 'tests'?"),
        (["TINY", "--tasks", "task", "--task_data", "nope"], "task_data nope does not exist"),
        (["TINY", "--limit", "0"], "limit: expected a number greater than 0, got '0'"),
        (
            ["TINY", "--suite", "knowledge", "--tasks", "triviaqa", "--data", "BAD"],
            "triviaqa.jsonl is not JSON Lines: line 2: ",
        ),
        (
            ["TINY", "--tasks", "nq_open", "--data", "BAD"],
            "nq_open.jsonl, row 0 (the first is 0), question: Field required",
        ),
        (["TINY", "--tasks", "hellaswag", "--data", "BAD"], "row 1 (the first is 0), label: Field required"),
        (
            ["TINY", "--tasks", "mmlu_0shot", "--data", "BAD"],
            "row 0 (the first is 0), answer: Input should be a valid integer",
        ),
        (["NAN"], "of its tensors hold NaN or infinity, model.norm.weight first"),
        (["EMPTY"], "holds no weights: neither"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, tiny, tmp_path, capsys):
    (tmp_path / "triviaqa.jsonl").write_text('{"question": "q"}\n{broken\n')
    (tmp_path / "nq_open.jsonl").write_text(json.dumps({"q": 1}) + "\n")
    choices = {"query": "q", "choices": ["a", "b", "c", "d"]}
    write_jsonl(tmp_path / "hellaswag.jsonl", [choices | {"label": 0}, choices])
    for file in ("mmlu_test", "mmlu_dev"):
        write_jsonl(tmp_path / f"{file}.jsonl", [_mmlu("anatomy", "E")])
    (tmp_path / "empty").mkdir()
    names = {"TINY": str(tiny), "BAD": str(tmp_path), "EMPTY": str(tmp_path / "empty"), "NAN": str(tmp_path / "nan")}
    if "NAN" in words:
        shutil.copytree(tiny, tmp_path / "nan", ignore=shutil.ignore_patterns("scores"))
        weights = tensors(tiny)
        weights["model.norm.weight"][0] = float("nan")
        save_file(weights, tmp_path / "nan/model.safetensors", {"format": "pt"})
    assert main(["eval", *(names.get(word, word) for word in words)]) == 2
    assert sentence in error_of(capsys)


TASK = """
task: own_sums
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{sum}} ="
doc_to_choice: "{{options}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def test_a_task_of_ones_own_is_scored_from_its_file_and_again_when_its_rows_change(
    tiny, tmp_path, capsys, caplog, monkeypatch
):
    rows = [{"sum": f"{n}+1", "options": [str(n + 1), str(n)], "label": 0} for n in range(4)]
    task = tmp_path / "sums.yaml"
    task.write_text(TASK.replace("ROWS", str(write_jsonl(tmp_path / "rows.jsonl", rows))))
    out = shutil.copytree(tiny, tmp_path / "tiny", ignore=shutil.ignore_patterns("scores"))
    monkeypatch.setattr("hft.evaluation.engine.open_lm", lambda *_: Says(lambda prompt: prompt.removesuffix("+1 =")))
    assert main(["eval", str(out), "--tasks", f"{task}", "facts", "--chat", "false", "--limit", "3"]) == 0
    assert (scores_of(out)["lm_eval"].find("sums", "acc").value, scores_of(out)["quick"].find("facts").n) == (0, 9)
    assert rows_of(out, "lm_eval", "sums")["answer"].tolist() == ["0", "1", "2"]
    assert "acc is defined, but aggregation is not" in caplog.text  # lm-eval's own warning
    assert "Custom kwargs" not in caplog.text
    words = ["eval", str(out), "--chat", "false", "--limit", "3", "--tasks"]
    write_jsonl(tmp_path / "rows.jsonl", [row | {"label": 1} for row in rows])
    assert main([*words, str(task), f"{task}:acc_norm"]) == 0
    found = [(score.task, score.metric, score.value) for score in scores_of(out)["lm_eval"].scores]
    assert sorted(found) == [("sums", "acc", 100), ("sums", "acc_norm", 100), ("sums:acc_norm", "acc_norm", 100)]
    task.write_text(task.read_text().replace("doc_to_target: label", "doc_to_target: 0"))
    assert main([*words, str(task)]) == 0
    assert scores_of(out)["lm_eval"].find("sums", "acc").value == 0
    assert main([*words, f"{task}:f1"]) == 2
    assert "own_sums has no metric f1, only acc,none, acc_norm,none" in error_of(capsys)
    group = tmp_path / "both.yaml"
    group.write_text("group: both\ntask: [own_sums, other_sums]\n")
    perplexity = (
        "output_type: loglikelihood\ndoc_to_target: is {{options[label]}}\nmetric_list: [{metric: perplexity}]\n"
    )
    (tmp_path / "other.yaml").write_text(f"include: sums.yaml\ntask: other_sums\n{perplexity}")
    assert main([*words, str(group)]) == 0  # a group without a score of its own: those of its tasks
    found = {score.task: score for score in scores_of(out)["lm_eval"].scores}
    assert (found["own_sums"].unit, found["other_sums"].unit, found["other_sums"].higher_is_better) == ("%", "", False)
    assert rows_of(out, "lm_eval", "both")["task"].tolist() == ["own_sums"] * 3 + ["other_sums"] * 3


def test_two_commands_at_once_keep_each_others_scores(tiny, tmp_path, monkeypatch):
    def answer(prompt):  # while one scores, another one starts and ends
        if not (tmp_path / "scores/quick").exists():
            evaluate(str(tiny), "quick", Settings(tasks=["drift"], limit=1), tmp_path)
        return ""

    opened = iter([Says(answer), HFLM(pretrained=str(tiny), dtype="float32", device="cpu")])
    monkeypatch.setattr("hft.evaluation.engine.open_lm", lambda *_: next(opened))
    evaluate(str(tiny), "quick", Settings(tasks=["facts"], limit=1), tmp_path)
    assert {score.task for score in scores_of(tmp_path)["quick"].scores} >= {"facts", "drift"}


def test_an_adapter_depends_on_its_base_too(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base", ignore=shutil.ignore_patterns("scores"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    before = subject_of(str(adapter), str(base))
    save_file({name: tensor + 1 for name, tensor in tensors(base).items()}, base / "model.safetensors")
    after = subject_of(str(adapter), str(base))
    assert before.inputs["model"] == after.inputs["model"]
    assert before.inputs["base"] != after.inputs["base"]


def test_prompts_that_do_not_fit_are_counted(tiny, rows_of_ours, tmp_path, capsys):
    long = {"question": "word " * 3000, "answers": ["x"]}
    write_jsonl(rows_of_ours / "nq_open.jsonl", [long, {"question": "q", "answers": ["x"]}])
    settings = Settings(tasks=["nq_open"], data=str(rows_of_ours), max_gen_toks=4, backend_args={"max_length": 512})
    evaluate(str(tiny), "knowledge", settings, tmp_path / "out")
    assert "nq_open: 1 of 2 prompts were longer than the context" in capsys.readouterr().out
    assert scores_of(tmp_path / "out")["knowledge"].of("nq_open").truncated == {"nq_open": 1}


def test_a_model_without_weights_is_skipped_and_the_others_are_scored(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hft.evaluation.engine.open_lm", lambda *_: Says(""))
    (tmp_path / "unfinished").mkdir()
    folders = [shutil.copytree(tiny, tmp_path / name, ignore=shutil.ignore_patterns("scores")) for name in "ac"]
    models = [str(folders[0]), str(tmp_path / "unfinished"), str(folders[1])]
    assert main(["eval", *models, "--tasks", "facts", "--limit", "2"]) == 1
    assert f"not scored: {models[1]}" in capsys.readouterr().out
    assert all(scores_of(folder)["quick"].find("facts") for folder in folders)


def test_a_model_of_the_hub_has_a_folder_that_no_run_is_called(tiny):
    assert folder_of("acme/hft") == Path("runs/models--acme--hft") != folder_of("other/hft")
    assert folder_of(str(tiny)) == tiny


def test_a_rendered_prompt_gets_no_second_bos(tiny, tmp_path):
    """A template that writes no BOS, on a tokenizer that adds one: trained ids have none."""
    folder = shutil.copytree(tiny, tmp_path / "tiny", ignore=shutil.ignore_patterns("scores"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    rows = write_jsonl(tmp_path / "gsm8k_test.jsonl", [{"question": "6*7?", "answer": "#### 42"}]).parent
    tokenizer, seen = AutoTokenizer.from_pretrained(folder), []
    adds = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds
    tokenizer.save_pretrained(folder)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id

    class Sees(HFLM):
        def generate_until(self, requests, **_):
            seen.append(self.tok_encode(requests[0].args[0]))
            return [""] * len(requests)

    [known] = [benchmark for benchmark in SUITES["general"] if benchmark.name == "gsm8k"]
    for chat, rendered in ((True, False), (False, True), (False, False)):
        lm = Sees(pretrained=str(folder), dtype="float32", device="cpu")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hft.evaluation.engine.open_lm", lambda *_, lm=lm: lm)
            benchmarks = [replace(known, rendered=rendered)]
            evaluate(str(folder), "general", Settings(data=str(rows), chat=chat), benchmarks=benchmarks)
    assert [ids[0] == tokenizer.bos_token_id for ids in seen] == [False, False, True]


def test_alpaca_writes_answers_for_the_judge_and_reads_its_leaderboard(run, tmp_path, capsys):
    data = write_jsonl(tmp_path / "alpaca_eval.jsonl", [{"instruction": "Say hi", "dataset": "d"}] * 3).parent
    words = ["eval", str(run), "--suite", "alpaca", "--data", str(data), "--max_gen_toks", "4"]
    assert main([*words, "--limit", "1"]) == main(words) == 0
    command = next(line for line in capsys.readouterr().out.splitlines()[::-1] if "alpaca_eval --model_outputs" in line)
    outputs = Path(command.split()[3])
    answers = json.loads(outputs.read_text())
    assert [sorted(answer) for answer in answers] == [["dataset", "generator", "instruction", "output"]] * 3
    board = outputs.parent / command.split()[-1] / "leaderboard.csv"  # as alpaca-eval 0.6.6 writes it
    board.parent.mkdir()
    columns = "win_rate,standard_error,n_wins,n_wins_base,n_draws,n_total,discrete_win_rate,mode,avg_length"
    row = f"{answers[0]['generator']},5.5,0.7,40,760,5,805,5.3,community,900,6.25,0.4"
    board.write_text(
        f",{columns},length_controlled_winrate,lc_standard_error\ngpt4_turbo,50,0,0,0,805,805,50,minimal,2049,50,0\n{row}\n"
    )
    assert main(words) == 0
    scores = scores_of(run)["alpaca"]
    found = {score.metric: (score.value, score.stderr, score.n) for score in scores.scores}
    assert found == {"length_controlled_winrate": (6.25, 0.4, 805), "win_rate": (5.5, 0.7, 805)}
    board.write_text(f",{columns}\n")
    assert main(words) == 2
    assert "leaderboard.csv has no scores of" in error_of(capsys)


def test_a_base_and_its_run_answer_side_by_side(run, tiny, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["generate", str(run), "--max_new_tokens", "6"]) == 0
    text = capsys.readouterr().out
    names = next(line for line in text.splitlines() if " | " in line)
    assert [name.strip()[-9:] for name in names.split(" | ")] == [str(tiny)[-9:], str(run)[-9:], "eference)"]
    saved = read_jsonl(run / "scores/answers.jsonl")
    assert [row["reference"] for row in saved] == [row["messages"][-1]["content"] for row in held_out_rows(run)[:3]]
    # What the models themselves say, one prompt at a time and without padding.
    tokenizer = AutoTokenizer.from_pretrained(run)
    for name, folder in (("answer", run), ("base_answer", tiny)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for row in saved:
            chat = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
            made = model.generate(**chat, max_new_tokens=6, do_sample=False)[0, chat["input_ids"].shape[1] :]
            assert row[name] == tokenizer.decode(made, skip_special_tokens=True).strip()
    assert main(["generate", str(run), "--prompt", "Hi", "Who?", "--base", "false", "--max_new_tokens", "3"]) == 0
    assert [row["base_answer"] for row in read_jsonl(run / "scores/answers.jsonl")] == [None, None]
    assert main(["generate", str(tiny)]) == 2
    assert "say what to ask with --prompt" in error_of(capsys)
    assert main(["generate", str(run), "--prompt", "Hi", "--max_new_tokens", "99999"]) == 2
    assert "cannot answer: Invalid configuration: requested max tokens to generate (99999)" in error_of(capsys)


@pytest.mark.parametrize("flag", ["dtype=float99", "rows=0", "rows=-1", "max_new_tokens=0"])
def test_what_cannot_be_generated_with_is_one_sentence(flag, tiny, capsys):
    assert main(["generate", str(tiny), f"--{flag}"]) == 2
    assert f"hft: {flag.partition('=')[0]}: expected " in error_of(capsys)


def test_tasks_are_separated_by_blanks_or_commas_and_find_their_suites():
    found = suites_of(["facts,drift", "arc_easy,", "winogrande:acc"])
    assert found == {"quick": ["facts", "drift"], module.LM_EVAL: ["arc_easy", "winogrande:acc"]}
    assert suites_of(["facts", "drift,kl"], "quick") == {"quick": ["facts", "drift", "kl"]}
    assert suites_of([]) == {"quick": []}
    with pytest.raises(HFTError, match="lm-eval has no task 'arc_eazy', did you mean 'arc_easy'"):
        suites_of(["facts", "arc_eazy"])  # before facts are scored
