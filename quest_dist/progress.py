"""Progress: what a running sweep shows: bars on a terminal, a line every ten seconds elsewhere.

Samples are counted as workers deliver them, one for all points of a unit. Mean scores firm up as
samples arrive; they include what an earlier launch had finished. The display holds its own
reference to the terminal, because Ray's words are kept off standard output meanwhile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from quest_dist.plan import Point, Unit

LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Counts reports and shows them; a context manager around the scheduling of units."""

    def __init__(
        self,
        points: Sequence[Point],
        units: Sequence[Unit],
        records: Callable[[str], Sequence[Mapping[str, Any]]],
        seconds: Callable[[Unit], float],
        workers: str,
        console: Console,
    ) -> None:
        self.console, self.workers = console, workers
        self._points = {point.key: point for point in points}
        self._means: dict[str, list[float]] = {key: [] for key in self._points}
        for key, scores in self._means.items():
            scores += [float(r["score"]) for r in records(key) if r["error"] is None]
        self._total: dict[str, int] = {}
        self._done: dict[str, int] = {}
        for unit in units:
            place = _place(unit.first)
            self._total[place] = self._total.get(place, 0) + len(unit.samples)
        # Work is weighed by estimate, so that long and short tasks share one clock.
        self._weight = {
            p.key: seconds(u) / (len(u.points) * len(u.samples)) for u in units for p in u.points
        }
        self._work = sum(seconds(unit) for unit in units)
        self._worked = 0.0
        self._failed = 0
        self._started = self._line = time.monotonic()
        self._metric: dict[str, str] = {}
        self._shown: str | None = None
        self._live: Live | None = None
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples"),
        )
        self._bar = {place: self._bars.add_task(place, total=n) for place, n in self._total.items()}

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self._display,
                console=self.console,
                refresh_per_second=2,
                redirect_stdout=False,
            )
            self._live.start()
        else:
            self.console.print(f"{self.workers}; {sum(self._total.values())} samples to run")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def report(self, report: Mapping[str, Any]) -> None:
        """Count one delivered sample and its records."""
        records = report["records"]
        for record in records:
            self._worked += self._weight.get(record["point"], 0.0)
            self._metric[record["point"]] = str(record["metric"])
            if record["error"] is None:
                self._means[record["point"]].append(float(record["score"]))
            else:
                self._failed += 1
        if records:
            self._advance(self._points[records[0]["point"]], 1, int(report["sample"]))

    def failure(self, unit: Unit, message: str) -> None:
        """Count the samples of a unit that could not be run."""
        self._failed += len(unit.points) * len(unit.samples)
        self._worked += sum(self._weight.get(p.key, 0.0) for p in unit.points) * len(unit.samples)
        self.console.print(f"[red]failed[/]: {_place(unit.first)}: {message}", highlight=False)
        self._advance(unit.first, len(unit.samples), None)

    def _advance(self, point: Point, samples: int, index: int | None) -> None:
        self._shown = place = _place(point)
        self._done[place] = self._done.get(place, 0) + samples
        self._bars.update(self._bar[place], completed=self._done[place])
        now = time.monotonic()
        finished = sum(self._done.values()) >= sum(self._total.values())
        if self._live is None and (now - self._line >= LINE_EVERY or finished):
            self._line = now
            where = place if index is None else f"{place} sample {index}"
            self.console.print(
                f"{self._status()}; {where}; {self._line_of_means(place)}",
                highlight=False,
                soft_wrap=True,
            )

    def _status(self) -> str:
        done, total = sum(self._done.values()), sum(self._total.values())
        elapsed = time.monotonic() - self._started
        text = f"{clock(elapsed)}  {done}/{total} samples"
        if self._worked > 0 and done < total:
            text += f", about {clock(elapsed * (self._work / self._worked - 1))} left"
        return text + (f", {self._failed} records failed" if self._failed else "")

    def _display(self) -> RenderableType:
        parts: list[RenderableType] = [self._bars]
        if self._shown is not None:
            parts.append(self._table(self._shown))
        parts.append(Text(f"{self._status()} · {self.workers}", style="dim"))
        return Group(*parts)

    def _table(self, place: str) -> Table:
        members = [p for p in self._points.values() if _place(p) == place]
        budgets = sorted({p.budget for p in members if p.budget is not None})
        table = Table("mean so far", title=place, title_justify="left", box=None)
        for budget in [None, *budgets]:
            table.add_column("no budget" if budget is None else str(budget), justify="right")
        for method in dict.fromkeys(p.method.label for p in members):
            cells = [self._cell(members, method, budget) for budget in [None, *budgets]]
            table.add_row(method, *cells)
        return table

    def _cell(self, members: Sequence[Point], method: str, budget: int | None) -> Text:
        for point in members:
            if point.method.label == method and point.budget == budget and self._means[point.key]:
                n = len(self._means[point.key])
                return Text(f"{self._mean(point.key):.1f}", style="dim" if n < 5 else "bold")
        return Text("")

    def _line_of_means(self, place: str) -> str:
        """Each method's mean at its smallest and largest budget."""
        found: dict[str, list[str]] = {}
        members = [p for p in self._points.values() if _place(p) == place and self._means[p.key]]
        for point in sorted(members, key=lambda p: p.budget or 0):
            found.setdefault(point.method.name, []).append(f"{self._mean(point.key):.1f}")
        ends = (f"{name} {'..'.join(dict.fromkeys((v[0], v[-1])))}" for name, v in found.items())
        return " ".join(ends)

    def _mean(self, key: str) -> float:
        mean = sum(self._means[key]) / len(self._means[key])
        return math.exp(mean) if self._metric.get(key) == "perplexity" else mean


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds, or hours and minutes from an hour on."""
    whole = max(0, round(seconds))
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _place(point: Point) -> str:
    return f"{point.task.name} · {point.model.name}"
