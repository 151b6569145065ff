"""How a tokenizer uses its vocabulary, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lilpipe import report
from lilpipe.artifact import write_atomically
from lilpipe.tokenizer.encoding import SPECIAL_TOKENS, Tokenizer


@dataclass(frozen=True)
class Usage:
    """Counts over some text."""

    token_counts: np.ndarray
    """How often each id occurs, int64 [vocab_size]."""
    num_bytes: Counter[str]
    """Bytes of UTF-8 by source."""
    num_tokens: Counter[str]
    """Tokens by source."""

    @property
    def share_never_used(self) -> float:
        """Share of the ids, special tokens apart, that do not occur."""
        return float((self.token_counts[: -len(SPECIAL_TOKENS)] == 0).mean())


def measure_usage(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]) -> Usage:
    """Encode texts, given with the name of their source, and count."""
    usage = Usage(np.zeros(tokenizer.vocab_size, dtype=np.int64), Counter(), Counter())
    for source, text in texts:
        ids = tokenizer.encode_array(text)
        usage.token_counts[:] += np.bincount(ids, minlength=tokenizer.vocab_size)
        usage.num_bytes[source] += len(text.encode())
        usage.num_tokens[source] += len(ids)
    return usage


def write_report(tokenizer: Tokenizer, usage: Usage, path: Path) -> None:
    """Write the page: compression by source, the longest and the most frequent tokens, what is never used."""
    tokens = list(tokenizer.ranks)
    longest = sorted(tokens, key=lambda token: (-len(token), token))[:40]
    frequent = [tokens[rank] for rank in np.argsort(-usage.token_counts[: len(tokens)], kind="stable")[:40]]
    unused = [token for token, rank in tokenizer.ranks.items() if rank > 255 and usage.token_counts[rank] == 0]

    def rows(chosen: list[bytes]) -> list[dict[str, report.Cell]]:
        counts = [int(usage.token_counts[tokenizer.ranks[token]]) for token in chosen]
        return [
            {"token": _show(token), "id": tokenizer.ranks[token], "bytes": len(token), "occurrences": count}
            for token, count in zip(chosen, counts, strict=True)
        ]

    sources: list[dict[str, report.Cell]] = [
        {
            "source": name,
            "bytes measured": num_bytes,
            "tokens": usage.num_tokens[name],
            "bytes per token": num_bytes / max(1, usage.num_tokens[name]),
        }
        for name, num_bytes in usage.num_bytes.most_common()
    ]
    html = report.page(
        "Tokenizer",
        {
            "Bytes per token by source": report.table(sources),
            "Longest tokens": report.table(rows(longest)),
            "Most frequent tokens": report.table(rows(frequent)),
            "Never used in the text measured": [
                report.note(f"{len(unused):,} tokens of more than a byte; the first of them:"),
                report.text_block(" ".join(map(_show, unused[:200])), max_chars=4_000),
            ],
        },
        subtitle=f"Byte-level BPE on {tokenizer.pattern}",
        key_figures={
            "tokens": tokenizer.vocab_size,
            "bytes per token": usage.num_bytes.total() / max(1, usage.num_tokens.total()),
            "never used": f"{usage.share_never_used:.1%}",
        },
    )
    write_atomically(path, html)


def _show(token: bytes) -> str:
    """A token in quotes, with what is invisible or no UTF-8 escaped."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)
