"""The chaos command, in short: a driver, a worker and a raylet killed in one sweep."""

from __future__ import annotations

from pathlib import Path

import chaos
import pytest
from chaos_outcome import told


@pytest.mark.slow
def test_a_sweep_survives_the_death_of_each_of_its_processes(tmp_path: Path) -> None:
    made = chaos.Chaos(tmp_path, kills=3, seed=4, workers=2, patience="workers")
    made.run()
    print(told(made.result()))
    assert made.problems == []
    assert sorted(kill.kind for kill in made.kills) == ["driver", "raylet", "worker"]
