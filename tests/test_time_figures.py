"""Figures 8, 9 and 10 from rows that were never measured: values, verdicts, devices apart."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_figures import dot

from quest_dist import figures
from quest_dist.figures import fig08, fig09, fig10, times
from quest_dist.figures.caption import Caption
from quest_dist.spec import canonical
from quest_dist.table import Row, from_csv, to_csv

CAPTION = Caption(hardware="2 CPU cores", commit="1a2b3c4", date="2026-11-21")
CPU = "AMD EPYC, 2 threads (avx2)"
NAMES = {8192: "8k", 16384: "16k", 32768: "32k"}


def timed(
    task: str,
    context: int,
    budget: int | None,
    page_size: int = 16,
    device: str = CPU,
    **facts: float,
) -> Row:
    """A row of a time of six repeats, whose facts have intervals of a tenth."""
    unit = "us" if task == "kernels" else "ms"
    known = {unit: 100.0, "speedup": 1.0} | facts
    details = {
        "facts": known,
        "spans": {name: [0.95 * value, 1.05 * value] for name, value in known.items()},
        "notes": {"device": [device], "dtype": ["bfloat16"], "shape": ["32/32 heads x 128"],
                  "cache": ["cold"], "warm_up": ["4 dropped"], "cuda_graphs": ["off: a CPU"]},
    }  # fmt: skip
    value = known[unit]
    return dot(
        point=f"{task}{context}{budget}{page_size}{device}",
        model="llama2_7b",
        model_label="Llama-2-7B-chat",
        task=f"{task}_{NAMES[context]}",
        task_label=f"{task} {context}",
        method="full" if budget is None else "quest",
        label="Full" if budget is None else "Quest",
        data="random_keys" if task == "kernels" else "random_weights",
        budget=budget,
        page_size=page_size,
        metric="attention_us" if task == "kernels" else "step_ms",
        n=6,
        n_expected=6,
        score=value,
        low=0.95 * value,
        high=1.05 * value,
        context_tokens=float(context),
        details=canonical(details),
    )


def kernels(device: str = CPU) -> list[Row]:
    """Full at 156 us and 613.6 us, Quest as in the paper's Figure 9 at 8K and 32K, budget 4096."""
    rows = []
    for context, full, parts in (
        (8192, 155.8, (11.6, 2.9, 77.5)),
        (32768, 613.6, (43.3, 2.0, 79.7)),
    ):
        rows.append(timed("kernels", context, None, device=device, us=full, attend_us=full))
        shares = dict(zip(("score", "select", "attend"), parts, strict=True))
        facts = {f"{name}_us": us for name, us in shares.items()}
        facts |= {f"{name}_of_full": us / full for name, us in shares.items()}
        facts |= {"us": sum(parts), "speedup": full / sum(parts)}
        rows.append(timed("kernels", context, 4096, device=device, **facts))
        rows.append(timed("kernels", context, 4096, page_size=8, device=device, **facts))
    return rows


def steps(device: str = CPU) -> list[Row]:
    """The paper's 32K of Figure 10, full and a budget of 2048."""
    ratio = 36.8 / 21.2
    return [
        timed("textgen", 32768, None, device=device, ms=36.8),
        timed("textgen", 32768, 2048, device=device, ms=21.2, speedup=ratio),
    ]


def drawn(name: str, rows: Sequence[Row], path: Path) -> list[dict[str, str]]:
    again = from_csv(to_csv(rows))
    png, pdf, data = figures.draw(name, again, path, CAPTION)
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert pdf.stat().st_size > 10_000
    with data.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def words(figure: object) -> str:
    return " ".join(text.get_text() for text in reversed(figure.texts))  # type: ignore[attr-defined]


def test_figure_8_is_relative_to_full_with_times_in_the_csv(tmp_path: Path) -> None:
    lines = drawn("fig08", kernels(), tmp_path)
    ours = [line for line in lines if line["series"] == "measured"]
    [estimate] = [
        line for line in ours
        if (line["part"], line["context"], line["page_size"]) == ("fig08a", "32768", "16")
    ]  # fmt: skip
    assert float(estimate["value"]) == pytest.approx(43.3 / 613.6)
    assert float(estimate["time"]) == 43.3
    assert float(estimate["low"]) < float(estimate["value"]) < float(estimate["high"])
    theirs = [line for line in lines if line["series"] == "paper" and line["part"] == "fig08a"]
    assert {(line["page_size"], line["context"], line["value"]) for line in theirs} == {
        *(("16", "8192", "0.096"), ("16", "32768", "0.095")),
        *(("8", "8192", "0.164"), ("8", "32768", "0.176")),
    }
    full = [line for line in ours if line["part"] == "fig08b" and line["budget"] == ""]
    assert [float(line["value"]) for line in full] == pytest.approx([155.8 / 613.6, 1.0])
    assert {line["part"] for line in ours} == set(fig08.PARTS)


def test_figure_9_speaks_of_both_contradictions_and_stacks_the_parts(tmp_path: Path) -> None:
    lines = drawn("fig09", [row for row in kernels() if fig09.takes(row)], tmp_path)
    wholes = [line for line in lines if (line["part"], line["budget"]) == ("fig09", "4096")]
    pairs = [(line["series"], round(float(line["value"]), 3)) for line in wholes]
    assert pairs[:2] == [("measured", 0.591), ("paper", 0.591)]
    figure, _ = fig09.draw([row for row in kernels() if fig09.takes(row)], CAPTION)
    said = words(figure)
    for text in ("7.03x is 2048 at 32K", "205 and 156 us", "AMD EPYC, 2 threads", "bfloat16",
                 "32/32 heads x 128", "Cache cold", "n = 6 repeats", "random keys and values",
                 "not comparable: other hardware"):  # fmt: skip
        assert text in said
    assert "generated" not in said


