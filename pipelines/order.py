"""Which samples make step t, as a pure function of (data, seed, epoch): the same for any number of ranks.

Step t of an epoch takes places [t*G, (t+1)*G) of the epoch's permutation, G being the global batch. Rank r of W takes
the r-th of W equal parts of them. The tail of N % G samples, other ones in each epoch, is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipelines.philox import philox

_VIEW = 0xFFFFFFFF  # the place of the view number in the counter; no view has it, so order and draws are independent
_SAMPLE_BLOCK, _SHARD_BLOCK = 0, 1
_PIECE = 2**15  # samples at a time, so that the generator works in the cache

Order = npt.NDArray[np.int64]


def order(num_samples: int, seed: int, epoch: int) -> Order:
    """All sample ids, shuffled over the whole data set."""
    return np.argsort(_keys(_SAMPLE_BLOCK, num_samples, seed, epoch), kind="stable")


def windowed_order(shard_sizes: Sequence[int], seed: int, epoch: int, window: int = 16) -> Order:
    """All sample ids, for network storage: shards shuffled, `window` of them open at a time and shuffled together.

    shard_sizes     samples of each shard; ids count through the shards
    The samples of a window all come before those of the next, so that a shard is read in one stretch of the epoch.
    """
    place_of_shard = np.argsort(shard_order(len(shard_sizes), seed, epoch))
    window_of_sample = np.repeat((place_of_shard // window).astype(np.int32), shard_sizes)
    return np.lexsort((_keys(_SAMPLE_BLOCK, len(window_of_sample), seed, epoch), window_of_sample))


def shard_order(num_shards: int, seed: int, epoch: int) -> Order:
    """All shards in the order in which `windowed_order` opens them."""
    return np.argsort(_keys(_SHARD_BLOCK, num_shards, seed, epoch), kind="stable")


def rows_for_step(permutation: Order, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Order:
    """The ids that `rank` gets in step `step` of the epoch ordered by `permutation`; batch_size is the global batch."""
    share = batch_size // world
    first = step * batch_size + rank * share
    return permutation[first : first + share]


def _keys(block: int, count: int, seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    """One random 64-bit number each; sorting by them shuffles, and unlike a library's shuffle never changes."""
    keys = np.empty(count, dtype=np.uint64)
    for first in range(0, count, _PIECE):
        ids = np.arange(first, min(first + _PIECE, count))
        high, low, _, _ = philox(seed, (block, _VIEW, ids, epoch))
        keys[first : first + len(ids)] = high << np.uint64(32) | low
    return keys
