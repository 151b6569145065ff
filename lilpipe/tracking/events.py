"""A stage's settings and events in the form that a tracker needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_PARAM_CHARS = 6_000
"""MLflow's limit for the value of a parameter."""


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read the metrics in an ``events.jsonl``: for each count of ``done`` units, the last value of each metric.

    Skips a line that was cut off by a kill.
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
    """Yield nested settings as dotted names and strings; lists as JSON."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{name}", text[:MAX_PARAM_CHARS]
