"""Word tokenization, done once per text for heuristics, MinHash, decontamination and divergence.

White space splits a text into chunks, and each chunk splits into tokens independently. The token data of each chunk is
cached as packed bytes, and the arrays of a text are these bytes joined, so a chunk seen before costs one look-up. The
caches are bounded and hold values of pure functions; clearing them when they are full changes no result.

Tokens follow spaCy's English tokenizer (Honnibal et al. 2020), for which published pipelines set their thresholds:
punctuation around a word is split off one by one, and so are `'s` and `n't`; inside a word, hyphens, slashes and colons
between letters split; `e.g.`, URLs and `-----` stay whole.
"""

from __future__ import annotations

import functools
import re
import struct
import unicodedata
from collections.abc import Callable

import numpy as np
import xxhash
from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
"""Rae et al. 2021 (Gopher), A1.1."""

ALPHABETIC, NON_SYMBOL, SENTENCE_END, PUNCTUATION = 1, 2, 4, 8
"""Bits of ``Words.marks``: the token contains a letter; contains a character that is not punctuation; is a
sentence-ending mark; consists of Unicode punctuation only (`+` and `=` are symbols)."""
STOP_WORDS_FROM_BIT = 8
"""First bit of the stop words, one bit each."""

_STOP_WORD_BITS = {word: 1 << STOP_WORDS_FROM_BIT + i for i, word in enumerate(STOP_WORDS)}
_MAX_CHUNKS = 2**17
"""Maximum number of chunks in a cache."""
_MAX_CHUNK_CHARS = 64
"""Longer chunks, such as URLs and encoded data, rarely repeat and are not cached."""
_TOKEN = np.dtype([("hash", "<u8"), ("length", "<u4"), ("marks", "<u4")])
_PACK = struct.Struct("<QII").pack
_PACK_HASH = struct.Struct("<Q").pack


class Words:
    """Words and tokens of a text; arrays are read-only."""

    def __init__(self, text: str) -> None:
        self._chunks = text.split()

    @functools.cached_property
    def tokens(self) -> list[str]:
        """Words and punctuation marks, in order, unchanged."""
        return [token for chunk in self._chunks for token in split_chunk(chunk)]

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """uint64 [words]: 64-bit hashes of lower-cased words, the same in every process and on every machine.

        A word is a run of letters, digits and underscores with at least one letter or digit.
        """
        return np.frombuffer(_WORD_HASHES.join(self._chunks), "<u8")

    @functools.cached_property
    def _facts(self) -> np.ndarray:
        return np.frombuffer(_TOKEN_FACTS.join(self._chunks), _TOKEN)

    @property
    def token_hashes(self) -> np.ndarray:
        """uint64 [tokens]: 64-bit hash of each token, with case."""
        return self._facts["hash"]

    @property
    def token_lengths(self) -> np.ndarray:
        """uint32 [tokens]: number of characters of each token."""
        return self._facts["length"]

    @property
    def marks(self) -> np.ndarray:
        """uint32 [tokens]: bits that describe each token, see ``ALPHABETIC`` and following."""
        return self._facts["marks"]


class _ChunkTable(dict[str, bytes]):
    """Cache from chunk to packed data. Missing entries are computed; it is cleared when it is full."""

    def __init__(self, facts: Callable[[str], bytes]) -> None:
        self._facts = facts

    def __missing__(self, chunk: str) -> bytes:
        facts = self._facts(chunk)
        if len(chunk) <= _MAX_CHUNK_CHARS:
            if len(self) >= _MAX_CHUNKS:
                self.clear()
            self[chunk] = facts
        return facts

    def join(self, chunks: list[str]) -> bytes:
        """Return the joined data of all chunks, in order."""
        return b"".join(map(self.__getitem__, chunks))


# --- tokens -------------------------------------------------------------------------------------------------------

_QUOTES = "'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉⟦⟧"
_MARKS = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_LEADING = _QUOTES + _MARKS + "§%=—–$£€¥₹₽"
_TRAILING = _QUOTES + _MARKS + "—–"
_BEFORE_STOP = frozenset(_QUOTES + _MARKS + "%-+")
_PICTURES = (
    "".join(c for c in map(chr, range(0xA0, 0x3200)) if unicodedata.category(c) == "So") + "\U0001f000-\U0001faff"
)
_LETTER = r"[^\W\d_]"

