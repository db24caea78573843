"""What is kept or shown holds no secret, wherever one came in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_dist import redact
from quest_dist.worker import describe


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("postgresql://me:pa55/word@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:p%2Fw@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("https://me:p@ss@host/a?b=c", "https://me:***@host/a?b=c"),
        ("https://ghp_abc@github.com/x", "https://***@github.com/x"),
        ("mysql://h/db?user=a&password=secret&x=1", "mysql://h/db?user=a&password=***&x=1"),
        ("https://h/x?access_token=abc", "https://h/x?access_token=***"),
        ("+cluster.env.SERVICE_TOKEN=abc", "+cluster.env.SERVICE_TOKEN=***"),
        (
            "+cluster.env={AWS_SECRET_ACCESS_KEY:abc,A:b}",
            "+cluster.env={AWS_SECRET_ACCESS_KEY:***,A:b}",
        ),
        ('{"HF_TOKEN": "a b", "X": 1}', '{"HF_TOKEN": ***, "X": 1}'),
        ("env:\n  MY_PASSWORD: 'a b'\n  B: c", "env:\n  MY_PASSWORD: ***\n  B: c"),
    ],
)
def test_secrets_go(given_text: str, expected: str) -> None:
    assert redact.text(given_text) == expected
    assert redact.text(expected) == expected


@pytest.mark.parametrize(
    "harmless",
    [
        "tokens: 4096",
        "grid.method=[oracle_token,full]",
        "TOKENIZERS_PARALLELISM=false",
        "cluster.env.HF_TOKEN=${oc.env:HF_TOKEN}",
        "hydra.searchpath=[file:///a/b]",
        "sqlite:////data/mlflow.db",
        "http://127.0.0.1:5000/files/a@b",
        "http://127.0.0.1:5000/#/experiments/1/runs?compareRunsMode=CHART",
        "key: value, KEYS=3, MONKEY: banana",
    ],
)
def test_what_is_no_secret_stays(harmless: str) -> None:
    assert redact.text(harmless) == harmless


def test_values_of_secret_variables_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abc/def")
    monkeypatch.setenv("SHORT_KEY", "1")
    monkeypatch.setenv("KEYBOARD", "qwerty-layout")
    assert redact.text("401 for hf_abc/def, hf_abc%2Fdef; 1 qwerty-layout") == (
        "401 for ***, ***; 1 qwerty-layout"
    )
    assert describe(OSError("cannot read\nhttps://me:pw@h/x with hf_abc/def")) == (
        "OSError: cannot read https://me:***@h/x with ***"
    )


@settings(max_examples=100, deadline=1000, derandomize=True)
@given(st.text("aZ_:/@?&=' \"{},.TOKENSECRET$\n0", max_size=60))
def test_twice_is_once(text: str) -> None:
    once = redact.text(text)
    assert redact.text(once) == once
