"""Sizing generated text: as many sentences as a number of tokens can hold."""

from __future__ import annotations

from collections.abc import Callable

PROBE = 64
"""Sentences whose size the first estimate is drawn from."""


def largest(tokens: Callable[[int], int], limit: int, key: str) -> int:
    """Return the largest n >= 0 with tokens(n) <= limit, for a function that grows with n.

    Tokenising is the cost here, so the search starts from a linear estimate and gallops outward
    instead of halving the whole range. ValueError where tokens(0) is already over the limit.
    """
    empty = tokens(0)
    if empty > limit:
        raise ValueError(
            f"{key}={limit} is less than the {empty} tokens of a prompt without filler"
        )
    guess = int((limit - empty) * PROBE / max(1, tokens(PROBE) - empty))
    low, step = 0, 4
    reached = tokens(guess)
    if reached <= limit:
        low = guess
        while (further := tokens(low + step)) <= limit:
            assert further > reached, f"{low + step} sentences are no longer than {low}"
            low, step, reached = low + step, 2 * step, further
        high = low + step
    else:
        high = guess
        while high > step and tokens(high - step) > limit:
            high, step = high - step, 2 * step
        low = max(0, high - step)
    while high - low > 1:  # `low` fits and `high` does not
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= limit else (low, middle)
    return low
