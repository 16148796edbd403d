"""What is kept of a document's choices: which was picked, and by how much."""

import math
from types import SimpleNamespace

import pytest

from dpq_core.evaluation.results import scores_of
from dpq_core.evaluation.suites.definitions import Suite


def task(output_type="multiple_choice", process_results=None, choices=("a", "bcd", "ef")):
    return SimpleNamespace(
        OUTPUT_TYPE=output_type,
        config=SimpleNamespace(process_results=process_results),
        doc_to_choice=lambda doc: list(choices),
        get_config=lambda name: None,
    )


def scores(rows, kind="acc", **about):
    suite = Suite("suite", {"suite": task(**about)}, "acc", kind, "digest")
    samples = [
        {
            "doc_id": number,
            "doc_hash": str(number),
            "doc": {},
            "acc": float(bool(row)),
            "filtered_resps": [(value, False) for value in row],
        }
        for number, row in enumerate(rows)
    ]
    return scores_of(suite, [("suite", sample) for sample in samples], 0)


def test_the_pick_and_its_margin_are_of_the_metric():
    rows = [[-3.0, -6.0, -4.0], [-9.0, -6.0, -5.5]]
    plain, normed = scores(rows), scores(rows, "acc_norm")
    assert plain.picks == [0, 2]
    assert plain.margins == pytest.approx([1.0, 0.5])
    assert normed.picks == [1, 1]  # −2 a character in both
    assert normed.margins == pytest.approx([0.0, 0.75])


def test_of_equals_the_first_is_picked_as_lm_eval_does():
    assert scores([[-2.0, -1.0, -1.0]]).picks == [1]
    assert scores([[-2.0, -1.0, -1.0]]).margins == [0.0]


def test_unconditional_requests_are_no_choices():
    assert scores([[-3.0, -2.0, -4.0, -0.1, -0.2, -0.3]]).picks == [1]


def test_what_is_not_finite_picks_nothing():
    found = scores([[-1.0, math.nan, -2.0], [-1.0, -2.0, -3.0]])
    assert found.picks == [-1, 0]
    assert math.isnan(found.margins[0])
    assert math.isnan(found.values[0])


@pytest.mark.parametrize(
    "about", [{"output_type": "loglikelihood"}, {"process_results": lambda doc, results: {}}]
)
def test_without_choices_nothing_is_kept(about):
    found = scores([[-1.0], [-2.0]], **about)
    assert (found.picks, found.margins, len(found)) == ([], [], 2)
