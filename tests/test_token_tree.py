"""Token trees: dynamic programming finds what brute force finds, and the walk accepts rightly."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import pytest

from quest_dist.token_tree import Tree, best_shape, expected, grow, most_nodes

Nested = tuple["Nested", ...]


@functools.cache
def all_shapes(size: int, depth: int, branches: int) -> tuple[Nested, ...]:
    """Every tree of `size` nodes, as tuples of children's trees."""
    return tuple(_children(size - 1, depth - 1, branches, branches))


def _children(nodes: int, depth: int, left: int, branches: int) -> list[Nested]:
    if nodes == 0:
        return [()]
    if depth == 0 or left == 0:
        return []
    return [
        (first, *others)
        for own in range(1, nodes + 1)
        for first in all_shapes(own, depth, branches)
        for others in _children(nodes - own, depth, left - 1, branches)
    ]


def value(shape: Nested, acceptance: Sequence[float]) -> float:
    """Expected tokens, by the definition."""
    return 1 + sum(
        p * value(child, acceptance) for p, child in zip(acceptance, shape, strict=False)
    )


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_the_best_shape_is_what_brute_force_finds(branches: int) -> None:
    draw = random.Random(branches)
    for size in range(1, 9):
        for depth in range(1, 6):
            shapes = all_shapes(size, depth, branches)
            acceptance = [draw.random() / branches for _ in range(branches)]
            if not shapes:
                assert size > most_nodes(branches, depth)
                with pytest.raises(ValueError, match=f"size={size}: a tree of depth={depth}"):
                    best_shape(acceptance, size, depth)
                continue
            found = best_shape(acceptance, size, depth)
            assert (len(found), max(found.depths) <= depth) == (size, True)
            best = max(value(shape, acceptance) for shape in shapes)
            assert expected(found, acceptance) == pytest.approx(best)


def test_a_larger_tree_is_expected_to_give_more() -> None:
    acceptance = [0.5, 0.2, 0.1]
    found = [expected(best_shape(acceptance, n, 5), acceptance) for n in (1, 2, 4, 8, 16, 32)]
    assert found == sorted(set(found))
    assert found[0] == 1


def test_one_branch_is_a_chain_and_one_level_more_does_not_change_a_flat_tree() -> None:
    assert best_shape([0.6], 5, 5).parents == [-1, 0, 1, 2, 3]
    flat = best_shape([0.3, 0.29, 0.28, 0.27], 5, 5)
    assert flat.parents == [-1, 0, 0, 0, 0]
    assert flat.ranks == [-1, 0, 1, 2, 3]


def test_nodes_come_level_by_level_with_ranks_without_gaps() -> None:
    shape = best_shape([0.5, 0.3, 0.1], 24, 5)
    assert shape.depths == sorted(shape.depths)
    for node, children in enumerate(shape.children()):
        assert [shape.ranks[child] for child in children] == list(range(len(children)))
        assert all(shape.path(child) == [*shape.path(node), child] for child in children)


def test_the_walk_follows_the_choices_and_no_further() -> None:
    shape = Tree()
    for parent, rank in ((-1, -1), (0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
        shape.add(-1, parent, rank)
    asked: list[tuple[list[int], list[int], int]] = []

    def guess(parents: Sequence[int], tokens: Sequence[int], most: int) -> list[list[int]]:
        asked.append((list(parents), list(tokens), most))
        return [[10 * token + rank for rank in range(most)] for token in tokens]

    tree = grow(shape, 7, guess)
    assert asked == [([0], [7], 2), ([0, 0], [70, 71], 2)]
    assert tree.tokens == [7, 70, 71, 700, 710, 711]
    assert tree.accepted([71, 0, 711, 0, 0, 5]) == [0, 2, 5]
    assert tree.accepted([72, 700, 710, 0, 0, 0]) == [0]
    assert tree.accepted([70, 711, 0, 0, 0, 0]) == [0, 1]


def test_guesses_that_a_draft_does_not_have_leave_their_nodes_out() -> None:
    shape = best_shape([0.5, 0.4], 7, 3)
    tree = grow(
        shape, 1, lambda parents, tokens, most: [[2], []][len(tokens) - 1 :][:1] * len(tokens)
    )
    assert tree.tokens == [1, 2, 2]
    assert tree.depths == [1, 2, 3]
    assert grow(shape, 1, lambda parents, tokens, most: [[]]).tokens == [1]
