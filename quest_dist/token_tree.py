"""Token trees: the guesses that one pass of the target verifies, and those that it accepts.

Node 0, the root, is the newest token of the text, which the target has not read yet; every other
node is a guess of what follows its parent, and its *rank* says which guess of the draft it was (0:
the likeliest). A target that reads the whole tree chooses a token after each node. From the root
on, as long as a child holds the token chosen, it is accepted; the last choice comes on top. A pass
therefore gives at least one token, and at most as many as the tree has levels, the root's included.

A *shape* is a tree without tokens. With `acceptance[r]` the share of choices that are the guess of
rank r, whatever came before, a node is reached with the product of the acceptances on its path, and
the sum of these over the tree is what a pass is expected to give. `best_shape` is the tree of given
size and depth that maximises it (Sequoia's dynamic programming; Chen et al., arXiv 2402.12374).

Invariants: nodes come level by level, so a parent precedes its children; the children of a node
have the ranks 0, 1, ... without gaps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: (parents, tokens, most): the `most` likeliest next tokens, best first and perhaps fewer, after
#: each node of a level, given by the place of its parent in the last call and by its token.
Guess = Callable[[Sequence[int], Sequence[int], int], Sequence[Sequence[int]]]


@dataclass
class Tree:
    """Nodes by their `tokens`, `parents`, `ranks` (-1 for the root's) and `depths` (the root's is
    1)."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.parents)

    def add(self, token: int, parent: int, rank: int) -> int:
        """A new node's place."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.ranks.append(rank)
        self.depths.append(1 if parent < 0 else self.depths[parent] + 1)
        return len(self) - 1

    def path(self, node: int) -> list[int]:
        """The nodes from the root to `node`."""
        found = []
        while node >= 0:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def children(self) -> list[list[int]]:
        """Each node's children, by rank."""
        found: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                found[parent].append(node)
        return found

    def accepted(self, choices: Sequence[int]) -> list[int]:
        """The nodes that the target accepts, the root first, where it chose `choices[node]` after
        each node."""
        children, path = self.children(), [0]
        while True:
            wanted = choices[path[-1]]
            found = [node for node in children[path[-1]] if self.tokens[node] == wanted]
            if not found:
                return path
            path.append(found[0])


def grow(shape: Tree, root: int, guess: Guess) -> Tree:
    """A tree of this shape with the draft's guesses; where it has fewer guesses than asked, the
    nodes that would hold them are left out, and what is below these."""
    tree, children = Tree(), shape.children()
    level = [(0, tree.add(root, -1, -1), 0)]  # place in the shape, in the tree, of the parent
    while level := [node for node in level if children[node[0]]]:
        most = max(len(children[place]) for place, _, _ in level)
        guesses = guess([node[2] for node in level], [tree.tokens[n] for _, n, _ in level], most)
        level = [
            (child, tree.add(token, node, rank), number)
            for number, ((place, node, _), tokens) in enumerate(zip(level, guesses, strict=True))
            for rank, (child, token) in enumerate(zip(children[place], tokens, strict=False))
        ]
    return tree


def expected(shape: Tree, acceptance: Sequence[float]) -> float:
    """Tokens that a pass is expected to give."""
    reached: list[float] = []
    for parent, rank in zip(shape.parents, shape.ranks, strict=True):
        reached.append(1.0 if parent < 0 else reached[parent] * acceptance[rank])
    return math.fsum(reached)


def most_nodes(branches: int, depth: int) -> int:
    """Nodes of the fullest tree of so many levels, each node with so many children."""
    return sum(branches**level for level in range(depth))


def best_shape(acceptance: Sequence[float], size: int, depth: int) -> Tree:
    """The shape of `size` nodes and at most `depth` levels whose expected tokens are most.

    Raises ValueError where no such tree exists: a node has at most one child for each acceptance.
    """
    branches = len(acceptance)
    if not 1 <= size <= most_nodes(branches, depth):
        raise ValueError(
            f"size={size}: a tree of depth={depth} with branches={branches} has 1 to"
            f" {most_nodes(branches, depth)} nodes"
        )

    @functools.cache
    def below(nodes: int, levels: int, rank: int) -> tuple[float, tuple[int, ...]]:
        """The most that `nodes` nodes of so many levels give, and their number under each child
        from `rank` on."""
        if nodes == 0:
            return 0.0, ()
        best: tuple[float, tuple[int, ...]] = (-math.inf, ())
        if levels == 0 or rank == branches:
            return best
        for first in range(1, min(nodes, most_nodes(branches, levels)) + 1):
            own, _ = below(first - 1, levels - 1, 0)
            others, sizes = below(nodes - first, levels, rank + 1)
            if min(own, others) > -math.inf:
                value = acceptance[rank] * (1 + own) + others
                if value > best[0]:
                    best = (value, (first, *sizes))
        return best

    shape = Tree()
    level = [(shape.add(-1, -1, -1), size)]
    while level:
        left = depth - shape.depths[level[0][0]]
        level = [
            (shape.add(-1, node, rank), nodes)
            for node, held in level
            for rank, nodes in enumerate(below(held - 1, left, 0)[1])
        ]
    return shape
