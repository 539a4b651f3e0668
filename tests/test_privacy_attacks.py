"""What benchmarks/privacy makes of scores: known answers."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.privacy.attacks import auc, classify, exposure, true_positives, wilson


def test_scores_of_members_become_area_and_true_positives() -> None:
    low, high = np.arange(0.0, 100.0), np.arange(200.0, 300.0)
    assert auc(high, low) == 1.0
    assert auc(low, low) == 0.5
    assert true_positives(high, low) == 1.0
    assert true_positives(low, low) == 0.01  # one of 100 others may be above


def test_a_secret_that_comes_first_has_all_bits_and_the_last_none() -> None:
    rivals = [float(value) for value in range(63)]
    assert exposure(100.0, rivals) == 6.0
    assert exposure(-1.0, rivals) == 0.0


def test_directions_tell_categories_and_an_interval_holds_its_share() -> None:
    shadow = np.eye(4)[[0, 0, 1, 1, 2, 2]] + 0.01
    assert classify(shadow, ["a", "a", "b", "b", "c", "c"], 5 * np.eye(4)[[2, 0]]) == ["c", "a"]
    low, high = wilson(50, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-3)
