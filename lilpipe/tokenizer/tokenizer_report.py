"""Report of stage ``tokenizer``: compression, also of other tokenizers, and usage of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lilpipe import charts, page
from lilpipe.tokenizer.encoding import BytePairTokenizer, Tokenizer
from lilpipe.tokenizer.patterns import pattern_name
from lilpipe.tokenizer.sample import TokenizerShare
from lilpipe.tokenizer.usage import HARDLY, NUM_NEIGHBOURS, Suspects, Totals, Usage

THIS = "this tokenizer"
MAX_BARS = 16
MAX_ROWS = 40
MAX_POINTS = 20_000


def build_report(
    tokenizer: BytePairTokenizer,
    usage: Usage,
    suspects: Suspects,
    shares: Mapping[str, TokenizerShare],
    taken: Mapping[str, int],
    *,
    others: Sequence[str],
    num_base: int,
) -> str:
    """Return the report as HTML.

    Args:
        tokenizer: Trained tokenizer.
        usage: Its token counts.
        suspects: Its glitch-token suspects.
        shares: Requested share of each group of documents; empty without weights.
        taken: Bytes read of each group.
        others: Names of the tokenizers to compare with.
        num_base: Id of the first learnt token.
    """
    tokens = _Tokens(tokenizer, usage)
    longest = sorted(range(len(tokens.names)), key=lambda rank: (-tokens.lengths[rank], rank))
    frequent = np.argsort(-usage.token_counts, kind="stable").tolist()
    sections: dict[str, page.Body] = {
        "Bytes per token": _pictures(usage, others),
        "By source": page.table(_compression("source", usage.by_source, others)),
        "By language": page.table(_compression("language", usage.by_language, others)),
        "Training text by weight": _shares(shares, taken),
        "Token frequencies": _occurrences(usage, suspects),
        "Glitch-token suspects": _suspects(suspects, tokens, usage),
        "Longest tokens": page.table(tokens.rows(longest)),
        "Most frequent tokens": page.table(tokens.rows(frequent)),
        "Unused tokens": _unused(usage, tokens, num_base),
    }
    if not shares:
        del sections["Training text by weight"]
    extended = f", {len(tokens.names) - num_base:,} tokens above a base of {num_base:,}" if num_base > 256 else ""
    return page.render(
        "Tokenizer",
        sections,
        subtitle=f"Byte-level BPE on {pattern_name(tokenizer.pattern)}{extended}",
        key_figures={
            "tokens": tokenizer.vocab_size,
            "bytes per token": usage.total.bytes_per_token,
            "tokens per word": usage.total.tokens_per_word,
            "never used": f"{usage.unused_ratio:.1%}",
            "glitch-token suspects": suspects.total,
        },
    )


def build_compression_report(tokenizer: Tokenizer, usage: Usage, *, others: Sequence[str]) -> str:
    """Return the report on an imported tokenizer as HTML."""
    sections: dict[str, page.Body] = {
        "Bytes per token": _pictures(usage, others),
        "By source": page.table(_compression("source", usage.by_source, others)),
        "By language": page.table(_compression("language", usage.by_language, others)),
    }
    return page.render(
        "Tokenizer",
        sections,
        subtitle="An imported tokenizer",
        key_figures={
            "tokens": tokenizer.vocab_size,
            "bytes per token": usage.total.bytes_per_token,
            "tokens per word": usage.total.tokens_per_word,
        },
    )


class _Tokens:
    """Table rows about tokens."""

    def __init__(self, tokenizer: BytePairTokenizer, usage: Usage) -> None:
        self.names = list(tokenizer.ranks)
        self.lengths = [len(token) for token in self.names]
        self.counts = usage.token_counts

    def rows(self, ranks: Sequence[int]) -> list[dict[str, page.Cell]]:
        return [
            {
                "token": _show(self.names[rank]),
                "id": rank,
                "bytes": self.lengths[rank],
                "occurrences": int(self.counts[rank]),
            }
            for rank in ranks[:MAX_ROWS]
        ]

    def block(self, ranks: Sequence[int]) -> page.Fragment:
        return page.text_block(" ".join(_show(self.names[rank]) for rank in ranks[:200]), max_chars=4_000)


# --- compression --------------------------------------------------------------------------------------------------


def _compression(what: str, totals: Mapping[str, Totals], others: Sequence[str]) -> list[dict[str, page.Cell]]:
    return [
        {
            what: name,
            "bytes measured": each.num_bytes,
            "tokens": each.num_tokens,
            "tokens per word": each.tokens_per_word,
            "bytes per token": each.bytes_per_token,
            **{f"bytes per token, {other}": each.bytes_per_token_of(other) for other in others},
        }
        for name, each in _by_size(totals)
    ]


def _by_size(totals: Mapping[str, Totals]) -> list[tuple[str, Totals]]:
    return sorted(totals.items(), key=lambda item: (-item[1].num_bytes, item[0]))


def _pictures(usage: Usage, others: Sequence[str]) -> list[page.Fragment]:
    """Return a chart by source and one by language, each only if it has several entries or tokenizers to compare."""
    parts = []
    for what, totals in (("source", usage.by_source), ("language", usage.by_language)):
        if len(totals) > 1 or (totals and others):
            parts += [page.heading(f"By {what}"), _bars(_by_size(totals)[:MAX_BARS], others)]
    meaning = "More bytes per token means fewer tokens for the same text."
    bias = " Measured on this tokenizer's training text, which favours it over the others." if others else ""
    return [page.note(meaning + bias), *parts]


def _bars(totals: Sequence[tuple[str, Totals]], others: Sequence[str]) -> page.Fragment:
    """Return a chart of bytes per token: a group of bars per name, a bar per tokenizer."""
    series = {THIS: [each.bytes_per_token for _, each in totals]}
    series |= {other: [each.bytes_per_token_of(other) for _, each in totals] for other in others}
    return charts.svg(charts.bars([name for name, _ in totals], {"bytes per token": series}))


def _shares(shares: Mapping[str, TokenizerShare], taken: Mapping[str, int]) -> page.Fragment:
    total = max(1, sum(taken.get(name, 0) for name in shares))
    rows: list[dict[str, page.Cell]] = [
        {
            "documents": name,
            "asked": f"{share.asked:.1%}",
            "reached": f"{taken.get(name, 0) / total:.1%}",
            "bytes taken": taken.get(name, 0),
            "bytes in the corpus": share.available,
            "bytes short": max(0, share.wanted - share.available),
        }
        for name, share in shares.items()
    ]
    return page.table(rows)


# --- tokens -------------------------------------------------------------------------------------------------------


def _occurrences(usage: Usage, suspects: Suspects) -> page.Fragment:
    """Return a log-log chart of occurrences by id; tokens that never occur are drawn at 0.5."""
    drawn = {
        "tokens": np.arange(0, len(usage.token_counts), max(1, len(usage.token_counts) // MAX_POINTS)),
        "never or rarely": np.array([*suspects.never, *suspects.hardly], dtype=int),
        "in one document": np.array(suspects.one_document, dtype=int),
    }
    dots = [
        charts.Line(name, ids + 1, np.maximum(usage.token_counts[ids], 0.5), "o", charts.COLOURS[colour])
        for (name, ids), colour in zip(drawn.items(), (7, 3, 1), strict=True)
    ]
    return charts.svg(charts.lines({"": dots}, "id + 1", "occurrences", log=True))


def _suspects(suspects: Suspects, tokens: _Tokens, usage: Usage) -> list[page.Fragment]:
    """Return an explanation of the suspects, and the first tokens of each kind."""
    kinds = {
        "Never": (suspects.never, "learnt, but not in the measured text"),
        "Rarely": (
            suspects.hardly,
            f"less than {HARDLY:.0%} of the median count of the {NUM_NEIGHBOURS} tokens nearest in rank: most "
            "are intermediate merges of a longer token",
        ),
        "In one document": (
            suspects.one_document,
            f"more than once, but in only one of the {usage.num_documents:,} documents",
        ),
    }
    parts = [
        page.note(
            "Tokens that a model will see too rarely to learn (Land and Bartolo 2024). Remove repeated text from "
            "the corpus, or use a smaller vocabulary."
        )
    ]
    for name, (ids, meaning) in kinds.items():
        parts += [page.heading(f"{name}: {len(ids):,} tokens"), page.note(f"{meaning[0].upper()}{meaning[1:]}.")]
        if ids:
            parts.append(tokens.block(sorted(ids, key=lambda rank: (-tokens.lengths[rank], rank))))
    return parts


def _unused(usage: Usage, tokens: _Tokens, num_base: int) -> list[page.Fragment]:
    unused = [rank for rank in np.flatnonzero(usage.token_counts == 0).tolist() if tokens.lengths[rank] > 1]
    of_base = sum(rank < num_base for rank in unused)
    where = f", {of_base:,} of them from the base" if num_base > 256 else ""
    return [page.note(f"{len(unused):,} tokens of more than one byte{where}; the first:"), tokens.block(unused)]


def _show(token: bytes) -> str:
    """Return a token in quotes; invisible characters and invalid UTF-8 are escaped."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)
