"""Seeds derived from their purpose, so that resuming needs no generator state other than one integer."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed for one purpose and position, independent of all others."""
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
