"""Follow: keep a copy of the results (MLflow) up to date without holding up the sweep.

The copy is made in a thread of its own, at most every few seconds and only after something
finished. Whatever goes wrong there is a warning, said once: the ledger is the truth, and the copy
can be made again by the same command.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from quest_dist.worker import describe

EVERY = 5.0  # seconds between two copies, at least


class Follower:
    """Runs `copy` in the background after `notify`, and a last time in `finish`."""

    def __init__(self, copy: Callable[[], None], warn: Callable[[str], None]) -> None:
        self._copy, self._warn = copy, warn
        self._wanted, self._stop = threading.Event(), threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._loop, name="follow", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def notify(self) -> None:
        """Say that there is something new."""
        self._wanted.set()

    def finish(self) -> None:
        """Stop the thread and copy a last time, in the caller's."""
        self._stop.set()
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join()
        self._try()

    def _loop(self) -> None:
        while not self._stop.is_set():
            self._wanted.wait()
            self._wanted.clear()
            if self._stop.is_set():
                return
            self._try()
            self._stop.wait(EVERY)

    def _try(self) -> None:
        try:
            self._copy()
        except Exception as error:
            if not self._warned:
                self._warned = True
                self._warn(f"tracking failed, results are in the ledger all the same: {describe(error)}")
