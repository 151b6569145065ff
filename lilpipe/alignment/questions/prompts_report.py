"""Report of the stage ``prompts``: questions, conversations and quarantined rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lilpipe import page
from lilpipe.schemas.examples import Conversation
from lilpipe.schemas.messages import Message, dump_json

NUM_SHOWN = 3
"""Number of questions shown per family, and of conversations."""
MAX_LEFT_OUT = 50


def build_report(
    rows: Sequence[dict[str, Any]], conversations: Sequence[Conversation], quarantine: Sequence[dict[str, Any]]
) -> str:
    """Render the report page; ``rows`` are those of ``prompts.arrow``."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    shown = [row for family in families for row in [row for row in rows if row["family"] == family][:NUM_SHOWN]]
    sections: dict[str, page.Body] = {
        "By family": page.table([_family(family, rows) for family in families]),
        "First questions": page.table(
            [{key: row[key] for key in ("family", "difficulty", "question", "answer", "verifier")} for row in shown]
        ),
        "First conversations": [
            page.text_block(item.text or "\n".join(map(_said, item.messages)), title=item.id)
            for item in conversations[:NUM_SHOWN]
        ],
    }
    if quarantine:
        sections["Quarantined rows (all in quarantine.jsonl)"] = page.table(list(quarantine[:MAX_LEFT_OUT]))
    figures = {"prompts": len(rows), "conversations": len(conversations), "quarantined rows": len(quarantine)}
    return page.render("Prompts", sections, key_figures=figures)


def _said(turn: Message) -> str:
    calls = "".join(f" {dump_json(call['function'])}" for call in turn.get("tool_calls", ()))
    return f"{turn['role']}: {turn['content']}{calls}"


def _family(family: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mine = [row for row in rows if row["family"] == family]
    sizes = Counter(row["split"] for row in mine)
    difficulties = [row["difficulty"] for row in mine]
    return {
        "family": family,
        **{split: sizes[split] for split in ("train", "validation", "test")},
        "difficulty": f"{min(difficulties)} to {max(difficulties)}",
    }
