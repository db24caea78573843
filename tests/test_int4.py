"""Weights in 4 bits: rounding, packing, and the kernels against float64 on the same codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pools import close
from torch import Tensor

from quest_dist import int4, ops
from quest_dist.int4 import Int4

#: outputs, inputs, group: whole tiles and groups, and neither.
SIZES = [(64, 256, 128), (20, 72, 128), (33, 328, 128), (16, 64, 32), (5, 8, 64), (80, 200, 64)]


def weights(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=generator)


def packed(outputs: int, inputs: int, group: int = 128) -> Int4:
    return int4.pack(int4.quantise(weights(outputs, inputs), group), group)


def inputs(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return weights(rows, width, seed=1).to(dtype)


def on(isa: str, x: Any) -> Any:
    """Where the kernels of an `isa` take it."""
    if isa != "cuda":
        return x
    if isinstance(x, Int4):
        return Int4(x.data.cuda(), x.outputs, x.inputs, x.group)
    return x.cuda()


@pytest.mark.parametrize(("outputs", "width", "group"), SIZES)
def test_rounding_is_to_the_nearest(outputs: int, width: int, group: int) -> None:
    weight = weights(outputs, width) * torch.logspace(-3, 2, outputs)[:, None]
    codes = int4.quantise(weight, group)
    assert codes.codes.max() == 15
    assert codes.zero.max() <= 15
    scale = codes.scale.float().repeat_interleave(group, 1)[:, :width]
    error = (weight - codes.widened(group)).abs()
    inside = (codes.codes > 0) & (codes.codes < 15)
    # Codes are of the scale as fp16 keeps it; the ends of a range give half a step to the zero.
    assert (error <= 0.5001 * scale)[inside].all()
    assert (error <= 1.01 * scale).all()
    assert torch.equal(int4.rounded(weight, group), codes.widened(group))


def test_what_has_one_sign_or_nothing_keeps_its_value() -> None:
    for value in (0.0, 3.0, -0.25):
        weight = torch.full((2, 128), value)
        got = int4.quantise(weight).widened(128)
        assert torch.allclose(got, weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("outputs", "width", "group"), SIZES)
def test_what_is_packed_is_unpacked(outputs: int, width: int, group: int) -> None:
    codes = int4.quantise(weights(outputs, width), group)
    codes = int4.Codes(codes.codes, codes.scale, codes.zero.random_(0, 16))
    again = int4.unpack(int4.pack(codes, group))
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(again, name), getattr(codes, name)), name


def test_bytes_are_what_the_format_says() -> None:
    assert int4.pack(int4.quantise(weights(256, 4096))).data.nbytes == 256 * 4096 * 0.53125


@pytest.mark.parametrize(("outputs", "width", "group"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 9, 20])
def test_few_rows(
    isa: str, outputs: int, width: int, group: int, dtype: torch.dtype, rows: int
) -> None:
    weight, x = packed(outputs, width, group), inputs(rows, width, dtype)
    want = x.double() @ int4.unpack(weight).widened(group).double().T
    got = int4.linear(on(isa, x), on(isa, weight)).cpu()
    assert got.dtype == dtype
    assert close(got, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(isa: str, dtype: torch.dtype) -> None:
    weight, x = on(isa, packed(200, 392)), on(isa, inputs(16, 392, dtype))
    together = int4.linear(x, weight)
    for r in range(16):
        assert torch.equal(int4.linear(x[r], weight), together[r])
    for rows in (2, 3, 5, 11):
        assert torch.equal(int4.linear(x[:rows], weight), together[:rows])


def test_threads_do_not_change_a_bit() -> None:
    weight, x = packed(1040, 2048), inputs(3, 2048, torch.bfloat16)
    ops.set_threads(1)
    one = int4.linear(x, weight)
    ops.set_threads(3)
    three = int4.linear(x, weight)
    ops.set_threads(None)
    assert torch.equal(one, three)


@pytest.mark.parametrize(("outputs", "width", "group"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widened(isa: str, outputs: int, width: int, group: int, dtype: torch.dtype) -> None:
    weight = packed(outputs, width, group)
    want = int4.unpack(weight).widened(group).to(dtype)
    assert torch.equal(int4.widened(on(isa, weight), dtype).cpu(), want)
    some = int4.widened(on(isa, weight), dtype, 0, 3).cpu()
    assert torch.equal(some, want[:3])
    if outputs > 17:
        assert torch.equal(int4.widened(on(isa, weight), dtype, 16, 99).cpu(), want[16:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_and_any_shape(isa: str, dtype: torch.dtype) -> None:
    weight, x = packed(1100, 256), inputs(200, 256, dtype)
    bias = weights(1, 1100)[0].to(dtype)
    whole = int4.unpack(weight).widened(128).to(dtype).double()
    want = x.double() @ whole.T + bias.double()
    got = int4.linear(on(isa, x.view(4, 50, 256)), on(isa, weight), on(isa, bias)).cpu()
    assert got.shape == (4, 50, 1100)
    off = (got.view(200, 1100).double() - want).abs().max() / want.abs().max()
    assert off <= 8 * torch.finfo(dtype).eps  # torch's sums; rounded with and without the bias


def test_a_gradient_reaches_the_input() -> None:
    weight, x = packed(40, 64), inputs(2, 64, torch.float32).requires_grad_()
    int4.linear(x, weight).sum().backward()
    want = int4.unpack(weight).widened(128).sum(0)
    assert x.grad is not None
    assert torch.allclose(x.grad, want.expand(2, -1), rtol=1e-5, atol=1e-5)


def test_the_reference_agrees() -> None:
    weight, x = packed(40, 328), inputs(2, 328, torch.float64)
    with ops.backend("reference"):
        got = int4.linear(x, weight)
    assert close(got, x @ int4.unpack(weight).widened(128).double().T, torch.float64)


@pytest.mark.parametrize(
    ("width", "group", "said"),
    [(20, 128, "inputs=20 is no multiple of 8"), (64, 20, "group=20 is no multiple of 8")],
)
def test_sizes_that_cannot_be_packed(width: int, group: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        packed(16, width, group)


def test_wrong_arguments_are_named() -> None:
    weight, x = packed(16, 64), inputs(1, 64, torch.float32)
    with pytest.raises(ValueError, match=r"linear4: x is of 32 channels; expected the 64 inputs"):
        int4.linear(x[:, :32], weight)
    with pytest.raises(ValueError, match=r"linear4: weight.data is of 1 x 9 lines; expected 2 x 9"):
        int4.linear(x, Int4(weight.data, 32, 64, 128))
    with pytest.raises(ValueError, match=r"linear4: x is torch.float16; expected"):
        int4.linear(x.half(), weight)
    with pytest.raises(ValueError, match=r"widen4: first is 8; expected a multiple of 16 below 16"):
        int4.widened(weight, torch.float32, 8)
