"""Schedules against their closed forms, at their limits, and with bad numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from autodual.errors import SpecificationError
from autodual.training import Constant, Cosine, Linear, Periodic, Smooth, Steps
from autodual.training.schedules import SCHEDULES, as_table, schedule_from

RAMPS = [Linear, Smooth, Cosine]


@pytest.mark.parametrize("kind", RAMPS)
def test_ramps_meet_their_ends_and_never_turn(kind):
    ramp = kind(0.3, 0.1, begin=2, length=7)
    assert [ramp(epoch) for epoch in (0, 1.99, 2)] == [0.3] * 3
    assert [ramp(epoch) for epoch in (9, 9.01, 1e9)] == [0.1] * 3
    values = [ramp(2 + 7 * i / 1000) for i in range(1001)]
    assert all(a > b for a, b in pairwise(values[1:]))
    assert ramp.settled == 9


def test_closed_forms():
    assert Constant(0.2)(1e6) == 0.2
    assert Linear(1.0, 3.0, begin=1, length=4)(2) == 1.5
    assert Cosine(1.0, 3.0, length=3)(1) == pytest.approx(2 - math.cos(math.pi / 3))
    assert [Steps(8.0, 0.5, (1, 2))(epoch) for epoch in (0.999, 1, 1.5, 2, 9)] == [8, 4, 4, 2, 2]


@pytest.mark.parametrize(("middle", "power"), [(0.25, 4.0), (0.5, 2.0), (0.9, 3.0)])
def test_smooth_is_a_power_then_a_line_with_one_derivative(middle, power):
    smooth, step = Smooth(0.0, 1.0, length=1.0, middle=middle, power=power), 1e-6
    assert smooth(middle / 2) == pytest.approx(smooth(middle) / 2**power)
    before, after = ((smooth(middle + side * step) - smooth(middle)) / (side * step) for side in (-1, 1))
    assert before == pytest.approx(after, rel=1e-4)
    line = [smooth(middle + (1 - middle) * part) for part in (0.2, 0.6, 1.0)]
    assert line[1] - line[0] == pytest.approx(line[2] - line[1])
    assert smooth(step) == pytest.approx(0.0, abs=1e-5)


def test_smooth_of_power_one_is_linear():
    smooth, linear = Smooth(0.0, 1.0, length=5, power=1.0), Linear(0.0, 1.0, length=5)
    assert [smooth(i / 7) for i in range(40)] == pytest.approx([linear(i / 7) for i in range(40)])


def test_periodic_is_the_formula_of_its_source():
    resets, low, high = (0.0, 4.0, 10.0), 0.1, 0.4
    bent, straight = (Periodic(low, high, resets, shape) for shape in ("cosine", "linear"))
    for epoch in (0.0, 0.5, 3.999, 4.0, 7.0, 9.9):
        first, last = (0.0, 4.0) if epoch < 4 else (4.0, 10.0)
        p = (epoch - first) / (last - first)
        assert bent(epoch) == pytest.approx(0.5 * (1 - math.cos(p * math.pi)) * (high - low) + low)
        assert straight(epoch) == pytest.approx((high - low) * p + low)
    assert (bent(10.0), straight(99.0), bent.settled) == (high, high, 10.0)
    assert Periodic(low, high, (2, 3))(1.0) == low
    rate = Periodic(0.01, 0.0, resets)
    assert rate(3.999) < 1e-6 < rate(4.0) == 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(math.nan), "Constant: value must be a finite number"),
        (lambda: Constant(True), "finite number"),
        (lambda: Linear(0.0, "0.1", length=1), "Linear: end must be a finite number, got '0.1'"),
        (lambda: Linear(0.0, 0.1, length=0), "length, in epochs, must be positive"),
        (lambda: Cosine(0.0, 0.1, begin=-1, length=1), "begin, in epochs, must be at least 0"),
        (lambda: Smooth(0.0, 0.1, length=1, middle=1.0), "middle must lie between 0 and 1"),
        (lambda: Smooth(0.0, 0.1, length=1, power=0.5), "power must be at least 1"),
        (lambda: Steps(0.1, 0.5, ()), "at must hold 1 or more"),
        (lambda: Steps(0.1, 0.5, (3, 2)), "increasing order"),
        (lambda: Periodic(0.0, 0.1, (1,)), "resets must hold 2 or more"),
        (lambda: Periodic(0.0, 0.1, (-1, 1)), "at least 0"),
        (lambda: Periodic(0.0, 0.1, (0, 1), "sine"), "shape must be one of cosine, linear, got 'sine'"),
        (lambda: schedule_from({"kind": "sine"}, "eps"), "schedule of eps: .*kind of constant, linear"),
        (lambda: schedule_from({"kind": "linear", "stop": 1}, "eps"), "linear has no 'stop'; it has start, end"),
        (lambda: schedule_from({"kind": "linear", "start": 0.0, "end": 1.0}, "lr"), "schedule of lr: linear lacks 'length'"),
        (lambda: schedule_from({"kind": "constant", "value": "x"}, "lr"), "schedule of lr: Constant: value"),
    ],
)
def test_bad_numbers_are_named(make, message):
    with pytest.raises(SpecificationError, match=message):
        make()


def test_tables_are_read_as_they_are_written():
    some = [Constant(0.1), Linear(0, 1, 2, length=3), Smooth(0, 1, length=3), Cosine(1, 0, length=9), Steps(1, 0.1, (2, 3))]
    some.append(Periodic(0, 1, (0, 5), "linear"))
    assert {type(each) for each in some} == set(SCHEDULES.values())
    for each in some:
        assert schedule_from(as_table(each), "it") == each
