"""FlashInfer's door: what it refuses, that the library takes what is passed, and its results."""

from __future__ import annotations

import inspect
from typing import Any

import gpu
import paged_decode
import pytest
import torch
import transformers
from cache_harness import METHODS, Stream, decode, method_spec
from pools import Case, close, name, random_lists, shared

import quest_dist
from quest_dist import on_flashinfer, ops
from quest_dist.batch import Group
from quest_dist.compose import composed
from quest_dist.latency import page_rule
from quest_dist.methods.full import Full
from quest_dist.methods.h2o import H2O
from quest_dist.methods.oracle_page import OraclePage
from quest_dist.methods.quest import Quest
from quest_dist.plan import Spec
from quest_dist.prepare import prepare

needs_flashinfer = pytest.mark.skipif(
    on_flashinfer.version() is None, reason="needs the extra quest_dist[flashinfer]"
)
CASE = Case(torch.bfloat16, 4, 16)


def attend(**changed: Any) -> ops.Attended:
    pool, q = shared(CASE)
    index, count = random_lists(CASE, CASE.kv_heads, "pages")
    given = {
        **{"q": q, "kv": pool.kv, "page_table": pool.table, "lengths": pool.lengths},
        **{"index": index, "count": count, "through": "flashinfer"},
    }
    return ops.attend(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "backend=flashinfer runs on CUDA devices only, not on the cpu"),
        ({"unit": "tokens"}, "attend: unit is 'tokens'; expected 'pages' through flashinfer"),
        ({"probabilities": True}, "attend: probabilities is True; expected False through"),
        ({"through": "triton"}, "attend: through is 'triton'; expected one of compiled, flashinf"),
    ],
)
def test_calls_that_it_cannot_serve(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attend(**changed)


def test_what_it_does_not_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="takes float16 or bfloat16, not float32"):
        on_flashinfer.check("cuda", "float32", 128)
    with pytest.raises(ValueError, match="takes head dimensions 64, 128, 256, not 80"):
        on_flashinfer.check("cuda", "float16", 80)
    monkeypatch.setattr("importlib.util.find_spec", lambda library: None)
    with pytest.raises(ValueError, match=r"not installed; pip install 'quest_dist\[flashinfer\]'"):
        on_flashinfer.check("cuda", "float16", 128)


def test_methods_that_list_tokens_are_refused_and_pages_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda library: library)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0")
    for method in (Full(backend="flashinfer"), Quest(backend="flashinfer"), OraclePage()):
        method.check_backend("cuda", "bfloat16", 128)
    with pytest.raises(ValueError, match="attends to pages, but H2O lists tokens; choose compiled"):
        H2O(backend="flashinfer").check_backend("cuda")
    with pytest.raises(ValueError, match="backend='cuda': choose one of compiled, flashinfer"):
        Quest(backend="cuda").check_backend("cpu")  # type: ignore[arg-type]


SWEEP = ["grid.model=[smollm2]", "grid.task=[passkey]", "grid.method=[quest]", "grid.budget=[64]"]


def test_a_sweep_is_refused_before_a_worker_starts() -> None:
    with pytest.raises(ValueError, match="method quest: backend=flashinfer runs on CUDA devices"):
        prepare(composed([*SWEEP, "method.quest.backend=flashinfer"]))
    tokens = ["grid.method=[h2o]", "+method.h2o.backend=flashinfer"]
    with pytest.raises(ValueError, match="method h2o: backend=flashinfer attends to pages"):
        prepare(composed([*SWEEP, *tokens]))


def test_the_backend_is_part_of_a_point() -> None:
    ours, theirs = (Spec("quest", {"label": "Quest", "backend": b}) for b in ops.THROUGH)
    assert ours.canonical() != theirs.canonical()


