"""Layer budgets: how the layers of a model share a point's budget out among themselves.

`uniform` gives all the same. `pyramid` (PyramidKV, arXiv 2406.02069) gives early layers, whose
attention is spread wide, more than late ones: an arithmetic sequence over the layers in which the
method is active, from about twice the budget down to a `beta`-th of it. What every layer needs
whatever its depth (the new token, sinks, a window, the current page) stays outside of the sequence,
as PyramidKV's window does.

Invariants: the budgets of the layers have the point's budget as their mean, exactly (in whole pages
for a method that selects pages: then the mean is as many pages as the budget holds); they never
grow with depth; none is larger than the context, what a layer cannot use goes to those below it in
the sequence; a budget that covers the context is given to every layer as it is. They are decided
once, when the context has been prefilled, and stay while it grows: what is evicted could not return
to a layer whose budget rose.
"""

from __future__ import annotations

SCHEDULES = ("uniform", "pyramid")


def pyramid(
    budget: int, length: int, layers: int, *, beta: float, unit: int = 1, reserved: int = 1
) -> list[int]:
    """Budgets in tokens of `layers` layers, first to last, for a context of `length` tokens.

    Budgets are multiples of `unit` tokens and hold `reserved` tokens at least.
    """
    if budget >= length:
        return [budget] * layers
    whole = max(1, budget // unit)
    kept = min(whole, -(-reserved // unit))
    shared = _sequence(whole - kept, layers, beta, -(-length // unit) - kept)
    return [unit * (kept + share) for share in shared]


def least(budget: int, *, beta: float, unit: int = 1, reserved: int = 1) -> int:
    """The budget of the last of many layers over a long context: no layer ever has less."""
    whole = max(1, budget // unit)
    kept = min(whole, -(-reserved // unit))
    return unit * (kept + int((whole - kept) / beta))


def _sequence(mean: int, count: int, beta: float, most: int) -> list[int]:
    """Whole numbers nearest to an arithmetic sequence down to mean / beta, with exactly this mean
    and none above `most`; by largest remainder, ties to the earlier."""
    if count == 1:
        return [mean]
    first = min(2 * mean - int(mean / beta), most)
    last, steps = 2 * mean - first, count - 1
    parts = [divmod(first * (steps - place) + last * place, steps) for place in range(count)]
    numbers = [number for number, _ in parts]
    by_remainder = sorted(range(count), key=lambda place: -parts[place][1])
    for place in by_remainder[: count * mean - sum(numbers)]:
        numbers[place] += 1
    return numbers
