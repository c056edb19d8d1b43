"""What a command's exit code says, the same for all commands; docs/reliability.md has the faults that end in each.

An error that a user can mend carries its code as `exit_code`; ValueErrors without one mean BAD_INPUT.
"""

from __future__ import annotations

DONE = 0
BUG = 1  # an exception that nobody foresaw, with its traceback
BAD_INPUT = 2  # a setting is wrong, or data is not there
TOO_MANY_BAD = 3  # bad samples, more than loader.max_bad; saved
DISK_FULL = 4
LOCKED = 5  # another process works on the same folder
HANG = 6  # no progress within run.timeout_s, stacks are printed
DAMAGED = 7  # bytes that are not those that were written
NOT_FINITE = 8  # run.max_rejected steps in a row had a loss or a gradient of NaN or infinity; saved
PEER_FAILED = 9  # another rank failed, which has said why
STOPPED = 75  # on request, saved: EX_TEMPFAIL, the same command goes on
INTERRUPTED = 130  # Ctrl-C where there is nothing to save


def code_of(error: BaseException) -> int:
    """The exit code of an error that a user can mend."""
    return getattr(error, "exit_code", BAD_INPUT)
