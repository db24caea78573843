"""select_top is the exact top-k of (score, position), judged by value and by the tie rule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quest_dist import ops, reference

pytestmark = pytest.mark.usefixtures("device")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def chosen(scores: list[float], keep: int, force_last: bool = False) -> list[int]:
    row = torch.tensor(scores, dtype=torch.float32).view(1, 1, -1)
    index, count = ops.select_top(row, ints(len(scores)), ints(keep), force_last)
    assert index.shape[2] == max(count.item(), 0)
    return index[0, 0].tolist()


@pytest.mark.parametrize("items", [2, 17, 256, 2048, 5000])
@pytest.mark.parametrize("force_last", [False, True])
def test_top_values_of_random_scores(items: int, force_last: bool) -> None:
    generator = torch.Generator().manual_seed(items)
    scores = torch.randn(3, 2, items, generator=generator)
    keep = ints(1, items // 2, items - 1)
    index, count = ops.select_top(scores, ints(items, items, items), keep, force_last)
    for r in range(3):
        k = int(keep[r])
        assert count[r].tolist() == [k, k]
        for h in range(2):
            got = index[r, h, :k].long()
            assert got.tolist() == sorted(set(got.tolist()))
            competing = scores[r, h, : items - 1] if force_last else scores[r, h]
            best = competing.topk(k - 1 if force_last else k).values.sort().values
            values = scores[r, h, got[:-1] if force_last else got].sort().values
            assert torch.equal(values, best)
            assert not force_last or int(got[-1]) == items - 1
            assert (index[r, h, k:] == -1).all()


def test_of_equal_scores_the_newest_win() -> None:
    assert chosen([1.0, 2.0, 1.0, 2.0, 1.0], 3) == [1, 3, 4]
    assert chosen([0.0, -0.0, 0.0, -0.0], 2) == [2, 3]
    assert chosen([5.0] * 2000, 3) == [1997, 1998, 1999]
    assert chosen([5.0] * 2000, 1500) == list(range(500, 2000))
    assert chosen([5.0] * 2000, 3, force_last=True) == [1997, 1998, 1999]


def test_infinities_and_nan() -> None:
    never = -math.inf
    assert chosen([never, never, never], 2) == [1, 2]
    assert chosen([math.nan, never, 0.0, math.nan], 2) == [2, 3]
    assert chosen([math.inf, 1.0, never, math.inf], 2) == [0, 3]
    assert chosen([-1e30, never, -3e38], 2) == [0, 2]


def test_keys_that_differ_in_the_last_bit() -> None:
    one, above = 1.0, float(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))
    assert chosen([one, above, one, above, one], 2) == [1, 3]
    assert chosen([-one, -above, -one], 1) == [2]


def test_the_last_item_is_kept_without_competing() -> None:
    assert chosen([3.0, 9.0, 1.0, -math.inf], 1, force_last=True) == [3]
    assert chosen([3.0, 9.0, 1.0, -math.inf], 2, force_last=True) == [1, 3]
    assert chosen([3.0, 9.0, 1.0, math.nan], 3, force_last=True) == [0, 1, 3]


def test_enough_to_keep_means_everything() -> None:
    scores = torch.zeros(4, 1, 6)
    index, count = ops.select_top(scores, ints(6, 4, 6, 0), ints(6, 9, -1, 0), False)
    assert count.tolist() == [[-1]] * 4
    assert index.shape == (4, 1, 0)
    index, count = ops.select_top(scores, ints(6, 4, 6, 0), ints(2, 9, 3, 1), False)
    assert index[:, 0].tolist() == [[4, 5, -1], [-1] * 3, [3, 4, 5], [-1] * 3]


def test_items_beyond_a_row_do_not_compete() -> None:
    scores = torch.tensor([[[1.0, 2.0, 3.0, 99.0, math.nan]]])
    index, _ = ops.select_top(scores, ints(3), ints(2), False)
    assert index.tolist() == [[[1, 2]]]


# The device stays the same for all examples.
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 1e-45, 1.0, 2.5, math.nan]),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 40),
    st.booleans(),
)
def test_agrees_with_the_reference(scores: list[float], keep: int, force_last: bool) -> None:
    row = torch.tensor(scores).view(1, 1, -1)
    got = ops.select_top(row, ints(len(scores)), ints(keep), force_last)
    want = reference.select_top(row, ints(len(scores)), ints(keep), force_last)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
