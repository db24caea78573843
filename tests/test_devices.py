"""Devices: all but the kernels runs on one that holds no data; workers get the one asked for."""

from __future__ import annotations

from collections.abc import Iterator

import no_gpu
import pytest
import torch
from cache_harness import (
    BUDGETED,
    METHODS,
    Stream,
    asked_for,
    method_spec,
    no_rotation,
    settings_of,
)
from tiny_models import tiny

import quest_dist
from quest_dist import cluster, models, provenance
from quest_dist.arguments import check_device
from quest_dist.batch import Batch, Group, new_batch
from quest_dist.cluster import Cluster, Workers
from quest_dist.spec import Spec

#: Methods that read nothing back from their device.
UNREAD = [name for name in METHODS if not Spec(name, settings_of(name)).build().waits]
VARIANTS = [
    *((name, {}) for name in UNREAD),
    ("quest", {"gqa": "max"}),
    ("quest", {"variant": "eval_compat"}),
    ("h2o", {"score_init": "prompt", "normalise": "per_query_count"}),
    ("streaming", {"positions": "rolling"}),
    ("oracle_token", {"gqa": "mean"}),
    ("oracle_page", {"gqa": "max", "score": "max"}),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    # What was attended to is read back after a step: there is nothing to read here.
    monkeypatch.setattr(Batch, "count", lambda self: self._counts.clear())
    with no_gpu.installed(monkeypatch) as device:
        yield device


def forward(batch: Batch, stream: Stream, start: int, count: int) -> None:
    """`count` tokens of the stream in all rows and layers."""
    for layer in range(stream.q.shape[0]):
        q, k, v = (
            part[layer, :, start : start + count].expand(len(batch.rows), -1, -1, -1)
            for part in (stream.q, stream.k, stream.v)
        )
        batch.write(layer, k, v, None)
        out = batch.attend(layer, q, k, v, 0.25)
        assert out.device == q.device
    batch.count()


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_method_keeps_its_rows_on_their_device(
    gpu: torch.device, name: str, settings: dict[str, object]
) -> None:
    made = Stream.random(40, layers=2)
    stream = Stream(made.q.to(gpu), made.k.to(gpu), made.v.to(gpu))
    budgets = [8, 12, 60] if name in BUDGETED else [0, 0, 0]
    group = Group(method_spec(name, **settings).build(), budgets, dense_layers=1)
    first = new_batch(stream.geometry, 4, (), 1, no_rotation, observers=[group], device=gpu)
    forward(first, stream, 0, 20)
    forward(first, stream, 20, 9)
    batch = first.fork([group])
    for position in range(29, 40):
        if position == 35:
            batch.keep([0, 2])
        forward(batch, stream, position, 1)
    assert batch.pool.kv.device == batch.rows.lengths.device == gpu


@pytest.mark.parametrize("name", UNREAD)
def test_a_patched_model_runs_where_it_is(gpu: torch.device, name: str) -> None:
    model = tiny(dtype=torch.bfloat16).to(gpu)
    tokens = torch.ones(2, 30, dtype=torch.long, device=gpu)
    with quest_dist.patched(model, **asked_for(name, 8), page_size=4, dense_layers=1):
        cache = model(tokens).past_key_values
        for _ in range(3):
            logits = model(tokens[:, :1], past_key_values=cache).logits
    assert logits.device == cache.batch.pool.kv.device == gpu


def test_a_model_on_two_devices_is_refused(gpu: torch.device) -> None:
    model = tiny()
    model.lm_head.to(gpu)
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM is spread over cpu, meta"),
        quest_dist.patched(model),
    ):
        pass


def test_devices_and_dtypes_without_kernels_are_named() -> None:
    with pytest.raises(ValueError, match="model X is on mps: there are kernels for cpu and"):
        check_device("model X", torch.device("mps"), torch.float32)
    with pytest.raises(ValueError, match=r"model X is torch\.float16 on cpu: the kernels there"):
        check_device("model X", torch.device("cpu"), torch.float16)


def test_float16_needs_a_gpu() -> None:
    settings = {"source": "hub", "repo": "a/b", "dtype": "float16"}
    models.check(settings, "cuda")
    with pytest.raises(ValueError, match=r"dtype='float16' runs on a GPU only: set cluster"):
        models.check(settings, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_before_a_model_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"device cuda: torch .* finds no GPU"):
        models.load({"source": "bundled"}, "cuda")


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        ({}, 0.0),
        ({"device": "cpu"}, 0.0),
        ({"device": "cuda"}, 1.0),
        ({"device": "cuda", "gpus_per_worker": 0.5}, 0.5),
        ({"gpus_per_worker": 1}, 1.0),
        ({"device": "cuda", "backend": "inline"}, 1.0),
        ({"device": "cuda", "address": "auto"}, 1.0),
    ],
)
def test_workers_compute_where_they_are_told(
    settings: dict[str, object], gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "available_gpus", lambda: 1)
    monkeypatch.setattr(cluster, "lacking_for_gpus", lambda: "")
    workers = cluster.fit(Cluster(**settings), 1)
    assert workers.gpus == gpus
    assert workers.device == cluster.device_of(Cluster(**settings)) == ("cuda" if gpus else "cpu")
    assert Workers(1, 1, 0.0).device == "cpu"


@pytest.mark.parametrize(
    ("settings", "gpus", "lacking", "said"),
    [
        ({"device": "gpu"}, 1, "", "cluster.device='gpu': choose auto, cpu, cuda"),
        ({"device": "cpu", "gpus_per_worker": 1}, 1, "", "device=cpu contradicts cluster.gpus_per"),
        ({"device": "cuda", "gpus_per_worker": 0}, 1, "", "device=cuda contradicts cluster.gpus_"),
        ({"device": "cuda"}, 0, "", "cluster.device=cuda: this machine has 0 GPUs"),
        ({"device": "cuda"}, 1, "not built; do this", "cluster.device=cuda: not built; do this"),
    ],
)
def test_devices_that_cannot_be_had_are_refused_before_a_worker_starts(
    settings: dict[str, object],
    gpus: int,
    lacking: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "available_gpus", lambda: gpus)
    monkeypatch.setattr(cluster, "lacking_for_gpus", lambda: lacking)
    with pytest.raises(ValueError, match=said):
        cluster.fit(Cluster(**settings), 1)


@pytest.mark.parametrize(
    ("built", "torch_version", "said"),
    [
        (False, "2.13.0", "quest_dist._cuda is not built; run `python setup.py build_ext"),
        (True, "2.13.0+cpu", "torch 2.13.0+cpu was built without CUDA"),
        (True, "2.13.0+cu130", ""),
        (True, "2.13.0", ""),
    ],
)
def test_what_an_installation_lacks_is_said_with_what_to_do(
    built: bool, torch_version: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"quest_dist._cuda": object() if built else None}
    monkeypatch.setattr(cluster.importlib.util, "find_spec", found.get)
    monkeypatch.setattr(cluster.importlib.metadata, "version", lambda name: torch_version)
    lacking = cluster.lacking_for_gpus()
    assert lacking.startswith(said)
    assert bool(lacking) == bool(said)


def test_the_hardware_of_a_sweep_names_gpus_only_where_they_compute() -> None:
    assert provenance.hardware("cpu").endswith(" cores")
    assert not provenance.hardware("cuda").endswith(" cores")
