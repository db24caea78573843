"""Perplexity of the bundled model by the bits of its cache: 4 near full, 2 worst, 3 between."""

from __future__ import annotations

import math

import pytest
from cache_harness import settings_of
from test_models import BUNDLED, needs_bundled

from quest_dist import artefacts, engine, models
from quest_dist.calibrators import kvquant
from quest_dist.plan import Point
from quest_dist.spec import Spec
from quest_dist.tasks.generated import Generated
from quest_dist.tasks.task import Sample

CONTEXT, SCORED = 768, 128


@needs_bundled
@pytest.mark.slow
def test_fewer_bits_are_worse(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models.load(BUNDLED, device="cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kvquant, "SEQUENCES", 2)  # of eight: a good enough calibration, in seconds
    specs = [Spec(name, settings_of(name)) for name in ("full", "kivi4", "kvquant3", "kivi2")]
    made = str(artefacts.ready(loaded, specs[2]))
    specs[2] = Spec("kvquant3", {**specs[2].settings, "artefact": made})
    [(_, text), *_] = Generated().books()
    ids = tuple(loaded.language.encode(text[: 8 * (CONTEXT + SCORED)]))[: CONTEXT + SCORED]
    sample = Sample(0, ids[:CONTEXT], ids[CONTEXT:], (), 0, score_tail=True)
    none = Spec("any", {})
    points = [Point(none, none, none, spec, none, None, 16, 0, 0) for spec in specs]
    found = engine.evaluate(loaded, sample, points)
    full, four, three, two = (
        math.exp(sum(one.outcome.nll) / len(one.outcome.nll)) for one in found
    )
    assert four < 1.02 * full  # of 128 tokens; of many it is within 1 %
    assert four < three < two
    assert two > 1.1 * four
