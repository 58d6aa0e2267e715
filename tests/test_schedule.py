"""The learning rate against naive definitions, and at its boundaries."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pskd.config import ScheduleSection
from pskd.schedule import lr_at

untimed = settings(deadline=None)
steps_per_epoch = st.integers(1, 12)


def rates(schedule, peak, epochs, per_epoch):
    return [lr_at(schedule, peak, epochs, per_epoch, s) for s in range(epochs * per_epoch)]


@untimed
@given(
    peak=st.floats(1e-4, 10),
    epochs=st.integers(1, 12),
    per_epoch=steps_per_epoch,
    milestones=st.sets(st.integers(1, 14)).map(sorted),
    gamma=st.sampled_from([0.1, 0.2, 0.5]),
)
def test_step_drops_by_gamma_at_the_start_of_each_milestone_epoch(
    peak, epochs, per_epoch, milestones, gamma
):
    schedule = ScheduleSection("step", milestones, gamma)
    expected, rate = [], peak
    for epoch in range(epochs):
        if epoch in milestones:
            rate *= gamma
        expected += [rate] * per_epoch
    assert rates(schedule, peak, epochs, per_epoch) == pytest.approx(expected, rel=1e-12)


def test_the_published_cifar_schedule():
    schedule = ScheduleSection("step", [150, 225], 0.1)
    per_epoch = 391
    at = {e: lr_at(schedule, 0.1, 300, per_epoch, e * per_epoch) for e in (0, 150, 225)}
    assert at == pytest.approx({0: 0.1, 150: 0.01, 225: 0.001}, rel=1e-12)
    assert lr_at(schedule, 0.1, 300, per_epoch, 150 * per_epoch - 1) == 0.1
    assert lr_at(schedule, 0.1, 300, per_epoch, 300 * per_epoch - 1) == pytest.approx(0.001)


@untimed
@given(
    peak=st.floats(1e-4, 10),
    epochs=st.integers(2, 12),
    per_epoch=steps_per_epoch,
    warmup=st.integers(0, 1),
)
def test_cosine_is_half_a_wave_over_the_steps_after_the_warm_up(peak, epochs, per_epoch, warmup):
    schedule = ScheduleSection("cosine", warmup_epochs=float(warmup))
    after = rates(schedule, peak, epochs, per_epoch)[warmup * per_epoch :]
    # 1 + cos(2x) = 2 cos(x)^2
    expected = [peak * math.cos(math.pi / 2 * k / len(after)) ** 2 for k in range(len(after))]
    assert after == pytest.approx(expected, rel=1e-9, abs=1e-12 * peak)
    assert after[0] == peak
    assert all(a > b for a, b in pairwise(after))


def test_cosine_is_half_the_peak_half_way_and_never_quite_zero():
    schedule = ScheduleSection("cosine")
    curve = rates(schedule, 0.4, 10, 10)
    assert curve[50] == pytest.approx(0.2)
    assert curve[25] + curve[75] == pytest.approx(0.4)
    assert 0 < curve[-1] < 0.001
    assert lr_at(schedule, 0.4, 10, 10, 100) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("name", ["step", "cosine"])
@pytest.mark.parametrize(
    ("warmup_epochs", "warmup_steps"), [(0.0, 0), (0.5, 5), (1.0, 10), (2.3, 23)]
)
def test_warm_up_is_linear_and_ends_at_the_peak(name, warmup_epochs, warmup_steps):
    schedule = ScheduleSection(name, [5], 0.1, warmup_epochs)
    curve = rates(schedule, 0.3, 6, 10)
    expected = [0.3 * (k + 1) / warmup_steps for k in range(warmup_steps)]
    assert curve[:warmup_steps] == pytest.approx(expected, rel=1e-12)
    assert curve[warmup_steps] == 0.3


def test_milestones_count_from_the_start_of_training_not_from_the_warm_up():
    schedule = ScheduleSection("step", [3], 0.1, warmup_epochs=2.0)
    curve = rates(schedule, 1.0, 5, 4)
    assert curve[8:12] == [1.0] * 4
    assert curve[12:] == pytest.approx([0.1] * 8)


@untimed
@given(
    name=st.sampled_from(["step", "cosine"]),
    epochs=st.integers(1, 6),
    per_epoch=steps_per_epoch,
    share=st.floats(0, 1, exclude_max=True),
    milestones=st.sets(st.integers(1, 7)).map(sorted),
)
def test_every_step_has_a_rate_in_0_to_peak(name, epochs, per_epoch, share, milestones):
    # A warm-up that rounds up to the whole run is the edge case.
    schedule = ScheduleSection(name, milestones, 0.1, warmup_epochs=share * epochs)
    curve = rates(schedule, 0.1, epochs, per_epoch)
    assert all(0 < rate <= 0.1 * (1 + 1e-12) for rate in curve)