def test_figure_10_says_what_is_not_run(tmp_path: Path) -> None:
    lines = drawn("fig10", steps(), tmp_path)
    assert (lines[0]["part"], lines[0]["value"]) == ("fig10a", "1.0")
    four_bit = [line for line in lines if line["part"] == "fig10b"]
    assert len(four_bit) == 15
    assert {(line["verdict"], line["series"]) for line in four_bit} == {("not run", "paper")}
    found = figures.verdicts("fig10", steps())
    assert str(found["fig10b"]) == "not run: no points with 4-bit weights"
    assert str(found["fig10a"]) == (
        f"not comparable: other hardware (ours {CPU}, the paper RTX 6000 Ada)"
    )


def test_times_are_judged_on_the_papers_own_gpu_alone() -> None:
    own = "NVIDIA GeForce RTX 4090"
    assert figures.verdicts("fig09", kernels(own))["fig09"].verdict == "reproduced"
    for part in fig08.PARTS:
        assert figures.verdicts("fig08", kernels())[part].verdict == "not comparable"
    group = times.groups(kernels(own))[0]
    assert times.judge("fig09", group, (0.5, 0.45, 0.55), 0.59).verdict == "differs"
    assert times.judge("fig09", group, (0.5, 0.3, 0.7), 0.59).verdict == "within interval"
    assert times.judge("fig09", group, (0.5, math.nan, math.nan), 0.59).verdict == "not comparable"
    other = replace(group, model="Llama-3.1-8B")
    assert times.judge("fig09", other, (0.5, 0.3, 0.7), 0.59).reason.startswith("other model")
    assert figures.verdicts("fig10", steps("NVIDIA RTX 6000 Ada Generation"))["fig10a"].verdict == (
        "reproduced"
    )


def test_figure_10_has_4_bit_weights_beside_16_bit_ones(tmp_path: Path) -> None:
    packed = [
        timed("textgen_w4", 32768, None, device="RTX 6000 Ada", ms=29.6),
        timed("textgen_w4", 32768, 2048, device="RTX 6000 Ada", ms=13.3, speedup=29.6 / 13.3),
    ]
    rows = [*steps("RTX 6000 Ada"), *packed]
    assert all(map(fig10.takes, rows))
    lines = drawn("fig10", rows, tmp_path)
    ours = {
        (line["part"], line["budget"]): round(float(line["value"]), 3)
        for line in lines
        if line["series"] == "measured"
    }
    assert ours == {
        **{("fig10a", ""): 1.0, ("fig10a", "2048"): 0.576},
        **{("fig10b", ""): 1.0, ("fig10b", "2048"): 0.449},
    }
    assert {line["weights"] for line in lines if line["part"] == "fig10b"} == {"4 bits"}
    found = figures.verdicts("fig10", rows)
    assert {part: verdict.verdict for part, verdict in found.items()} == {
        **{"fig10a": "reproduced", "fig10b": "reproduced"}
    }
    missing = [replace(row, n=0, status="missing", details="{}") for row in packed]
    found = figures.verdicts("fig10", [*steps("RTX 6000 Ada"), *missing])
    assert found["fig10b"].verdict == "not run"


@pytest.mark.parametrize("module", [fig08, fig09, fig10])
def test_devices_are_kept_apart_and_the_caption_says_so(module: object, tmp_path: Path) -> None:
    made = steps if module is fig10 else kernels
    rows = [row for d in (CPU, "NVIDIA H100") for row in made(d) if module.takes(row)]  # type: ignore[attr-defined]
    figure, plotted = module.draw(rows, CAPTION)  # type: ignore[attr-defined]
    alone, _ = module.draw([row for row in made() if module.takes(row)], CAPTION)  # type: ignore[attr-defined]
    assert len(figure.axes) == 2 * len(alone.axes)
    said = words(figure)
    assert "their times do not belong together" in said
    assert "Llama-2-7B-chat, bfloat16, on NVIDIA H100" in said
    assert {line["device"] for line in plotted if line["series"] == "measured"} == {
        *(CPU, "NVIDIA H100")
    }


def test_a_row_of_two_devices_belongs_to_neither() -> None:
    mixed = kernels()[1]
    mixed = replace(mixed, details=mixed.details.replace(f'"{CPU}"', f'"{CPU}","RTX 4090"'))
    found = times.groups([*kernels(), mixed])
    assert [group.device for group in found] == [CPU, f"{CPU} and RTX 4090"]
    assert times.judge("fig09", found[1], (0.5, 0.4, 0.6), 0.5).verdict == "not comparable"


@pytest.mark.parametrize("name", ["fig08", "fig09", "fig10"])
def test_what_was_not_run_is_said(name: str, tmp_path: Path) -> None:
    made = steps() if name == "fig10" else kernels()
    nothing = [
        replace(row, n=0, score=math.nan, status="missing", details="{}", metric="", page_size=16)
        for row in made
    ]
    assert drawn(name, nothing, tmp_path) == []
    part = "fig10a" if name == "fig10" else "fig08a" if name == "fig08" else name
    assert figures.verdicts(name, nothing)[part].verdict == "not run"
    some = [made[0], *nothing[1:]]
    assert all(line["point"] == made[0].point for line in drawn(name, some, tmp_path)
               if line["series"] == "measured")  # fmt: skip
