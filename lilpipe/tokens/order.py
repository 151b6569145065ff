"""The order of rows: maps a position in a run to a row of a stream, and a row to its positions.

Both directions are pure functions, so a run resumes from its step number, and no log is needed to find the steps that
saw a document. The stream of position k comes from a fixed interleaving that keeps the shares in every prefix. The
row within the stream comes from a permutation of the stream's rows, a different one in each epoch. All functions are
vectorized: a batch costs about as much as a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from itertools import accumulate

import numpy as np

PARTS = 1_000_000
"""Shares are rounded to multiples of 1 / PARTS, so that integer arithmetic is exact: 2 x rows x PARTS < 2**63."""
NUM_ROUNDS = 6
"""Rounds of the Feistel network: four make it pseudo-random (Luby and Rackoff 1988), small domains need more."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the increment of SplitMix64
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT, _KEEP_HIGH = np.uint64(31), np.uint64(16)
_ONE = np.uint64(1)
_ROUND_OFFSETS = np.arange(NUM_ROUNDS, dtype=np.uint64)[:, None] * _GOLDEN

_Network = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


# --- streams ------------------------------------------------------------------------------------------------------


class Interleaving:
    """Streams interleaved in given shares.

    With two streams, each has its share of any first n positions to within half a position (Bresenham's line). With
    more streams, the first is separated from the rest, then the second from the remainder, and so on; each separation
    adds an error of at most half a position.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        """``shares`` add up to 1; streams with a share below half a millionth are left out."""
        bounds = [round(total * PARTS) for total in accumulate(shares.values(), initial=0.0)]
        parts = {name: after - before for name, before, after in zip(shares, bounds, bounds[1:], strict=False)}
        self.parts = {name: part for name, part in parts.items() if part > 0}
        assert sum(self.parts.values()) == PARTS, f"{shares} do not add up to 1"
        self.names = tuple(self.parts)

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for each position its stream number and the count of that stream's earlier positions; int64 [N]."""
        streams = np.full(len(places), len(self.names) - 1)
        before = np.empty_like(streams)
        undecided, left = np.arange(len(places)), PARTS
        for number, part in enumerate(list(self.parts.values())[:-1]):
            taken = _ratio_of(places, part, left)
            here = _ratio_of(places + 1, part, left) > taken
            streams[undecided[here]], before[undecided[here]] = number, taken[here]
            places, undecided = (places - taken)[~here], undecided[~here]
            left -= part
        before[undecided] = places
        return streams, before

    def places(self, name: str, before: np.ndarray) -> np.ndarray:
        """Invert ``at``: return the positions of the stream's occurrences ``before`` (counted from 0), int64 [N]."""
        number = self.names.index(name)
        parts = list(self.parts.values())
        lefts = [PARTS - taken for taken in accumulate(parts, initial=0)]
        places = before
        if number < len(parts) - 1:  # the first x with _ratio_of(x) > before, minus one
            places = -(-lefts[number] * (2 * before + 1) // (2 * parts[number])) - 1
        for part, left in reversed(list(zip(parts[:number], lefts[:number], strict=True))):
            places = left * (2 * places + 1) // (2 * (left - part))  # from the positions that this stream leaves over
        return places

    def count(self, name: str, num_places: int) -> int:
        """Return how many of the first ``num_places`` positions belong to the stream."""
        left, places = PARTS, num_places
        for other, part in self.parts.items():
            taken = places if part == left else (2 * places * part + left) // (2 * left)
            if other == name:
                return taken
            left, places = left - part, places - taken
        return 0


def _ratio_of(count: np.ndarray, part: int, whole: int) -> np.ndarray:
    """Return ``count * part / whole`` rounded to the nearest integer, halves up."""
    return (2 * part * count + whole) // (2 * whole)


# --- rows of a stream ---------------------------------------------------------------------------------------------


def stream_key(seed: int, name: str) -> int:
    """Return the 64-bit key of a stream's permutations."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def permute(indices: np.ndarray, sizes: np.ndarray, keys: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Map each index by a pseudo-random permutation of ``range(size)``, chosen by its key and epoch.

    All arguments are [N], one value per index: int64, but ``keys`` uint64. Returns int64 [N].

    A Feistel network over Z_a x Z_b, with a and b near the square root of the size and a x b just above it, is applied
    until the result is below the size (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    It needs no memory; a shuffled list of the rows of a large corpus would take gigabytes on each worker. The round
    function follows SplitMix64 (Steele et al. 2014): statistically random, not cryptographic. With fewer than eight
    rows, the permutations are not equally frequent.
    """
    return _walk(_feistel, indices, sizes, keys, epochs)


def unpermute(images: np.ndarray, sizes: np.ndarray, keys: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Invert ``permute``."""
    return _walk(_inverse_feistel, images, sizes, keys, epochs)


def _walk(network: _Network, values: np.ndarray, sizes: np.ndarray, keys: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    sizes = sizes.astype(np.uint64)
    sides_a = np.sqrt(sizes).astype(np.uint64) + _ONE
    sides_b = sizes // sides_a + _ONE
    round_keys = _mix(keys + epochs.astype(np.uint64) * _GOLDEN) + _ROUND_OFFSETS  # [rounds, N]
    values = network(values.astype(np.uint64), sides_a, sides_b, round_keys)
    while (outside := values >= sizes).any():
        values[outside] = network(values[outside], sides_a[outside], sides_b[outside], round_keys[:, outside])
    return values.astype(np.int64)


def _feistel(values: np.ndarray, sides_a: np.ndarray, sides_b: np.ndarray, round_keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(values, sides_b)
    for number in range(0, NUM_ROUNDS, 2):
        left += _scatter(right, round_keys[number])
        left %= sides_a
        right += _scatter(left, round_keys[number + 1])
        right %= sides_b
    return left * sides_b + right


def _inverse_feistel(
    values: np.ndarray, sides_a: np.ndarray, sides_b: np.ndarray, round_keys: np.ndarray
) -> np.ndarray:
    left, right = np.divmod(values, sides_b)
    for number in reversed(range(0, NUM_ROUNDS, 2)):
        right = (right + sides_b - _scatter(left, round_keys[number + 1]) % sides_b) % sides_b
        left = (left + sides_a - _scatter(right, round_keys[number]) % sides_a) % sides_a
    return left * sides_b + right


def _scatter(half: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return 48 pseudo-random bits for each half, so that adding the other half does not overflow."""
    mixed = _mix(half ^ keys)
    mixed >>= _KEEP_HIGH
    return mixed


def _mix(values: np.ndarray) -> np.ndarray:
    """Mix the low bits into all 64 bits, in place."""
    values *= _MULTIPLIER_1
    values ^= values >> _SHIFT
    values *= _MULTIPLIER_2
    return values