def test_a_patched_model_on_the_cpu_is_refused() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=8,
    )
    model = transformers.LlamaForCausalLM(config)
    with (
        pytest.raises(ValueError, match="runs on CUDA devices only, not on the cpu"),
        quest_dist.patched(model, "quest", budget=64, dense_layers=0, backend="flashinfer"),
    ):
        pass


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_dense_layers_and_selections_go_through_it(dense_layers: int) -> None:
    with pytest.raises(ValueError, match="flashinfer"):
        decode(
            Stream.random(20),
            lambda: Quest(backend="flashinfer"),
            [8],
            prefix=16,
            dense_layers=dense_layers,
        )


def test_latency_mode_refuses_it() -> None:
    with pytest.raises(ValueError, match="quest: backend=flashinfer plans each call on the host"):
        page_rule(Group(Quest(backend="flashinfer"), [64], 0))


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_select_pages_offer_it(method: str) -> None:
    spec = method_spec(method)
    assert ("backend" in spec.settings) == spec.build().selects_pages
    assert spec.build().backend == "compiled"


@needs_flashinfer
def test_the_library_takes_what_is_passed() -> None:
    import flashinfer

    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    plan = inspect.signature(getattr(decode, "_plan_impl", decode.plan)).parameters
    sizes = ("num_qo_heads", "num_kv_heads", "head_dim", "page_size")
    assert [*plan][1:8] == ["indptr", "indices", "last_page_len", *sizes]
    assert {"q_data_type", "kv_data_type", "sm_scale"} <= set(plan)
    buffers = [f"paged_kv_{x}_buffer" for x in ("indptr", "indices", "last_page_len")]
    made = inspect.signature(decode).parameters
    assert {"kv_layout", "use_cuda_graph", "use_tensor_cores", *buffers} <= set(made)
    run = inspect.signature(inspect.unwrap(decode.run)).parameters
    assert [*run][1:3] == ["q", "paged_kv_cache"]
    assert "return_lse" in run
    ours = paged_decode.BatchDecodeWithPagedKVCacheWrapper
    assert set(inspect.signature(ours).parameters) <= set(made)
    assert set(inspect.signature(ours.plan).parameters) <= set(plan)


ON_GPU = [
    Case(d, g, s, 128) for d in (torch.bfloat16, torch.float16) for g in (1, 4) for s in (16,)
]


@needs_flashinfer
@pytest.mark.parametrize("case", [*ON_GPU, Case(torch.bfloat16, 5, 32)], ids=name)
@pytest.mark.parametrize("each", ["everything", "row", "kv head", "query head"])
@pytest.mark.gpu
@pytest.mark.skipif(not gpu.available, reason="needs a CUDA device")
def test_our_kernels_agree_with_it(case: Case, each: str) -> None:
    pool, q = shared(case)
    lists = {"row": 1, "kv head": case.kv_heads, "query head": case.heads}.get(each)
    given = (None, None) if lists is None else random_lists(case, lists, "pages")
    arguments = [gpu.there(x) for x in (q, pool.kv, pool.table, pool.lengths, *given)]
    ours = ops.attend(*arguments)
    theirs = ops.attend(*arguments, through="flashinfer")
    assert close(theirs.out.cpu(), ours.out.double().cpu(), "prefill bf16")
    assert close(theirs.lse.cpu(), ours.lse.double().cpu(), "prefill bf16")
    assert torch.equal(theirs.attended, ours.attended)
    assert torch.equal(theirs.read, ours.read)


@needs_flashinfer
@pytest.mark.gpu
@pytest.mark.skipif(not gpu.available, reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["full", "quest"])
def test_a_model_on_a_gpu_says_nearly_the_same(method: str) -> None:
    config = transformers.LlamaConfig(
        **{"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 97},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    tokens = torch.randint(97, (2, 300), device="cuda")
    budget = {} if method == "full" else {"budget": 128}
    logits = []
    for backend in ops.THROUGH:
        with quest_dist.patched(model, method, backend=backend, **budget), torch.inference_mode():
            cache = model(tokens[:, :-1]).past_key_values
            logits.append(model(tokens[:, -1:], past_key_values=cache).logits.double().cpu())
    assert logits[1].isfinite().all()
    if method == "full":  # a rounding may let Quest's last layer choose another page
        assert close(logits[1], logits[0], "prefill bf16")
