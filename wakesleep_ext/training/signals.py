"""Let a run end after its current step if the process receives SIGINT (Ctrl-C) or SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Request = Callable[[], "signal.Signals | None"]
"""Returns the signal that asks a run to stop, or None."""


class StoppedError(Exception):
    """A signal has stopped a run, which was saved; the message names the signal and the step."""

    def __init__(self, number: signal.Signals, reason: str) -> None:
        super().__init__(reason)
        self.status = 128 + number
        """Exit status of the process: 130 for SIGINT, 143 for SIGTERM, as shells report them."""


@contextmanager
def requests() -> Iterator[Request]:
    """Note the first signal instead of obeying it, while the context is active. The second one ends the process.

    Yields:
        A function that returns the signal, or None if there was none.
    """
    received: list[signal.Signals] = []

    def note(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # the second signal needs no Python, so it also ends a step that hangs

    before = {each: signal.signal(each, note) for each in _SIGNALS}
    try:
        yield lambda: received[0] if received else None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
