"""ctrl-C, SIGTERM, a closed terminal: the first asks for a checkpoint and a clean end, the second ends it."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from executor import ui

EXIT_CODE = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal broke in.

    A class of its own: where KeyboardInterrupt itself leaves an `exec` of some library, CPython remembers it
    and ends the process by SIGINT in place of its exit code (`Python/pythonrun.c`, run_eval_code_obj).
    """


class StopRequest:
    """Between `__enter__` and `__exit__` signals are noted instead of breaking in.

    `graceful` False: the first signal raises KeyboardInterrupt where it strikes (loading, nothing to save
    yet).
    """

    def __init__(self) -> None:
        self.requested = False
        self.graceful = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            # nohup and background jobs of a shell have some ignored, and are to stay so
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            # a checkpoint being written stays under .partial and is swept away by the next run
            ui.restore_terminal()
            os._exit(EXIT_CODE)
        self.requested = True
        if not self.graceful:
            raise Stopped
        ui.say("stopping after this step; a checkpoint will be written (again to stop at once)")
