"""What a stage was given and what it has reported, as a tracker takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_PARAM_CHARS = 6_000
"""MLflow's limit for one setting."""


def read_events(path: Path) -> list[dict[str, Any]]:
    """The metrics in an ``events.jsonl``: the last value of each for each count of ``done`` units.

    A line that was torn by a kill is left out.
    """
    if not path.exists():
        return []
    last: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "metrics" in event:
            last[event["done"]] = {
                **event,
                "metrics": {**last.get(event["done"], {}).get("metrics", {}), **event["metrics"]},
            }
    return [last[done] for done in sorted(last)]


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and strings; lists as JSON."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{name}", text[:MAX_PARAM_CHARS]
