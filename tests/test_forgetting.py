"""What `make forgetting` measures, compares and resumes; the cells themselves are the bench's."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "forgetting"))

import page
import run
import yaml
from measure import Row, distance, measure

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
    found = measure(model, {"answer": rows, "choice": choices}, other)
    assert found["answer.right"] == [1, 1, 0]
    assert found["choice.right"] == [1, 0]
    for row, loss, kl in zip(rows, found["answer.loss"], found["answer.kl"], strict=True):
        ids = torch.tensor([row.ids])
        labels = ids.masked_fill(torch.arange(len(row.ids)) < row.begins, -100)
        assert loss == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-4)
        p, q = (m(ids).logits[0, row.begins - 1 : -1].log_softmax(-1) for m in (other, model))
        assert kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert distance(model, model)["all"] == 0 < distance(other, model)["all"] < 0.2


def test_at_equal_learning_curves_are_compared_where_both_have_learned_as_much():
    def curve(*points):
        return {rate: {0: {"new.right": learned, "kept": kept}} for rate, (learned, kept) in enumerate(points)}

    fft = curve((20, 100), (80, 40), (60, 0))  # the last rate is too high
    assert page.at_equal_learning(curve((10, 100), (50, 90)), fft, 0, "new.right", "kept") == pytest.approx(90 - 70)
    assert page.at_equal_learning(fft, fft, 0, "new.right", "kept") == 0
    assert page.at_equal_learning(fft, fft, 1, "new.right", "kept") is None
    assert page.interval([1.0, 2.0, 3.0]) == ("+2.00 [-0.48, +4.48]", "not told apart")
    assert page.interval([-2.0, -2.1, -1.9])[1] == "less"


def test_whole_seeds_come_first_and_every_arm_is_one_of_hfts_methods():
    todo = list(dict.fromkeys(run.cells(MINI, quick=False)))
    arms = 16 * 5
    assert {cell.seed for cell in todo[:arms]} == {0}
    assert len({cell.name for cell in todo}) == len(todo) == 5 * arms + 2 * MINI["halves"]["count"] - 2
    assert {cell.arm for cell in run.cells(MINI, quick=True)} == {"fft", "hft", "bottom"}
    for arm in MINI["arms"].values():
        assert all((run.HERE.parents[1] / "recipes" / "methods" / f"{name}.yaml").exists() for name in arm["method"])


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
