"""Which checkpoints are deleted once a new one is complete."""

from __future__ import annotations

import math

import pytest

from automodel.checkpoint.retention import Retention

NAN = math.nan


@pytest.mark.parametrize(
    ("rule", "scores", "newest", "outdated"),
    [
        (Retention(), {1: None, 2: None}, 2, []),
        (Retention(keep_last=1), {1: None, 2: None, 3: None}, 3, [1, 2]),
        (Retention(keep_last=2), {1: None, 2: None, 3: None}, 3, [1]),
        (Retention(keep_last=1, keep_every=2), {1: None, 2: None, 3: None, 4: None, 5: None}, 5, [1, 3]),
        (Retention(keep_last=1, keep_best="min:loss"), {1: 3.0, 2: 1.0, 3: 2.0}, 3, [1]),
        (Retention(keep_last=1, keep_best="max:loss"), {1: 3.0, 2: 1.0, 3: 2.0}, 3, [2]),
        (Retention(keep_last=1, keep_best="min:loss"), {1: 1.0, 2: 1.0, 3: 2.0}, 3, [1]),
        (Retention(keep_last=1, keep_best="min:loss"), {1: NAN, 2: None, 3: 2.0}, 3, [1, 2]),
        (Retention(keep_last=1, keep_best="max:metric/x"), {1: math.inf, 2: 0.5, 3: None}, 3, [1]),
        (Retention(keep_best="min:loss"), {1: 2.0, 2: 1.0}, 2, []),
        # Steps after the newest are of a past that was left: they neither count nor go.
        (Retention(keep_last=1), {5: None, 7: None, 9: None}, 7, [5]),
    ],
)
def test_a_checkpoint_stays_that_any_rule_keeps(rule, scores, newest, outdated):
    assert rule.outdated(scores, newest=newest) == outdated


def test_the_newest_always_stays():
    assert Retention(keep_last=1, keep_every=10, keep_best="min:loss").outdated({3: None}, newest=3) == []
