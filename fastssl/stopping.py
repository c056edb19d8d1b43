"""When a run ends before its last step: on a signal, or for a reason that a rank found; all ranks at the same step."""

from __future__ import annotations

import enum
import signal
from typing import Any

from fastssl import dist


class Reason(enum.IntEnum):
    """Why the loop stops, the most serious last: of several ranks' reasons all act on the largest."""

    NONE = 0
    ASKED = 1
    TOO_MANY_BAD = 2
    NOT_FINITE = 3


class StopRequest:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a question the loop asks once a step; all ranks get the same answer.

    Used as a context: the handlers only set a flag, and the ones before return at its end. A second signal of the same
    kind acts as if there were no handler. Several ranks stop one step later than one (`dist.LargestLately`).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __enter__(self) -> StopRequest:
        self.asked, self._largest = False, dist.LargestLately()
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, own: Reason = Reason.NONE) -> Reason:
        """The most serious reason of any rank, `own` or a signal. A collective: every rank must call it once a step."""
        return Reason(self._largest(max(own, Reason.ASKED if self.asked else Reason.NONE)))

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
