"""What takes the place of a sample that training cannot read or decode: another one, the same at every resume."""

from __future__ import annotations

from pipelines.philox import philox

ATTEMPTS = 8  # replacements tried for one place in a batch; beyond that the data is broken, not a sample

_BLOCK = 0x20000  # of the counter; far from the blocks of `pipelines.draw` and `pipelines.synthetic`


def replacement(seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """The id of the sample that stands in for `sample` in `epoch`; attempt 1 if the one of attempt 0 is bad too, ...

    A pure function, so that every rank and every resume agrees. It may be any sample, also one of the same batch.
    """
    word = int(philox(seed, (_BLOCK + attempt, 0, sample, epoch))[0])
    return word % num_samples
