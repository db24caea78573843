"""Redact: texts that are kept or shown, without the secrets that may have come into them.

A secret is the value of a variable that is called one (HF_TOKEN, MLFLOW_TRACKING_PASSWORD), whether
it stands in this process's environment or was written beside its name, and the password of a URI.

Invariant: `text` is idempotent and leaves a text without secrets as it is.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote

HIDDEN = "***"
SHORTEST = 6  # characters: replacing each "1" of a text would hide nothing and spoil all
_WORDS = "TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|KEY|APIKEY|CREDENTIALS?"
_NAME = re.compile(rf"(?<![A-Za-z0-9])(?:{_WORDS})(?![A-Za-z0-9])")
#: A variable and what it is set to, in an override or in YAML; an interpolation is no secret.
_SET = re.compile(
    rf"\b((?:[A-Z0-9]+_)*(?:{_WORDS})(?:_[A-Z0-9]+)*(?:[ \t]*[=:][ \t]*|[\"']\s*:\s*))"
    r"(?!\$\{)(\"[^\"\n]*\"|'[^'\n]*'|[^\s,}\]'\"]+)"
)
#: SQLAlchemy takes a password with slashes; a port and a path are no password.
_USER = re.compile(r"(://)([^\s'\"/@:]*)(:(?!\d{1,5}[/?#])[^\s'\"]*)?@")
_QUERY = re.compile(
    r"([?&](?:\w*password|\w*token|\w*secret|api_?key)=)[^&\s'\"]+", flags=re.IGNORECASE
)


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return _NAME.search(name.upper()) is not None


def text(given: str) -> str:
    """The text with every secret replaced by three asterisks."""
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= SHORTEST:
            for form in (value, quote(value, safe="")):
                given = given.replace(form, HIDDEN)
    given = _USER.sub(_without_password, given)
    given = _QUERY.sub(rf"\g<1>{HIDDEN}", given)
    return _SET.sub(rf"\g<1>{HIDDEN}", given)


def _without_password(found: re.Match[str]) -> str:
    if found[3] is None:
        return f"{found[1]}{HIDDEN}@"  # a user alone may be a token
    return f"{found[1]}{found[2]}:{HIDDEN}@"
