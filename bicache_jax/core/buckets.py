"""Shape buckets: array sizes are rounded up to a few values, so that a mix of requests compiles only a few programs.

| what | sizes | most waste |
|---|---|---|
| tokens (P, U) | 0, 32, 64, 96, 128, 192, 256, then four to an octave: 320, 384, 448, 512, ... | 1/3, from 256 1/5 |
| rows, prefixes (B, G) | two to an octave: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... | a third |
| layers | multiples of 4, at most L | 3 layers |
| block (W) | multiples of 8 to 64, then of 32 | 31 positions |

A conversation grows with each turn, so its prefix takes powers of two and its suffix multiples of 128: waiting for the
compiler at every turn would cost more than the padding.
"""

from __future__ import annotations


def length_bucket(tokens: int) -> int:
    """Smallest token bucket that holds `tokens`; 0 stays 0."""
    step = 32 if tokens <= 128 else 64 if tokens <= 256 else 1 << ((tokens - 1).bit_length() - 3)
    return -(-tokens // step) * step


def prefix_bucket(tokens: int, *, growing: bool) -> int:
    """P for a prefix of `tokens`: its token bucket, or, in a conversation, a power of two from 64 on; 0 stays 0."""
    if not growing:
        return length_bucket(tokens)
    return 0 if not tokens else max(64, 1 << (tokens - 1).bit_length())


def suffix_bucket(tokens: int, *, growing: bool) -> int:
    """U for a suffix of `tokens`: its token bucket, or, in a conversation, a multiple of 128."""
    return -(-tokens // 128) * 128 if growing else length_bucket(tokens)


def count_bucket(count: int) -> int:
    """Smallest bucket of rows or prefixes that holds `count`; at least 1."""
    if count <= 1:
        return 1
    octave = 1 << (count - 1).bit_length()
    return octave * 3 // 4 if count <= octave * 3 // 4 else octave


def layer_bucket(layers: int, limit: int) -> int:
    """Smallest multiple of 4 that holds `layers`, at most `limit`; 0 stays 0."""
    return min(-(-layers // 4) * 4, limit)


def width_bucket(positions: int) -> int:
    """Smallest block width that holds `positions`."""
    step = 8 if positions <= 64 else 32
    return -(-positions // step) * step
