"""Which samples training does not decode, and what takes the place of one: another, the same at every resume."""

from __future__ import annotations

from pipelines.philox import philox
from shard_tools.headers import Refused, size_of

ATTEMPTS = 8  # replacements tried for one place in a batch; beyond that the data is broken, not a sample

_BLOCK = 0x20000  # of the counter; far from the blocks of `pipelines.draw` and `pipelines.synthetic`


def replacement(seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """The id of the sample that stands in for `sample` in `epoch`; attempt 1 if the one of attempt 0 is bad too, ...

    A pure function, so that every rank and every resume agrees. It may be any sample, also one of the same batch.
    """
    word = int(philox(seed, (_BLOCK + attempt, 0, sample, epoch))[0])
    return word % num_samples


def header_fault(file: bytes, size: tuple[int, int]) -> str:
    """Why an image of `size` (width, height), as the index has it, must not be decoded; "" if it may be."""
    try:
        claimed = size_of(file)
    except Refused as refused:
        return str(refused)
    if claimed == size:
        return ""
    return f"its header claims {claimed[0]} x {claimed[1]} px, but its index {size[0]} x {size[1]}"