_INNER = re.compile(
    rf"([-+*^.,:<>=/~–—…{_PICTURES}](?:(?<=\.)\.+|(?<=[…{_PICTURES}])|(?<=[0-9][-+*^])(?=[0-9-])"
    rf"|(?<=[a-zß-öø-ÿ{re.escape(_QUOTES)}]\.)(?=[A-ZÀ-ÖØ-Þ{re.escape(_QUOTES)}])|(?<={_LETTER},)(?={_LETTER})"
    rf"|(?<=[^\W_]-)--?(?={_LETTER})|(?<=[^\W_]—)—(?={_LETTER})|(?<=[^\W_][-–—~:<>=/])(?={_LETTER})))"
)
"""Where to split inside a word."""
_URL = re.compile(
    r"(?:[\w+.-]{2,}://)?(?:[^\s@]+@)?(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[^\W_][\w-]*\.)+[a-zß-öø-ÿ]{2,63})(?::\d{2,5})?"
    r"(?:[/?#]\S*)?"
)
_CONTRACTION = re.compile(r"([A-Za-z]+)(n['’]t|['’](?:ll|re|ve|d|m))")
_UNIT = re.compile(
    r"(?<=[0-9])(?:[kdcmµn]?m[²³]?|km/h|mph|ha|yd|in|ft|[kmµ]?g|t|lb|oz|[hkM]?Pa|[mkgt]b|[MKGT]B?|[%$£€¥]|\+)\Z"
)
_WITH_MARKS = """
    and/or w/o o'clock ma'am C++ '' 's e.g. E.g. i.e. I.e. a.m. p.m. vs. co. Co. Inc. Ltd. Corp. Bros. Mr. Mrs. Ms. Dr.
    Jr. Prof. Rev. Sen. Gov. Gen. St. Ph.D. Jan. Feb. Apr. Jun. Jul. Aug. Sep. Sept. Oct. Nov. Dec.
    a. b. c. d. e. f. g. h. i. j. k. l. m. n. o. p. q. r. s. t. u. v. w. x. y. z.
"""
_WHOLE = frozenset(_WITH_MARKS.split())
"""Words that keep their punctuation."""
_TWO_WORDS = {"cannot": ["can", "not"], "Cannot": ["Can", "not"]}
_MAX_ENDINGS = 16
"""Maximum number of full stops, `'s` and units split from the end of a word, to avoid quadratic time."""


def split_chunk(chunk: str) -> list[str]:
    """Split a text without white space into tokens."""
    if chunk.isalpha() or chunk in _WHOLE:
        return _TWO_WORDS.get(chunk) or [chunk]
    core = chunk.lstrip(_LEADING)
    before = list(chunk[: len(chunk) - len(core)])
    after: list[str] = []
    for _ in range(_MAX_ENDINGS):
        bare = core.rstrip(_TRAILING)
        after += core[len(bare) :][::-1]
        num_chars = _ending(bare)
        core = bare[: len(bare) - num_chars]
        if not num_chars:
            break
        after.append(bare[len(core) :])
    return before + _split_core(core) + after[::-1]


def _ending(word: str) -> int:
    """Return the length of the full stop, `'s` or unit at the end of a word that is a separate token, else 0."""
    if not word or word.isalpha() or word in _WHOLE:
        return 0
    last = word[-1]
    if last == ".":
        return int(_ends_sentence(word))
    if last in "sS":
        return 2 if word[-2:-1] in ("'", "’") else 0
    unit = None if last in "0123456789" else _UNIT.search(word)
    return len(unit[0]) if unit else 0


def _ends_sentence(word: str) -> bool:
    """Return whether the final full stop is a separate token; it is not in `J.`, `...` and `/.`."""
    before = word[-2:-1]
    if before.isupper():
        return word[-3:-2].isupper()
    return before.isalnum() or before in _BEFORE_STOP or not before.isascii()


def _split_core(core: str) -> list[str]:
    """Split a word without surrounding punctuation into tokens."""
    if core.isalnum() or core in _WHOLE:
        return _TWO_WORDS.get(core) or [core]
    if ("'" in core or "’" in core) and (contraction := _CONTRACTION.fullmatch(core)):
        return list(contraction.groups())
    if "." in core and _URL.fullmatch(core):
        return [core]
    return [token for token in _INNER.split(core) if token]


# --- facts --------------------------------------------------------------------------------------------------------


def _chunk_facts(chunk: str) -> bytes:
    return b"".join(map(_token_facts, split_chunk(chunk)))


@functools.lru_cache(maxsize=2**14)
def _token_facts(token: str) -> bytes:
    if token.isalpha():
        marks = ALPHABETIC | NON_SYMBOL | _STOP_WORD_BITS.get(token, 0)
    elif any(map(str.isalpha, token)):
        marks = ALPHABETIC | NON_SYMBOL
    else:
        marks = 0 if PUNCTUATION_SET.issuperset(token) else NON_SYMBOL
        marks |= SENTENCE_END if token in TERMINAL_PUNCTUATION else 0
        marks |= PUNCTUATION if all(unicodedata.category(char)[0] == "P" for char in token) else 0
    return _PACK(_hash(token), len(token), marks)


def _hash(text: str) -> int:
    try:
        return xxhash.xxh3_64_intdigest(text)
    except UnicodeEncodeError:  # a lone surrogate
        return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


_WORD = re.compile(r"\w+")


def _word_hashes(chunk: str) -> bytes:
    if chunk.isalnum():
        return _PACK_HASH(_hash(chunk.lower()))
    return b"".join([_PACK_HASH(_hash(word.lower())) for word in _WORD.findall(chunk) if word.strip("_")])


_TOKEN_FACTS = _ChunkTable(_chunk_facts)
_WORD_HASHES = _ChunkTable(_word_hashes)
