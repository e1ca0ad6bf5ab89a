"""Metrics of answers, and OP and BWT against the paper's own tables."""

import json

import numpy as np
import pytest

from hft.continual import matrix as m
from hft.continual import metrics
from hft.continual.matrix import Matrix
from hft.reporting.paper import tables


@pytest.mark.parametrize("number", range(24, 43))
def test_op_and_bwt_of_the_papers_tables(number):
    rows = {row.label: row.values for row in tables()[str(number)].rows}
    op, bwt = rows.pop("OP"), rows.pop("BWT")[-1]
    scores = list(zip(*rows.values(), strict=True))  # S[t][i]
    last = len(scores) - 1
    assert last == 7
    assert [m.overall_performance(scores, t) for t in range(8)] == pytest.approx(list(op), abs=0.0501)
    assert m.backward_transfer(scores, last) == pytest.approx(bwt, abs=0.0501)
    # SAPT's score.py: forgetting is the best earlier score minus the last, its BWT the mean change over all tasks.
    final, seen = np.array(scores[-1]), np.array(scores, dtype=float)
    best = [seen[i:last, i].max() for i in range(last)]
    assert m.forgetting(scores, last) == pytest.approx(list(best - final[:-1]))
    assert m.backward_transfer(scores, last) == pytest.approx(np.mean(final - np.diag(seen)))


def test_other_forms_of_bwt():
    scores = [[80, None, None], [70, 60, None], [90, 40, 50]]
    assert m.backward_transfer(scores, 2) == pytest.approx((10 - 20) / 3)
    found = Matrix(["A", "B", "C"], ["accuracy"] * 3, ["A", "B", "C"], scores).summary()
    assert found["bwt_earlier_tasks"] == pytest.approx((10 - 20) / 2)
    assert found["bwt_clipped"] == pytest.approx(-20 / 3)
    assert found["forgetting"] == {"A": -10, "B": 20}
    assert Matrix(["A"], ["accuracy"], ["A"], [[80]]).summary()["bwt_earlier_tasks"] is None


def test_a_matrix_is_laid_out_like_table_29_and_reads_back(tmp_path):
    rows = [[10.0, 20.0], [50.0, None], [40.0, 60.04]]
    matrix = Matrix(["A", "B"], ["accuracy", "rouge_l"], ["start", "A", "B"], rows, counts=[5, 6])
    assert matrix.table().split("\n") == [
        "|  | start | A | B |",
        "| --- | --- | --- | --- |",
        "| A | 10.0 | 50.0 | 40.0 |",
        "| B | 20.0 | - | 60.0 |",
        "| OP |  | 50.0 | 50.0 |",
        "| BWT |  | 0.0 | -5.0 |",
    ]
    assert Matrix.load(matrix.save(tmp_path).parent) == matrix
    saved = json.loads((tmp_path / "matrix.json").read_text())
    assert saved["bwt"] == [0, -5]
    assert saved["forgetting"] == {"A": 10}


def test_a_leading_space_counts_in_accuracy_and_not_in_the_first_letter():
    assert metrics.accuracy(" A", "A") == 0 < metrics.accuracy("A", "A")
    assert metrics.first_letter(" A", "A") == 1
    assert metrics.first_letter("B\nBecause plants", "B") == 1
    assert metrics.first_letter("选项C支持", "C.中立") == 1
    assert metrics.first_letter("Because it is B", "B\nA reason") == 1  # the B of Because does not stand alone
    assert metrics.first_letter("AB", "A") == metrics.first_letter("", "A") == 0
    assert metrics.first_character("B. And so on", "B\nA reason") == 1
    assert metrics.first_character(" B", "B") == metrics.first_character("", "") == 0


def test_rouge_takes_any_alphabet_and_any_text():
    from rouge_score.rouge_scorer import RougeScorer

    answer, reference = "The council approved the budget.", "the council has approved next year's budget"
    theirs = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert metrics.rouge_l(answer, reference) == pytest.approx(theirs)
    assert metrics.rouge_l("größe", "GRÖßE") == 1 > metrics.rouge_l("grösse", "größe") == 0
    assert metrics.rouge_l("", "a") == metrics.rouge_l(".", "a") == 0


def test_code_is_compared_with_its_literals_normalized():
    assert metrics.edit_similarity("f ( <STR_LIT> , <NUM_LIT> , '<STR_LIT:utf-8>' )", "f (  , 0 , 'utf-8' )") == 1
    assert metrics.edit_similarity("x = <NUM_LIT:1>", "x = 1") == 1
    assert metrics.edit_similarity("abcd", "abxy") == pytest.approx(0.5)
    assert metrics.edit_similarity("", "<STR_LIT>") == 0


def test_sari_by_hand_and_an_empty_answer_scores_nothing():
    # Words: b is kept and a deleted rightly, c is not added, (1 + 1 + 0) / 3. Pairs: `a b` is deleted rightly, `b c` is
    # not added, and 0 / 0 is 1: (1 + 1 + 0) / 3. There are no longer n-grams: 1.
    assert metrics.sari("b", "b c", "a b") == pytest.approx((2 / 3 + 2 / 3 + 1 + 1) / 4)
    assert metrics.sari("About 95 known.", "about 95 known", "About 95 species are known.") == 1
    assert metrics.sari("", "short", "short") == 0
    assert metrics.sari("b", "b c", "a b") == metrics.sari("b", "b c", "Simplify.\na b\nAnswer:")
