"""The tokenizer stage's page: how far it compresses, beside others, and what becomes of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lilpipe import report
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokenizer.patterns import pattern_name
from lilpipe.tokenizer.sample import TokenizerShare
from lilpipe.tokenizer.usage import HARDLY, NUM_NEIGHBOURS, Suspects, Totals, Usage

THIS = "this tokenizer"
MAX_BARS = 16
MAX_ROWS = 40
MAX_POINTS = 20_000


def build_report(
    tokenizer: Tokenizer,
    usage: Usage,
    suspects: Suspects,
    shares: Mapping[str, TokenizerShare],
    taken: Mapping[str, int],
    *,
    others: Sequence[str],
    num_base: int,
) -> str:
    """The page as HTML.

    ``shares`` is what was asked of each group of documents, empty where nothing was weighed, and ``taken`` the bytes
    that each gave; ``others`` names the tokenizers to compare with; tokens from ``num_base`` on were learnt.
    """
    tokens = _Tokens(tokenizer, usage)
    longest = sorted(range(len(tokens.names)), key=lambda rank: (-tokens.lengths[rank], rank))
    frequent = np.argsort(-usage.token_counts, kind="stable").tolist()
    sections = {
        "Bytes per token": _pictures(usage, others),
        "By source": report.table(_compression("source", usage.by_source, others)),
        "By language": report.table(_compression("language", usage.by_language, others)),
        "Training text by weight": _shares(shares, taken),
        "How often each token occurs": [report.figure(_occurrences(usage, suspects))],
        "Glitch-token suspects": _suspects(suspects, tokens, usage),
        "Longest tokens": report.table(tokens.rows(longest)),
        "Most frequent tokens": report.table(tokens.rows(frequent)),
        "Never used in the text measured": _unused(usage, tokens, num_base),
    }
    if not shares:
        del sections["Training text by weight"]
    extended = f", {len(tokens.names) - num_base:,} tokens above a base of {num_base:,}" if num_base > 256 else ""
    return report.page(
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


class _Tokens:
    """Rows of tables about tokens."""

    def __init__(self, tokenizer: Tokenizer, usage: Usage) -> None:
        self.names = list(tokenizer.ranks)
        self.lengths = [len(token) for token in self.names]
        self.counts = usage.token_counts

    def rows(self, ranks: Sequence[int]) -> list[dict[str, report.Cell]]:
        return [
            {
                "token": _show(self.names[rank]),
                "id": rank,
                "bytes": self.lengths[rank],
                "occurrences": int(self.counts[rank]),
            }
            for rank in ranks[:MAX_ROWS]
        ]

    def block(self, ranks: Sequence[int]) -> str:
        return report.text_block(" ".join(_show(self.names[rank]) for rank in ranks[:200]), max_chars=4_000)


# --- compression --------------------------------------------------------------------------------------------------


def _compression(what: str, totals: Mapping[str, Totals], others: Sequence[str]) -> list[dict[str, report.Cell]]:
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


def _pictures(usage: Usage, others: Sequence[str]) -> list[str]:
    """A picture by source and one by language, of each where there is more than one or something to compare with."""
    parts = []
    for what, totals in (("source", usage.by_source), ("language", usage.by_language)):
        if len(totals) > 1 or (totals and others):
            parts += [report.heading(f"By {what}"), report.figure(_bars(_by_size(totals)[:MAX_BARS], others))]
    meaning = "More bytes per token are fewer tokens for the same text."
    bias = " Measured on text that this tokenizer has learnt from, which favours it over the others." if others else ""
    return [report.note(meaning + bias), *parts]


def _bars(totals: Sequence[tuple[str, Totals]], others: Sequence[str]) -> Figure:
    """Bytes per token, a group of bars for each name and a bar for each tokenizer."""
    series = {THIS: [each.bytes_per_token for _, each in totals]}
    series |= {other: [each.bytes_per_token_of(other) for _, each in totals] for other in others}
    figure = Figure(figsize=(9, 0.9 + 0.22 * len(totals) * len(series)))
    axes = figure.subplots()
    height = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = np.arange(len(totals)) + (index - (len(series) - 1) / 2) * height
        colour = report.COLOURS[index % len(report.COLOURS)]
        axes.barh(places, values, height=height, color=colour, label=name)
    axes.set_yticks(range(len(totals)), [name for name, _ in totals])
    axes.invert_yaxis()
    axes.set_xlabel("bytes per token")
    if others:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _shares(shares: Mapping[str, TokenizerShare], taken: Mapping[str, int]) -> str:
    total = max(1, sum(taken.get(name, 0) for name in shares))
    rows: list[dict[str, report.Cell]] = [
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
    return report.table(rows)


# --- tokens -------------------------------------------------------------------------------------------------------


def _occurrences(usage: Usage, suspects: Suspects) -> Figure:
    """Occurrences by id, both logarithmic; a token that never occurs is drawn at one half."""
    figure = Figure(figsize=(9, 3.6), dpi=110)
    axes = figure.subplots()
    drawn = {
        "tokens": np.arange(0, len(usage.token_counts), max(1, len(usage.token_counts) // MAX_POINTS)),
        "never or hardly": np.array([*suspects.never, *suspects.hardly], dtype=int),
        "in one document": np.array(suspects.one_document, dtype=int),
    }
    for (name, ids), colour in zip(
        drawn.items(), (report.COLOURS[7], report.COLOURS[3], report.COLOURS[1]), strict=True
    ):
        # Points by the thousand are a bitmap in the picture, or the page would be megabytes.
        axes.scatter(ids + 1, np.maximum(usage.token_counts[ids], 0.5), s=3, color=colour, label=name, rasterized=True)
    axes.set(xscale="log", yscale="log", xlabel="id + 1", ylabel="occurrences")
    axes.minorticks_off()  # they and exponents take longer to set than all the rest
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, markerscale=3)
    return figure


def _suspects(suspects: Suspects, tokens: _Tokens, usage: Usage) -> list[str]:
    """What the suspects are, and the first of each kind."""
    kinds = {
        "Never": (suspects.never, "learnt, and not in the text measured"),
        "Hardly": (
            suspects.hardly,
            f"less than {HARDLY:.0%} as often as the {NUM_NEIGHBOURS} tokens nearest in rank do in the median: most "
            "are steps on the way to a longer token",
        ),
        "In one document": (
            suspects.one_document,
            f"more than once, and in one of the {usage.num_documents:,} documents alone",
        ),
    }
    parts = [
        report.note(
            "Tokens that a model will see too rarely to learn (Land and Bartolo 2024). Remove what repeats itself from "
            "the corpus, or take a smaller vocabulary."
        )
    ]
    for name, (ids, meaning) in kinds.items():
        parts += [report.heading(f"{name}: {len(ids):,} tokens"), report.note(f"{meaning[0].upper()}{meaning[1:]}.")]
        if ids:
            parts.append(tokens.block(sorted(ids, key=lambda rank: (-tokens.lengths[rank], rank))))
    return parts


def _unused(usage: Usage, tokens: _Tokens, num_base: int) -> list[str]:
    unused = [rank for rank in np.flatnonzero(usage.token_counts == 0).tolist() if tokens.lengths[rank] > 1]
    of_base = sum(rank < num_base for rank in unused)
    where = f", {of_base:,} of them from the base" if num_base > 256 else ""
    return [report.note(f"{len(unused):,} tokens of more than a byte{where}; the first:"), tokens.block(unused)]


def _show(token: bytes) -> str:
    """A token in quotes, with what is invisible or no UTF-8 escaped."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)
