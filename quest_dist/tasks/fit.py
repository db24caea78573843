"""Sizing generated text: as many sentences as a number of tokens can hold."""

from __future__ import annotations

from collections.abc import Callable


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
    probe = 64
    low, high = 0, None
    guess = max(1, int((limit - empty) * probe / max(1, tokens(probe) - empty)))
    step = 1
    while high is None or high - low > 1:
        if tokens(guess) <= limit:
            low = guess
            guess = low + step if high is None else (low + high) // 2
        else:
            high = guess
            guess = max(low, high - step) if step < high - low else (low + high) // 2
            guess = max(guess, low + 1) if high - low > 1 else guess
        step *= 2
    return low
