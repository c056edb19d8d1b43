"""The counter-based generator Philox4x32-10: random numbers as a pure function of what they are for.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Written here because the generators of NumPy and
torch are streams: their n-th number needs a state, and NumPy does not promise the same stream in its next version.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Round multipliers and key increments of Philox4x32, table 2 of the paper.
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_INCREMENT_0, _INCREMENT_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)

Words = npt.NDArray[np.uint64]


def philox(seed: int, counter: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]) -> Words:
    """Four random 32-bit words for each counter: uint64 (4, ...) with values below 2**32.

    seed        the key, in [0, 2**64)
    counter     four numbers in [0, 2**32), or arrays of them that broadcast together
    """
    x0, x1, x2, x3 = np.broadcast_arrays(*(np.asarray(part, dtype=np.uint64) for part in counter))
    key_0, key_1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(_ROUNDS):
        product_0, product_1 = x0 * _MULTIPLIER_0, x2 * _MULTIPLIER_1
        x0 = (product_1 >> _HALF) ^ x1 ^ np.uint64(key_0)
        x2 = (product_0 >> _HALF) ^ x3 ^ np.uint64(key_1)
        x1, x3 = product_1 & _LOW, product_0 & _LOW
        key_0, key_1 = (key_0 + _INCREMENT_0) & 0xFFFFFFFF, (key_1 + _INCREMENT_1) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3])


def unit(words: Words) -> npt.NDArray[np.float64]:
    """Words of 32 bits as numbers in [0, 1), all exact in float64."""
    return words.astype(np.float64) * 2.0**-32


def check_seed(seed: int) -> None:
    """Raises ValueError unless `seed` is a key that `philox` takes."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"run.seed is {seed}, but must be a whole number from 0 to 2**64 - 1")
