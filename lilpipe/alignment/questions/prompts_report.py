"""The report of the stage ``prompts``: what is asked, what is shown, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lilpipe import report
from lilpipe.schemas.examples import Conversation

NUM_SHOWN = 3
"""Questions of each family, and conversations."""
MAX_LEFT_OUT = 50


def build_report(
    rows: Sequence[dict[str, Any]], conversations: Sequence[Conversation], quarantine: Sequence[dict[str, Any]]
) -> str:
    """The page. ``rows`` are those of ``prompts.arrow``."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    shown = [row for family in families for row in [row for row in rows if row["family"] == family][:NUM_SHOWN]]
    sections: dict[str, Any] = {
        "By family": report.table([_family(family, rows) for family in families]),
        "The first questions": report.table(
            [{key: row[key] for key in ("family", "difficulty", "question", "answer", "verifier")} for row in shown]
        ),
        "The first conversations": [
            report.text_block("\n".join(f"{turn['role']}: {turn['content']}" for turn in item.messages), title=item.id)
            for item in conversations[:NUM_SHOWN]
        ],
    }
    if quarantine:
        sections["Rows left out, all of them in quarantine.jsonl"] = report.table(list(quarantine[:MAX_LEFT_OUT]))
    figures = {"prompts": len(rows), "conversations": len(conversations), "rows left out": len(quarantine)}
    return report.page("Prompts", sections, key_figures=figures)


def _family(family: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mine = [row for row in rows if row["family"] == family]
    sizes = Counter(row["split"] for row in mine)
    difficulties = [row["difficulty"] for row in mine]
    return {
        "family": family,
        **{split: sizes[split] for split in ("train", "validation", "test")},
        "difficulty": f"{min(difficulties)} to {max(difficulties)}",
    }
