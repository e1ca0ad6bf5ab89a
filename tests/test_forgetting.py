"""What `make forgetting` measures, compares and resumes; the cells themselves are the bench's."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hft
from hft.evaluation.rows import general_texts
from hft.jsonl import write_jsonl

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "forgetting"))

import page
import rounds
import run
import smollm2
import yaml
from measure import Row, before, between, distance, measure, preferences

MINI = yaml.safe_load((run.HERE / "mini.yaml").read_text())


def test_measures_are_those_of_the_models_own_loss_and_of_greedy_decoding(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
    answers = [
        model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0].tolist()
        for ids in prompts
    ]
    wrong = [*answers[0][:-1], (answers[0][-1] + 1) % 100]
    rows = [Row(ids, len(ids) - 4) for ids in (*answers, wrong)]
    choices = [Row(answers[0], 3, [[5, 6, 7, 20, 21, 22, 23]]), Row([5, 6, 7, 20, 21, 22, 23], 3, [answers[0]])]
    found = measure(model, {"answer": rows, "choice": choices}, {"answer": before(other, rows)})
    assert found["answer.right"] == [1, 1, 0]
    assert found["choice.right"] == [1, 0]
    for row, loss, kl in zip(rows, found["answer.loss"], found["answer.kl"], strict=True):
        ids = torch.tensor([row.ids])
        labels = ids.masked_fill(torch.arange(len(row.ids)) < row.begins, -100)
        assert loss == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-4)
        p, q = (m(ids).logits[0, row.begins - 1 : -1].log_softmax(-1) for m in (other, model))
        assert kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert distance(model, model)["all"] == 0 < distance(other, model)["all"] < 0.2


def test_rows_on_real_text_are_an_answer_a_text_and_candidates(tiny, tmp_path):
    problem = [{"role": "user", "content": "Add two and three."}, {"role": "assistant", "content": "It is five."}]
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "tests.jsonl", [{"messages": problem}])
    content = {"limit": 1, "train": {"chat_template_path": "smollm2.jinja"}}
    rows, examples = smollm2.probes(content, tiny, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    answer, text, *facts = [row for its in rows.values() for row in its]
    assert tokenizer.decode(answer.ids[answer.begins :]).startswith("It is five.")
    assert "two and three" in tokenizer.decode(answer.ids[: answer.begins])
    assert tokenizer.decode(text.ids[text.begins :]) == general_texts()[0]
    assert text.begins == 1
    assert [len(fact.others) for fact in facts] == [7, 7, 7]
    assert examples == []


def test_a_pair_on_real_text_differs_in_one_digit(tiny, tmp_path):
    question, answer = {"role": "user", "content": "12 and 30?"}, {"role": "assistant", "content": "12 + 30 = 42"}
    rows = [smollm2.preference({"messages": [question, answer]}, seed) for seed in range(30)]
    for row in rows:
        right, wrong = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert right == answer["content"]
        assert [(a.isdigit(), b.isdigit()) for a, b in zip(right, wrong, strict=True) if a != b] == [(True, True)]
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "tests-pairs.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    pairs = smollm2.pairs({"train": {"chat_template_path": "smollm2.jinja"}}, tiny, tmp_path)
    for row, pair in zip(rows, pairs, strict=True):
        assert pair.others[0][: pair.begins] == pair.ids[: pair.begins]
        texts = [tokenizer.decode(ids[pair.begins :]) for ids in (pair.ids, *pair.others)]
        assert [text.split("<")[0] for text in texts] == [row[of][0]["content"] for of in ("chosen", "rejected")]


def test_a_pair_is_right_where_the_chosen_answer_became_likelier_than_the_rejected_one(tiny):
    start, model = (AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        model.get_output_embeddings().weight[5] *= 1.5
    pairs = [Row([9, 8, 5, 7], 2, [[9, 8, 6, 7, 7]]), Row([9, 8, 6, 7, 7], 2, [[9, 8, 5, 7]])]
    found = preferences(model, pairs, before(start, pairs))

    def gain(ids):
        p, q = (m(torch.tensor([ids])).logits[0, 1:-1].log_softmax(-1) for m in (start, model))
        return (q - p).gather(1, torch.tensor(ids[2:])[:, None]).sum().item()

    margin = gain(pairs[0].ids) - gain(pairs[1].ids)
    assert found["pairs.margin"] == pytest.approx([margin, -margin], abs=1e-4)
    assert found["pairs.right"] == [float(margin > 0), float(margin < 0)]
    assert min(found["pairs.kl"]) > 0
    assert preferences(start, pairs, before(start, pairs))["pairs.right"] == [0.5, 0.5]


def test_a_model_part_of_the_way_is_the_start_model_plus_that_part_of_the_change(tiny):
    start, model = (AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert distance(between(start, model, 0.3), start)["all"] == pytest.approx(0.3 * distance(model, start)["all"])
    assert distance(between(start, model, 1.0), model)["all"] == 0


def rates_of(points, seeds=(0, 1), rows=400):
    """An arm whose first rows are right, by rate (learned %, kept %)."""

    def right(percent):
        return [float(n < percent / 100 * rows) for n in range(rows)]

    def cell(learned, kept):
        rows = {
            "new.right": right(learned),
            "new.loss": [1 - one for one in right(learned)],
            "facts.right": right(kept),
        }
        return {"rows": rows, "distance": {"all": 0.1}}

    return {rate: {seed: cell(*point) for seed in seeds} for rate, point in points.items()}


FFT = rates_of({1e-4: (20, 100), 1e-3: (80, 40), 1e-2: (60, 0)})  # the last rate is too high


def test_arms_are_compared_at_the_highest_amount_that_both_have_learned():
    its, seeds = page.curves((FFT, rates_of({1e-4: (10, 100), 1e-3: (50, 90)}, seeds=(1, 2))), "new.right", "kept")
    assert seeds == [1]
    assert page.kept_at(its[0].mean_points, 50) == 70
    assert page.kept_at(its[0].mean_points, 85) != page.kept_at(its[0].mean_points, 85)  # nan: it never learns that
    level, more = page.at_the_most(*its, 5)
    assert 20 <= level <= 50  # draws of the rows differ in what they learn
    assert more.low <= more.value <= more.high
    assert more.value == pytest.approx(
        page.kept_at(its[1].mean_points, level) - page.kept_at(its[0].mean_points, level)
    )
    assert page.curves((FFT, rates_of({1e-4: (10, 100)}, seeds=(7,))), "new.right", "kept") == ([], [])


def test_hft_as_fft_at_half_the_rate_is_found_out():
    fft = np.array([[20.0, 100.0], [50.0, 70.0], [80.0, 40.0], [60.0, 0.0]])  # at 1, 2, 4, 8
    hft = np.array([[20.0, 100.0], [65.0, 60.0], [75.0, 50.0], [70.0, 0.0]])
    found = page.rate_alike(fft, hft, (np.array([1.0, 2, 4, 8]), np.array([2.0, 4, 8, 16])))
    assert np.exp(found[:2, 0]) == pytest.approx([0.5, 2**1.5 / 4])
    assert found[:3, 1] == pytest.approx([0, 5, 5])
    assert np.isnan(found[3]).all()  # above its best rate


def test_seeds_that_lack_a_rate_and_rates_that_failed_are_left_aside():
    rates = rates_of({1e-4: (20, 100), 1e-3: (80, 40)})
    del rates[1e-3][1]
    assert page.whole(rates) == ([1e-4, 1e-3], [0])


def test_the_page_says_the_verdict_first_and_has_a_picture(tmp_path):
    content = {"learning_rates": [1e-4, 1e-3], "seeds": [0, 1], "arms": {"fft": {}, "hft": {}}}
    todo = list(run.cells(content | {"quick": {}}, quick=False))
    (tmp_path / "cells").mkdir()
    about = {"cell": {"seed": 0}, "commit": "c", "versions": {"torch": "2"}}
    for cell in todo:
        one = rates_of({0: (80, 50) if cell.learning_rate == 1e-3 else (20, 90 + 10 * (cell.arm == "hft"))})[0][0]
        run.save(tmp_path / "cells" / f"{cell.name}.json.gz", one | about)
    run.save(tmp_path / "cells" / "start.json.gz", rates_of({0: (0, 100)})[0][0])
    said = page.write_page(tmp_path, content, todo, tmp_path / "report.md", "make it")
    text = (tmp_path / "report.md").read_text()
    assert said.startswith("At equal learning hft keeps more than fft: hft minus fft is +")
    assert "where both answer 75% of the new rows right" in said
    assert "| hft | 2 | 0.001, at the edge | **+" in text  # bold, since its interval excludes 0
    assert text.index(said) < text.index("report.png") < text.index("## Does hft act like fft at a lower rate?")
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_whole_seeds_come_first_and_every_arm_is_one_of_hfts_methods():
    todo = list(dict.fromkeys(run.cells(MINI, quick=False)))
    arms = 12 * 5 + 4 * 6 + 2 * 4
    keep = 5 * len(MINI["keep"]["arms"]) * len(MINI["keep"]["learning_rates"])
    assert {cell.seed for cell in todo[:arms]} == {0}
    assert len({cell.name for cell in todo}) == len(todo) == 5 * arms + 2 * MINI["halves"]["count"] - 2 + keep
    assert {cell.name.rpartition("-")[2] for cell in todo[-keep:]} == {"keep"}
    assert {cell.arm for cell in run.cells(MINI, quick=True)} == {"fft", "hft", "bottom"}
    sizes = {size: run.read_size(size) for size in run.SIZES}
    for arm in (arm for content in sizes.values() for arm in content["arms"].values()):
        assert all((run.HERE.parents[1] / "recipes" / "methods" / f"{name}.yaml").exists() for name in arm["method"])
    assert sizes["mini-long"]["make"] == MINI["make"]
    assert sizes["smollm2-dpo"]["model"] == sizes["smollm2"]["model"]
    assert sizes["mini-long"]["train"] == MINI["train"] | {"max_steps": 800}


def test_a_round_trains_the_half_that_hft_would_draw_for_it(tiny):
    anatomy = hft.anatomy_of(AutoModelForCausalLM.from_pretrained(tiny))
    everything = hft.select(anatomy, policy="all", selection_seed=3)
    for step, number in ((0, 1), (9, 1), (10, 2)):
        half = hft.select(anatomy, selection_seed=3, round=number)
        outside = set(half.trained_parameters) & set(anatomy.outside_layers)
        assert rounds.Rounds(switch_every=10).trained_at(everything, step, 30) == half.trained_units | outside


def test_a_cell_is_claimed_by_one_process_and_kept_whole(tmp_path):
    with run.claimed(tmp_path / "lock") as first, run.claimed(tmp_path / "lock") as second:
        assert (first, second) == (True, False)
    with run.claimed(tmp_path / "lock") as again:
        assert again
    run.save(tmp_path / "cell.json.gz", {"settings": {"a": 1}})
    assert [path.name for path in tmp_path.glob("cell*")] == ["cell.json.gz"]
    run.check_same(run.load(tmp_path / "cell.json.gz"), {"settings": {"a": 1}}, tmp_path)
    with pytest.raises(SystemExit, match="made with other settings"):
        run.check_same(run.load(tmp_path / "cell.json.gz"), {"settings": {"a": 2}}, tmp_path)
