"""Summaries of the accuracy matrix against numbers worked out by hand."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cl_bench.metrics import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    diagonal,
    empty_matrix,
    forgetting,
    forgetting_per_task,
    forward_transfer,
    intransigence,
    learning_accuracy,
    so_far,
    summarise,
    tasks_learned,
)

NAN = float("nan")

# Task 1 is at its best (0.95) one task after it was learned: forgetting and BWT then differ.
R = np.array(
    [
        [0.10, 0.20, 0.15],
        [0.90, 0.30, 0.25],
        [0.95, 0.80, 0.35],
        [0.50, 0.60, 0.70],
    ]
)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_diagonal_is_each_task_right_after_it_was_learned():
    assert diagonal(R).tolist() == [0.90, 0.80, 0.70]


def test_published_log_of_o_lora():
    """Order 1 of github.com/cmnfriend/O-LoRA: just-learned and final scores of its released log."""
    log = np.full((5, 4), NAN)
    np.fill_diagonal(log[1:], [98.7, 57.8, 71.9, 88.6])
    log[-1] = [97.7, 56.1, 71.0, 88.6]
    assert average_accuracy(log) == pytest.approx(78.35)
    assert backward_transfer(log) == pytest.approx(-1.2)
    assert backward_transfer(log, over="all") == pytest.approx(-0.9)
    assert forgetting(log) == pytest.approx(1.2)
    assert learning_accuracy(log) == pytest.approx(79.25)


def test_summaries_by_hand():
    assert average_accuracy(R) == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert backward_transfer(R) == pytest.approx(((0.5 - 0.9) + (0.6 - 0.8)) / 2)
    assert forward_transfer(R) == pytest.approx(((0.30 - 0.20) + (0.35 - 0.15)) / 2)
    assert forgetting_per_task(R) == pytest.approx([0.95 - 0.5, 0.8 - 0.6])
    assert forgetting(R) == pytest.approx((0.45 + 0.20) / 2)
    assert learning_accuracy(R) == pytest.approx(0.8)
    assert average_incremental_accuracy(R) == pytest.approx((0.9 + 0.875 + 0.6) / 3)


def test_what_is_summarised_is_named():
    expected = {
        "acc": 0.6,
        "bwt": -0.3,
        "fwt": 0.15,
        "forgetting": 0.325,
        "learning_accuracy": 0.8,
        "average_incremental_accuracy": (0.9 + 0.875 + 0.6) / 3,
    }
    found = summarise(R)
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_the_score_before_training_is_no_peak_to_forget_from():
    untrained_was_best = np.array([[0.99, 0.5], [0.6, 0.5], [0.4, 0.7]])
    assert forgetting(untrained_was_best) == pytest.approx(0.2)


def test_a_task_that_improved_has_negative_forgetting():
    assert forgetting(np.array([[0.1, 0.1], [0.5, 0.1], [0.8, 0.9]])) == pytest.approx(-0.3)


def test_intransigence_against_joint_training():
    joint = R.copy()
    joint[1, 0], joint[2, 1], joint[3, 2] = 0.92, 0.90, 0.88
    assert intransigence(R, joint) == pytest.approx((0.02 + 0.10 + 0.18) / 3)


def test_intransigence_refuses_another_stream():
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(3, 2\)"):
        intransigence(R, empty_matrix(2))


def test_a_single_task_has_no_transfer():
    single = summarise(np.array([[0.1], [0.9]]))
    assert single["acc"] == single["learning_accuracy"] == 0.9
    assert all(np.isnan(single[k]) for k in ("bwt", "fwt", "forgetting"))


def test_heads_that_were_never_trained_leave_only_forward_transfer_undefined():
    heads = np.array([[NAN, NAN, NAN], [0.9, NAN, NAN], [0.95, 0.8, NAN], [0.5, 0.6, 0.7]])
    summary = summarise(heads)
    assert np.isnan(summary.pop("fwt"))
    full = summarise(R)
    del full["fwt"]
    assert summary == pytest.approx(full)


def test_a_partial_run_is_summarised_over_the_tasks_it_learned():
    partial = R.copy()
    partial[3] = NAN
    assert tasks_learned(partial) == 2
    assert so_far(partial).shape == (3, 2)
    expected = {
        "acc": 0.875,
        "bwt": 0.05,
        "fwt": 0.10,
        "forgetting": -0.05,
        "learning_accuracy": 0.85,
        "average_incremental_accuracy": (0.9 + 0.875) / 2,
    }
    found = summarise(partial)
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_an_interrupted_row_does_not_count():
    torn = R.copy()
    torn[3, 1:] = NAN
    assert tasks_learned(torn) == 2


def test_a_run_without_rows_is_all_nan():
    assert tasks_learned(empty_matrix(3)) == 0
    assert all(np.isnan(v) for v in summarise(empty_matrix(3)).values())


def test_a_missing_row_leaves_forgetting_to_the_rows_there_are():
    sparse = R.copy()
    sparse[2] = NAN
    assert forgetting_per_task(sparse)[0] == pytest.approx(0.90 - 0.50)
    assert np.isnan(forgetting_per_task(sparse)[1])


@given(
    st.integers(2, 6).flatmap(
        lambda t: arrays(np.float64, (t + 1, t), elements=st.floats(0, 1, width=32))
    )
)
def test_identities_that_hold_for_every_matrix(matrix):
    T = matrix.shape[1]
    s = summarise(matrix)
    assert s["acc"] - s["learning_accuracy"] == pytest.approx((T - 1) / T * s["bwt"])
    assert s["forgetting"] >= -s["bwt"] - 1e-12
