"""Extension of a vocabulary: more merges, learnt on the corpus above those of the base (Llama 3, section 3.3).

The corpus is cut into pieces, each distinct piece is encoded by the base, and merging goes on from there: byte-pair
encoding (Sennrich et al. 2016) whose symbols to begin with are the base's tokens instead of bytes. A new token ranks
above all of the base, so that whatever the base merges it still merges first: the ids of any text are the base's with
runs of them replaced by new ones.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import regex
import tiktoken

from lilpipe.errors import ConfigError
from lilpipe.tokenizer.patterns import PATTERNS, resolve_pattern
from lilpipe.tokenizer.vocabulary import Ranks, Vocabulary

MAX_UNREACHABLE_SHARE = 0.005
"""Of the base's tokens, how many may never come out under the pattern. Of o200k's 12 do not under its own, 0.006 %;
under another preset's 1.1 to 22 % of its or cl100k's do not."""

WHOLE = r"[\s\S]+"
"""A pattern that cuts nothing."""

Pair = tuple[int, int]


def extend(texts: Iterable[str], base: Ranks, num_merges: int, *, pattern: str) -> dict[bytes, int]:
    """The base's ranks with up to ``num_merges`` more; fewer where the texts hold no further pair.

    Raises ``ConfigError`` for a pattern that does not compile.
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
    """How often each piece occurs in the texts."""
    try:
        compiled = regex.compile(resolve_pattern(pattern))
    except regex.error as error:
        raise ConfigError(f"tokenizer.pattern: got {pattern!r}, expected a regular expression ({error})") from error
    counts: Counter[str] = Counter()
    for text in texts:
        # With groups in it, `findall` would give the groups.
        counts.update((match[0] for match in compiled.finditer(text)) if compiled.groups else compiled.findall(text))
    return counts


def learn_merges(words: Iterable[tuple[list[int], int]], num_merges: int, *, first_id: int) -> list[Pair]:
    """The most frequent pair, again and again, each merged to a new id before the next is sought.

    ``words`` are ids and how often they occur; their lists are changed. Of equally frequent pairs the one of lowest
    ids goes first. The list is shorter than ``num_merges`` where no pair is left.
    """
    merging = _Merging(words)
    merges: list[Pair] = []
    while len(merges) < num_merges and (pair := merging.pop()) is not None:
        merging.merge(pair, first_id + len(merges))
        merges.append(pair)
    return merges


class _Merging:
    """Words on their way from base tokens to merged ones, with the count of every pair in them.

    A pair's count only falls once it is in the heap, since pairs that come up hold a new id; so an entry of the heap
    says at least what the count is, and one that says more is put back with the true one.
    """

    def __init__(self, words: Iterable[tuple[list[int], int]]) -> None:
        self.words: list[list[int]] = []
        self.occurrences: list[int] = []
        self.pair_counts: defaultdict[Pair, int] = defaultdict(int)
        self.found_in: defaultdict[Pair, list[int]] = defaultdict(list)
        """Words that held the pair when it came up; it may have left some since."""
        for ids, count in words:
            if len(ids) > 1:
                self.words.append(ids)
                self.occurrences.append(count)
                for pair in pairwise(ids):
                    self._add(pair, len(self.words) - 1)
        self.heap = [(-count, pair) for pair, count in self.pair_counts.items()]
        heapq.heapify(self.heap)

    def pop(self) -> Pair | None:
        """The most frequent pair, or None where none is left."""
        while self.heap:
            negative, pair = heapq.heappop(self.heap)
            count = self.pair_counts[pair]
            if count == -negative:
                return pair
            if count:
                heapq.heappush(self.heap, (-count, pair))
        return None

    def merge(self, pair: Pair, new: int) -> None:
        """Replace the pair by ``new`` wherever it stands, leftmost first."""
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
    """Raise ``ConfigError`` where the ids have gaps, or where ``pattern`` is not what the base was made with."""
    if (got := list(base.ranks.values())) != list(range(len(got))):
        raise ConfigError(
            f"tokenizer.base: got {where} with {len(got):,} tokens and ids up to {max(got):,}, expected ids without "
            "gaps below its special tokens; take another base"
        )
    lost = unreachable_tokens(base.ranks, pattern)
    if len(lost) > MAX_UNREACHABLE_SHARE * len(got):
        own = f"{base.pattern!r}" if base.pattern else f"one of {', '.join(PATTERNS)}, or its regular expression"
        raise ConfigError(
            f"tokenizer.pattern: got {pattern!r}, under which {len(lost):,} of the {len(got):,} tokens of {where} "
            f"never come out (such as {lost[0]!r}), expected the pattern that it was made with; set it to {own}"
        )


def unreachable_tokens(ranks: Ranks, pattern: str) -> Sequence[bytes]:
    """Tokens of whole characters whose own text does not encode to them (Land & Bartolo 2024)."""
    encode = tiktoken.Encoding(
        "base", pat_str=resolve_pattern(pattern), mergeable_ranks=dict(ranks), special_tokens={}
    ).encode_ordinary
    return [token for token, rank in ranks.items() if (text := _text(token)) and encode(text) != [rank]]


def _text(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return ""
