"""The closest valid names to a misspelt one: every user error names the choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: object, choices: Iterable[str], *, show: int = 12) -> str:
    """Return "did you mean 'quest'? (choose from a, b, ...)" for a word that is not a choice.

    The question is left out when nothing is close; a long list of choices is cut at `show`
    names. With no choices at all the answer is "there are none to choose from".
    """
    names = sorted(set(map(str, choices)))
    if not names:
        return "there are none to choose from"
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    shown = ", ".join(names[:show]) + (", ..." if len(names) > show else "")
    return f"did you mean '{close[0]}'? (choose from {shown})" if close else f"choose from {shown}"
