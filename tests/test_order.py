"""pskd.hashing and pskd.order: frozen vectors, one order for all worlds, refusals that are true."""

import hashlib
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pskd.errors import PskdError
from pskd.hashing import hash64
from pskd.order import Plan, epoch_order, partition

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
WORLDS = [1, 2, 3, 4, 8]

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def splitmix64(state, count):
    """The outputs of Steele, Lea and Flood's generator, in Python's integers."""
    outputs = []
    for _ in range(count):
        state = state + GAMMA & MASK
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        outputs.append(z ^ z >> 31)
    return outputs


def scalar_hash64(seed, stream, epoch, sample_id, columns):
    """Column k is output k of a splitmix64 whose state is output `id` of the key's splitmix64."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{epoch}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little")
    (row,) = splitmix64(key + (sample_id - 1) * GAMMA, 1)
    return splitmix64(row, columns)


def test_the_reference_is_the_published_splitmix64():
    # The first outputs for seed 1234567, as listed for splitmix64 on Rosetta Code.
    assert splitmix64(1234567, 5) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            (0, "order", 0),
            [
                [0xEB4EE59FC9B2D050, 0xCC9D6DABA7AC1424],
                [0x57E362B5F16EF5E6, 0xDCE5ED40E4A9ABB4],
                [0x61A932FD8FAC56EF, 0x38F75658249FB7D3],
            ],
        ),
        (
            (-1, "mix", 299),
            [
                [0xF099CA1036006E59, 0xD8FCA999120AEB63],
                [0xEA3090038B35CE4E, 0xC834131749C2A2D4],
                [0x846CB1246BFC7858, 0x785DC1B5E4D8ABE7],
            ],
        ),
    ],
)
def test_hash64_is_frozen(key, expected):
    assert hash64(*key, np.array([0, 1, 1281166]), 2).tolist() == expected


@untimed
@given(
    seed=st.integers(-(2**70), 2**70),
    stream=st.sampled_from(["order", "crop", "flip", "mix", "partner-view"]),
    epoch=st.integers(0, 10_000),
    ids=st.lists(st.integers(0, 2**62), max_size=8),
    columns=st.integers(0, 4),
)
def test_hash64_equals_the_scalar_reference(seed, stream, epoch, ids, columns):
    got = hash64(seed, stream, epoch, np.array(ids, dtype=np.int64), columns)
    assert got.dtype == np.uint64
    assert got.shape == (len(ids), columns)
    assert got.tolist() == [scalar_hash64(seed, stream, epoch, i, columns) for i in ids]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 0, 10), [6, 5, 2, 9, 1, 7, 3, 4, 8, 0]),
        ((0, 1, 10), [7, 8, 0, 2, 9, 3, 1, 6, 4, 5]),
        ((1, 0, 10), [5, 3, 4, 0, 7, 1, 6, 8, 9, 2]),
        ((12345, 299, 7), [1, 6, 0, 3, 5, 2, 4]),
    ],
)
def test_epoch_order_is_frozen(arguments, expected):
    assert epoch_order(*arguments).tolist() == expected


def test_epoch_order_of_a_whole_cifar_epoch_is_frozen():
    digest = hashlib.sha256(epoch_order(42, 5, 50_000).astype("<i8").tobytes()).hexdigest()
    assert digest == "8d2191ce6245b98dda0f534f12eb7bef4ea5332a1fbb99e17e0a33ebb7766b3e"


@untimed
@given(seed=st.integers(-5, 2**40), epoch=st.integers(0, 300), n=st.integers(0, 200))
def test_epoch_order_sorts_all_ids_by_their_hash(seed, epoch, n):
    order = epoch_order(seed, epoch, n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    keys = [scalar_hash64(seed, "order", epoch, i, 1) for i in range(n)]
    assert order.tolist() == sorted(range(n), key=lambda i: (keys[i], i))


def test_epoch_order_differs_by_seed_and_epoch():
    keys = [(seed, epoch) for seed in range(5) for epoch in range(20)]
    assert len({epoch_order(seed, epoch, 50).tobytes() for seed, epoch in keys}) == len(keys)


@untimed
@given(count=st.integers(0, 600), parts=st.integers(1, 40))
def test_partition_cuts_units_of_two_near_equally_with_the_larger_parts_last(count, parts):
    bounds = partition(count, parts)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert len(bounds) == parts + 1
    assert (bounds[0], bounds[-1]) == (0, count)
    assert min(sizes) >= 0
    assert all(bound % 2 == 0 for bound in bounds[:-1])  # only the last part can be odd
    units = [(size + 1) // 2 for size in sizes]
    assert units == sorted(units)
    assert units[-1] - units[0] <= 1
    assert max(sizes) - min(sizes) <= 2
    # The odd sample belongs to a part with the most units: only there can it be missing.
    assert all(a <= b for a, b in pairwise(sizes[:-1]))
    assert parts == 1 or sizes[-1] >= sizes[-2] - (count % 2)


@st.composite
def plans(draw):
    """Plans that can be trained: no step has fewer than 2 * W * A samples."""
    world, accumulation = draw(st.sampled_from(WORLDS)), draw(st.integers(1, 4))
    least = 2 * world * accumulation
    batch = draw(st.integers(least, least + 30))
    last_batch = draw(st.sampled_from(["train", "drop"]))
    rests = [0, *range(least if last_batch == "train" else 1, batch)]
    n = batch * draw(st.integers(1, 3)) + draw(st.sampled_from(rests))
    plan = Plan(n, batch, world, accumulation, last_batch)
    plan.check()
    return plan


def dealt(plan, order, epoch, step):
    """All micro-batches of a step: rank after rank."""
    return [
        micro
        for rank in range(plan.world)
        for micro in plan.micro_batches(order, epoch, step, rank)
    ]


@untimed
@given(plan=plans(), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_every_world_consumes_the_same_prefix_of_the_order_once(plan, seed, epoch):
    order = epoch_order(seed, epoch, plan.n)
    epoch_ids = []
    for step in range(plan.steps):
        micros = dealt(plan, order, epoch, step)
        ids = np.concatenate([m.ids_B for m in micros])
        start = step * plan.global_batch
        assert ids.tolist() == order[start : start + plan.global_batch].tolist()
        assert len(ids) == plan.batch_size(step)
        assert [m.micro for m in micros] == list(range(plan.accumulation)) * plan.world
        assert {(m.epoch, m.step) for m in micros} == {(epoch, step)}
        sizes = [len(m.ids_B) for m in micros]
        assert min(sizes) >= 2
        assert max(sizes) - min(sizes) <= 2
        epoch_ids += ids.tolist()
    assert epoch_ids == order[: plan.trained].tolist()
    assert len(set(epoch_ids)) == plan.trained


@untimed
@given(plan=plans())
def test_partners_share_a_micro_batch_as_neighbours_i_and_i_xor_1(plan):
    order = np.arange(plan.n)  # an id is its position in the epoch
    for step in range(plan.steps):
        start, size = step * plan.global_batch, plan.batch_size(step)
        for micro in dealt(plan, order, 0, step):
            positions = (micro.ids_B - start).tolist()
            for i, position in enumerate(positions):
                partner = position ^ 1
                if partner < size:
                    assert positions[i ^ 1] == partner
                else:
                    assert i ^ 1 == len(positions)  # the odd last sample has none


@untimed
@given(plan=plans())
def test_scales_average_to_the_mean_over_the_global_batch(plan):
    order = np.arange(plan.n)
    for step in range(plan.steps):
        micros = dealt(plan, order, 0, step)
        total = sum(m.scale * len(m.ids_B) for m in micros)
        assert total / (plan.world * plan.accumulation) == pytest.approx(1, abs=1e-12)
        assert len({m.scale for m in micros}) == 1  # every sample counts the same


@pytest.mark.parametrize(
    ("last_batch", "sizes"), [("train", [10, 10, 10, 7]), ("drop", [10, 10, 10])]
)
@pytest.mark.parametrize("world", [1, 3])
def test_last_batch_is_trained_or_dropped_on_any_world(last_batch, sizes, world):
    plan = Plan(37, 10, world, last_batch=last_batch)
    assert [plan.batch_size(s) for s in range(plan.steps)] == sizes
    assert plan.trained == sum(sizes)


@pytest.mark.parametrize("last_batch", ["train", "drop"])
def test_a_data_set_of_whole_batches_has_no_short_step(last_batch):
    plan = Plan(30, 10, last_batch=last_batch)
    assert (plan.steps, plan.trained, plan.batch_size(2)) == (3, 30, 10)


def test_a_batch_larger_than_the_data_set_is_refused_with_the_largest():
    with pytest.raises(PskdError, match=r"batch_size 11 is larger .*\(10 samples\).* at most 10\."):
        Plan(10, 11).check()
    Plan(10, 10).check()


def admissible(plan):
    """Deal every distinct step and look."""
    order = np.arange(plan.n)
    steps = {0, plan.steps - 1}
    return all(len(m.ids_B) >= 2 for step in steps for m in dealt(plan, order, 0, step))


def refusal(plan):
    try:
        plan.check()
    except PskdError as error:
        return str(error)
    return None


@st.composite
def any_plans(draw):
    batch = draw(st.integers(2, 20))
    return Plan(
        n=draw(st.integers(batch, 3 * batch)),
        global_batch=batch,
        world=draw(st.integers(1, 12)),
        accumulation=draw(st.integers(1, 5)),
        last_batch=draw(st.sampled_from(["train", "drop"])),
    )


def named(pattern, message):
    found = re.search(pattern, message)
    return int(found[1]) if found else 0


@untimed
@given(plan=any_plans())
def test_check_refuses_exactly_what_leaves_a_micro_batch_below_two(plan):
    message = refusal(plan)
    assert (message is None) == admissible(plan)
    if message is not None:
        assert (
            f"{plan.world} rank{'s' * (plan.world > 1)} with train.accumulation {plan.accumulation}"
            in message
        )


@untimed
@given(plan=any_plans())
def test_a_refusal_names_the_largest_world_and_accumulation(plan):
    message = refusal(plan)
    assume(message is not None)

    def variant(world, accumulation):
        return Plan(plan.n, plan.global_batch, world, accumulation, plan.last_batch)

    most = named(r"at most (\d+) ranks?", message)
    for world in range(1, plan.global_batch + 1):
        assert admissible(variant(world, plan.accumulation)) == (world <= most)
    deepest = named(r"accumulation at most (\d+) on this world", message)
    for accumulation in range(1, plan.global_batch + 1):
        assert admissible(variant(plan.world, accumulation)) == (accumulation <= deepest)


def test_a_last_batch_of_one_sample_is_refused_on_any_world_and_can_be_dropped():
    for world in (1, 2, 4):
        message = refusal(Plan(65, 64, world))
        assert "in a step of 1 sample." in message
        assert "data.last_batch drop" in message
        assert "at most" not in message  # no number of ranks would do
        Plan(65, 64, world, last_batch="drop").check()


def test_dropping_the_last_batch_is_only_offered_where_it_helps():
    plan = Plan(n=6, global_batch=4, world=4)
    assert "data.last_batch drop" in refusal(Plan(n=6, global_batch=4, world=2))
    assert "data.last_batch drop" not in refusal(plan)
