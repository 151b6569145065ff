"""Extension of a vocabulary: learns more merges on the corpus, after those of the base (Llama 3, section 3.3).

The corpus is split into pieces, the base encodes each distinct piece, and merging continues from there: byte-pair
encoding (Sennrich et al. 2016) with the base's tokens as initial symbols instead of bytes. New tokens rank above all
tokens of the base, so the base's merges are still applied first: the ids of any text are the base's ids with runs of
them replaced by new ones.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import regex
import tiktoken

from lilpipe.errors import ConfigError
from lilpipe.tokenizer.byte_pair import WHOLE
from lilpipe.tokenizer.patterns import PATTERNS, resolve_pattern
from lilpipe.tokenizer.vocabulary import Ranks, Vocabulary

MAX_UNREACHABLE_SHARE = 0.005
"""Maximum share of the base's tokens that the pattern makes unreachable. Under its own pattern, 12 tokens of o200k
(0.006 %) are unreachable; under another preset, 1.1 to 22 % of o200k or cl100k."""

Pair = tuple[int, int]


def extend(texts: Iterable[str], base: Ranks, num_merges: int, *, pattern: str) -> dict[bytes, int]:
    """Return the base's ranks with up to ``num_merges`` more; fewer if the texts have no further pair.

    Raises ``ConfigError`` if the pattern does not compile.
    """
    tokens = list(base)
    if num_merges:
        pieces = count_pieces(texts, pattern)
        encode = tiktoken.Encoding("base", pat_str=WHOLE, mergeable_ranks=dict(base), special_tokens={}).encode_ordinary
        words = ((encode(piece), count) for piece, count in pieces.items())
        for left, right in learn_merges(words, num_merges, first_id=len(tokens)):
            tokens.append(tokens[left] + tokens[right])
    return {token: rank for rank, token in enumerate(tokens)}


def count_pieces(texts: Iterable[str], pattern: str) -> Counter[str]:
    """Return how often each piece occurs in the texts."""
    try:
        compiled = regex.compile(resolve_pattern(pattern))
    except regex.error as error:
        raise ConfigError(f"tokenizer.pattern: got {pattern!r}, expected a regular expression ({error})") from error
    counts: Counter[str] = Counter()
    for text in texts:
        # If the pattern has groups, `findall` returns the groups instead of the match.
        counts.update((match[0] for match in compiled.finditer(text)) if compiled.groups else compiled.findall(text))
    return counts


def learn_merges(words: Iterable[tuple[list[int], int]], num_merges: int, *, first_id: int) -> list[Pair]:
    """Merge the most frequent pair to a new id, repeatedly; return the merged pairs in order.

    ``words`` are lists of ids with their number of occurrences; the lists are modified. Ties go to the pair with the
    lowest ids. Returns fewer than ``num_merges`` pairs if none is left.
    """
    merging = _Merging(words)
    merges: list[Pair] = []
    while len(merges) < num_merges and (pair := merging.pop()) is not None:
        merging.merge(pair, first_id + len(merges))
        merges.append(pair)
    return merges


class _Merging:
    """Words during merging, with the count of every pair in them.

    Once a pair is in the heap its count only falls, since later pairs contain a new id. So a heap entry is an upper
    bound of the count; an entry that is too high is pushed back with the current count.
    """

    def __init__(self, words: Iterable[tuple[list[int], int]]) -> None:
        self.words: list[list[int]] = []
        self.occurrences: list[int] = []
        self.pair_counts: defaultdict[Pair, int] = defaultdict(int)
        self.found_in: defaultdict[Pair, list[int]] = defaultdict(list)
        """Words that contained the pair when it first occurred; some may no longer contain it."""
        for ids, count in words:
            if len(ids) > 1:
                self.words.append(ids)
                self.occurrences.append(count)
                for pair in pairwise(ids):
                    self._add(pair, len(self.words) - 1)
        self.heap = [(-count, pair) for pair, count in self.pair_counts.items()]
        heapq.heapify(self.heap)

    def pop(self) -> Pair | None:
        """Remove and return the most frequent pair, or ``None`` if none is left."""
        while self.heap:
            negative, pair = heapq.heappop(self.heap)
            count = self.pair_counts[pair]
            if count == -negative:
                return pair
            if count:
                heapq.heappush(self.heap, (-count, pair))
        return None

    def merge(self, pair: Pair, new: int) -> None:
        """Replace all occurrences of the pair by ``new``, leftmost first."""
        came_up: set[Pair] = set()
        for index in self.found_in.pop(pair):
            self._merge_in(index, pair, new, came_up)
        del self.pair_counts[pair]
        for each in came_up:
            if count := self.pair_counts[each]:
                heapq.heappush(self.heap, (-count, each))

    def _merge_in(self, index: int, pair: Pair, new: int, came_up: set[Pair]) -> None:
        ids, count, pair_counts = self.words[index], self.occurrences[index], self.pair_counts
        left, right = pair
        place = 0
        while place < len(ids) - 1:
            if ids[place] == left and ids[place + 1] == right:
                if place:
                    before = ids[place - 1]
                    pair_counts[before, left] -= count
                    self._add((before, new), index)
                    came_up.add((before, new))
                if place + 2 < len(ids):
                    after = ids[place + 2]
                    pair_counts[right, after] -= count
                    self._add((new, after), index)
                    came_up.add((new, after))
                ids[place : place + 2] = [new]
            place += 1

    def _add(self, pair: Pair, index: int) -> None:
        self.pair_counts[pair] += self.occurrences[index]
        found_in = self.found_in[pair]
        if not found_in or found_in[-1] != index:
            found_in.append(index)


# --- the base and its pattern -------------------------------------------------------------------------------------


def check_base(base: Vocabulary, pattern: str, *, where: str) -> None:
    """Raise ``ConfigError`` if the ids have gaps, or if ``pattern`` is not the base's pattern."""
    if (got := list(base.ranks.values())) != list(range(len(got))):
        raise ConfigError(
            f"tokenizer.base: got {where} with {len(got):,} tokens and ids up to {max(got):,}, expected ids without "
            "gaps below its special tokens; use another base"
        )
    lost = unreachable_tokens(base.ranks, pattern)
    if len(lost) > MAX_UNREACHABLE_SHARE * len(got):
        own = f"{base.pattern!r}" if base.pattern else f"one of {', '.join(PATTERNS)}, or its regular expression"
        raise ConfigError(
            f"tokenizer.pattern: got {pattern!r}, under which {len(lost):,} of the {len(got):,} tokens of {where} "
            f"are unreachable (such as {lost[0]!r}), expected the pattern of the base; set it to {own}"
        )


def unreachable_tokens(ranks: Ranks, pattern: str) -> Sequence[bytes]:
    """Return tokens that are valid UTF-8 but whose text does not encode to them (Land and Bartolo 2024)."""
    encode = tiktoken.Encoding(
        "base", pat_str=resolve_pattern(pattern), mergeable_ranks=dict(ranks), special_tokens={}
    ).encode_ordinary
    return [token for token, rank in ranks.items() if (text := _text(token)) and encode(text) != [rank]]


def _text(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return ""
