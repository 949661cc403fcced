"""Equally probable symbols: rows of them as one large number each, in log2 K bits a symbol.

```
for each row, for each piece of PIECE symbols (the last may be shorter):
    s_0 + s_1 K + s_2 K^2 + ...    in as many bits as the largest such number needs
```

Bits fill bytes from the lowest on; those that the last byte has left are 0. Where K is a power of two that is plain bit
packing; elsewhere a piece is less than a bit longer than its symbols.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from compand.errors import BitstreamError

PIECE = 4096
"""Symbols of one number. Part of the format."""

Rows = Sequence[tuple[int, int]]
"""Number of symbols of each row, and how many values K they have."""


def size(rows: Rows) -> int:
    """Bytes of rows."""
    return -(-sum(_bits(count, base) for count, base in _pieces(rows)) // 8)


def pack(rows: Sequence[NDArray[np.int64]], bases: Sequence[int]) -> bytes:
    """Bytes of rows of symbols 0 .. K - 1; bases: the K of each row."""
    counts = [(row.size, base) for row, base in zip(rows, bases, strict=True)]
    number, width = 0, 0
    for row, base in zip(rows, bases, strict=True):
        for start in range(0, row.size, PIECE):
            piece = row[start : start + PIECE]
            number |= _join(piece, base) << width
            width += _bits(piece.size, base)
    return number.to_bytes(size(counts), "little")


def unpack(data: bytes, rows: Rows) -> list[NDArray[np.int64]]:
    """Inverse of `pack`. Raises BitstreamError if the bytes are not what it gives for such rows."""
    if len(data) != size(rows):
        raise BitstreamError(f"{len(data)} bytes of indices where {size(rows)} belong: the file is damaged")
    number = int.from_bytes(data, "little")
    result = []
    for count, base in rows:
        parts = [np.zeros(0, np.int64)]
        for piece, _ in _pieces([(count, base)]):
            width = _bits(piece, base)
            parts.append(_split(number & ((1 << width) - 1), piece, base))
            number >>= width
        result.append(np.concatenate(parts))
    if number:
        raise BitstreamError("bits follow the last index: the file is damaged")
    return result


def _pieces(rows: Rows) -> Iterator[tuple[int, int]]:
    for count, base in rows:
        for start in range(0, count, PIECE):
            yield min(PIECE, count - start), base


def _bits(count: int, base: int) -> int:
    return (base**count - 1).bit_length()


def _digits(base: int) -> int:
    """Symbols that 63 bits hold: those are joined in machine words, the words in a large number."""
    return max(int(62 / (base - 1).bit_length()), 1)


def _join(symbols: NDArray[np.int64], base: int) -> int:
    digits = _digits(base)
    padded = np.zeros(-(-symbols.size // digits) * digits, np.int64)
    padded[: symbols.size] = symbols
    words = padded.reshape(-1, digits) @ (np.int64(base) ** np.arange(digits, dtype=np.int64))
    number, factor = 0, base**digits
    for word in reversed(words.tolist()):
        number = number * factor + word
    return number


def _split(number: int, count: int, base: int) -> NDArray[np.int64]:
    digits = _digits(base)
    factor = base**digits
    words = np.empty(-(-count // digits), np.int64)
    for i in range(words.size):
        number, words[i] = divmod(number, factor)
    if number:
        raise BitstreamError("an index lies beyond its codebook: the file is damaged")
    symbols = words[:, None] // (np.int64(base) ** np.arange(digits, dtype=np.int64)) % base
    if symbols.reshape(-1)[count:].any():
        raise BitstreamError("an index lies beyond its codebook: the file is damaged")
    return symbols.reshape(-1)[:count]
