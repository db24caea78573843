"""A worker turns a unit into records; what is wrong with one point or sample stays with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_harness import method_spec
from tiny_models import save_byte_model

from quest_dist import faults, ledger, models, worker
from quest_dist.methods.method import Selection, View
from quest_dist.methods.quest import Quest
from quest_dist.plan import Point, Spec, Unit

RUNTIME = worker.Runtime(threads=1, gpus=0.0).to_dict()
TASK = {"_target_": "quest_dist.tasks.passkey.Passkey", "samples": 2, "length": 480}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """A random model of a few kilobytes that reads bytes, saved as any local model is."""
    folder = tmp_path_factory.mktemp("model")
    save_byte_model(folder)
    return Spec("tiny", {"source": "local", "path": str(folder), "dtype": "float32"})


def unit(model: Spec, *methods: Spec, task: dict[str, Any] | None = None) -> Unit:
    data = Spec("generated", {"_target_": "quest_dist.tasks.generated.Generated"})
    points = tuple(
        Point(
            model=model,
            task=Spec("passkey", task or TASK),
            data=data,
            method=method,
            protocol=Spec("quest_paper", {"tail": "question"}),
            budget=None if method.name == "full" else 64,
            page_size=16,
            dense_layers=1,
            seed=0,
        )
        for method in methods
    )
    return Unit(points, (0, 1))


def records(work: Unit) -> dict[tuple[str, int], dict[str, Any]]:
    """The records of a unit by (method, sample), each one fit for the ledger."""
    names = {point.key: point.method.name for point in work.points}
    reports = list(worker.run(work.to_dict(), RUNTIME))
    assert [report["sample"] for report in reports] == list(work.samples)
    assert {report["unit"] for report in reports} == {work.key}
    found = [record for report in reports for record in report["records"]]
    for record in found:
        ledger.check_record(record)
    return {(names[record["point"]], record["sample"]): record for record in found}


def test_each_point_gets_a_record_of_each_sample(model: Spec) -> None:
    work = unit(model, method_spec("full"), method_spec("quest"))
    found = records(work)
    assert len(found) == 4
    full, quest = found["full", 0], found["quest", 0]
    assert full["error"] is quest["error"] is None
    assert full["reference"] == quest["reference"]
    assert len(full["reference"]) == 5
    assert full["context_tokens"] + full["tail_tokens"] > 400
    assert full["attended"] > full["context_tokens"]
    assert quest["attended"] == pytest.approx(quest["planned"])
    assert quest["attended"] <= 64
    assert quest["read"] >= quest["attended"]
    assert full["metrics"]["depth"] == 0.05
    assert full["metrics"]["max_new_tokens"] == 10  # the task's own
    assert full["metric"] == "accuracy"
    assert torch.get_num_threads() == 1


def test_the_model_stays_loaded_between_units(model: Spec) -> None:
    records(unit(model, method_spec("full")))
    (before,) = worker._loaded.values()
    records(unit(model, method_spec("quest")))
    assert [*worker._loaded.values()] == [before]


def test_a_worker_with_a_gpu_computes_there(model: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refusing(name: str) -> torch.device:
        asked.append(name)
        raise ValueError("no such place")

    monkeypatch.setattr(models, "place", refusing)
    for gpus in (0.0, 0.5, 1.0):
        worker._loaded.clear()
        with pytest.raises(ValueError, match="no such place"):
            list(worker.run(unit(model, method_spec("full")).to_dict(), {"gpus": gpus}))
    assert asked == ["cpu", "cuda", "cuda"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_records_of_the_cpu(model: Spec) -> None:
    work = unit(model, method_spec("full"), method_spec("quest"))
    found = [
        [
            record
            for report in worker.run(work.to_dict(), {"gpus": gpus})
            for record in report["records"]
        ]
        for gpus in (1.0, 0.0)
    ]
    for there, here in zip(*found, strict=True):
        assert there["error"] is None
        for fact in ("point", "sample", "prediction", "attended", "context_tokens"):
            assert there[fact] == here[fact]


def test_a_method_whose_op_met_a_wrong_index_has_no_score(
    model: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("quest_dist._cuda", reason="quest_dist._cuda is not built")
    monkeypatch.setattr(faults, "_faults", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    select = Quest.select

    def noting(self: Quest, view: View, q: torch.Tensor) -> Selection:
        """As a GPU's kernel would."""
        key = (faults.KINDS.index("index") + 1) << 58 | 2 << 32 | 5
        faults.fault_of(view.kv.device).fill_(key)
        return select(self, view, q)

    monkeypatch.setattr(Quest, "select", noting)
    found = records(unit(model, method_spec("full"), method_spec("quest")))
    for sample in (0, 1):
        assert found["full", sample]["error"] is None
        assert "met a wrong value of index (place 2, 5)" in found["quest", sample]["error"]
        assert found["quest", sample]["score"] is None


def test_a_method_that_breaks_leaves_the_others_alone(model: Spec) -> None:
    broken = Spec("broken", {"_target_": "quest_dist.methods.quest.Quest", "radius_scale": 7})
    found = records(unit(model, method_spec("full"), broken, method_spec("quest")))
    whole = records(unit(model, method_spec("full"), method_spec("quest")))
    for sample in (0, 1):
        assert found["broken", sample]["error"].startswith("ValueError: ")
        assert "radius_scale" in found["broken", sample]["error"]
        for name in ("full", "quest"):
            assert found[name, sample]["prediction"] == whole[name, sample]["prediction"]


def test_a_sample_that_cannot_be_made_fails_for_every_point(model: Spec) -> None:
    short = {**TASK, "length": 130}
    found = records(unit(model, method_spec("full"), method_spec("quest"), task=short))
    assert len(found) == 4
    assert all("task.length=130" in record["error"] for record in found.values())


def test_another_density_than_planned_is_an_error(
    model: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "DENSITY_TOLERANCE", -1.0)
    (found, _) = records(unit(model, method_spec("quest"))).values()
    assert "density differs from plan" in found["error"]
    assert found["score"] is None


def test_errors_are_one_line() -> None:
    assert worker.describe(ValueError("a\n  b")) == "ValueError: a b"
    assert worker.describe(MemoryError()) == "MemoryError"
