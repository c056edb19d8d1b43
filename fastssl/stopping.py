"""When a run ends before its last step: on a signal, or for a reason that a rank found; all ranks at the same step."""

from __future__ import annotations

import enum
import os
import signal
from typing import Any

from fastssl import dist
from shard_tools import exit_codes


class Reason(enum.IntEnum):
    """Why the loop stops, the most serious last: of several ranks' reasons all act on the largest."""

    NONE = 0
    ASKED = 1
    TOO_MANY_BAD = 2
    NOT_FINITE = 3


class Interrupted(Exception):
    """All ranks have agreed to stop in the middle of something that may be left undone."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name)
        self.reason = reason


class StoppedEarly(BaseException):
    """A signal before the first step: this start has changed nothing. No `except Exception` swallows it."""

    exit_code = exit_codes.STOPPED


class StopRequest:
    """Turns signals into a question the loop asks once a step; all ranks get the same answer.

    Used as a context. SIGTERM, SIGUSR1, Ctrl-C and a lost terminal only set a flag, from `begin` on; before it there is
    nothing to save, and they raise StoppedEarly or KeyboardInterrupt. The handlers of before return at the end.
    Several ranks stop one step later than one (`dist.LargestLately`).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __enter__(self) -> StopRequest:
        self.asked, self.begun, self._largest = False, False, dist.LargestLately()
        ignored = [number for number in self.SIGNALS if signal.getsignal(number) == signal.SIG_IGN]  # nohup
        self._before = {n: signal.signal(n, self._note) for n in self.SIGNALS if n not in ignored}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From here on a signal waits for `agreed`. Raises what it would have raised if one has come already."""
        self.begun = True
        if self.asked:
            raise StoppedEarly("asked to stop")

    def ask(self) -> None:
        """As a signal does, from any thread, for a reason that comes without one."""
        self.asked = True
        if not self.begun:
            os.kill(os.getpid(), signal.SIGTERM)

    def agreed(self, own: Reason = Reason.NONE) -> Reason:
        """The most serious reason of any rank, `own` or a signal. A collective: every rank calls it equally often."""
        return Reason(self._largest(max(own, Reason.ASKED if self.asked else Reason.NONE)))

    def close(self) -> None:
        """After the last `agreed`, on all ranks."""
        self._largest.close()

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True
        if not self.begun:
            raise KeyboardInterrupt if number == signal.SIGINT else StoppedEarly("asked to stop")
