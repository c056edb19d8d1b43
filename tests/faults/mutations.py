"""Seeded damage to files: bits flipped, ends cut, pieces moved, numbers driven to extremes."""

from __future__ import annotations

import random
import re

_EXTREMES = (b"0", b"-1", b"1", b"9" * 9, b"2147483648", b"18446744073709551616", b"1e999", b"9" * 40, b"-0", b"true")
_WORDS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**63, 2**64 - 1)
_SIZES = (b"77777777777\0", b"00000000000\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0", b"            ")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three kinds of damage; never the same bytes."""
    while True:
        damaged = data
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            damaged = rng.choice((_flip, _flip, _cut, _splice, _word, _number))(damaged, rng)
        if damaged != data:
            return damaged


def mutated_tar(data: bytes, rng: random.Random) -> bytes:
    """Damage to one header of a tar, half of the time with a checksum that is right again; or to any of its bytes."""
    headers = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    if rng.random() < 0.3 or not headers:
        return mutated(data, rng)
    place = rng.choice(headers)
    block = bytearray(data[place : place + 512])
    kind = rng.randrange(4)
    if kind == 0:
        block[124:136] = rng.choice(_SIZES)
    elif kind == 1:
        block[156] = rng.choice(b"0123456789gxLKSDVMNX\0")  # a link, a device, an extended header, ...
    elif kind == 2:
        name = rng.choice((b"../x.jpg", b"/etc/x.jpg", b"a\xff\xfe.jpg", b"", b"." * 100, b"a/../../b.jpg", b"x\n.jpg"))
        block[:100] = name.ljust(100, b"\0")
    else:
        block = bytearray(_flip(bytes(block), rng))
    if rng.random() < 0.6:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    damaged = data[:place] + bytes(block) + data[place + 512 :]
    return damaged if damaged != data else mutated_tar(data, rng)


def _flip(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if damaged:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _cut(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return rng.choice((data[:place], data[place:], data[:place] + bytes(rng.randrange(600))))


def _splice(data: bytes, rng: random.Random) -> bytes:
    first, place = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    piece = data[first : first + rng.choice((1, 2, 8, 64, 512))]
    return rng.choice((data[:place] + piece + data[place:], data[:place] + piece + data[place + len(piece) :]))


def _word(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    word = (rng.choice(_WORDS) & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("little", "big")))
    place = rng.randrange(max(1, len(data) - size))
    return data[:place] + word + data[place + size :]


def _number(data: bytes, rng: random.Random) -> bytes:
    """A decimal number in a text."""
    numbers = list(re.finditer(rb"\d+", data))
    if not numbers:
        return _flip(data, rng)
    number = rng.choice(numbers)
    return data[: number.start()] + rng.choice(_EXTREMES) + data[number.end() :]
