"""Follow: keep a copy of the results (MLflow) up to date without holding up the sweep.

The copy is made in a thread of its own, only after something changed, at most every few seconds and
for at most a fiftieth of the driver's time. The ledger is the truth; the copy can be made again by
the same command.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

EVERY = 5.0  # seconds between two copies, at least
SHARE = 0.02  # of the time may be computing for copies; waiting for a server is not
log = logging.getLogger(__name__)


class Follower:
    """Calls `copy` in the background after `notify`, and before that, once and at once, `first`."""

    def __init__(self, copy: Callable[[], object], first: Callable[[], object]) -> None:
        self._copy, self._first = copy, first
        self._changed, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="follow", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def notify(self) -> None:
        """Say that there is something new."""
        self._changed.set()

    def stop(self) -> None:
        """Stop after the copy that is being made, if one is."""
        self._stop.set()
        self._changed.set()
        self._thread.join()

    def _loop(self) -> None:
        self._call(self._first)
        while True:
            self._changed.wait()
            if self._stop.is_set():
                return
            self._changed.clear()
            begin = time.thread_time()
            self._call(self._copy)
            self._stop.wait(max(EVERY, (time.thread_time() - begin) / SHARE))

    @staticmethod
    def _call(copy: Callable[[], object]) -> None:
        try:
            copy()
        except Exception as error:  # a copy that fails must not stop the sweep
            log.warning("no copy was made: %s: %s", type(error).__name__, error)
