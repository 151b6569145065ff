"""Credentials in addresses: hidden wherever an address is kept or shown.

Users put user and password, or a signed query, into the URL of a source. A stage needs them to read; a manifest, a log,
a report, a tracking server and the identity of a step do not. A new signature of the same address is the same source.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_QUERY_NAMES = (
    r"access[_-]?key(?:[_-]?id)?|access[_-]?token|api[_-]?key|auth(?:[_-]?token)?|awsaccesskeyid|client[_-]?secret|credential|"
    r"id[_-]?token|key|passw(?:or)?d|pwd|refresh[_-]?token|secret(?:[_-]?access[_-]?key)?|session[_-]?token|sig|signature|"
    r"token|x-(?:amz|goog|oss|obs)-(?:credential|security-token|signature)"
)
"""Names of query parameters of object stores, Azure's SAS (`sig`) and usual APIs."""
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31}://)[^\s/?#@\"'<>]+@")
_QUERY = re.compile(rf"((?:[?&;]|&amp;|%3[fF]|%26)(?:{_QUERY_NAMES})=)[^\s&#\"'<>]+", re.IGNORECASE)


def hide_credentials(text: str) -> str:
    """Return the text without user and password, and without values of secret query parameters, of its addresses."""
    if "=" not in text and "@" not in text:
        return text
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))


def without_credentials(value: Any) -> Any:
    """Return a JSON value with all its strings, keys included, as ``hide_credentials`` returns them."""
    if isinstance(value, str):
        return hide_credentials(value)
    if isinstance(value, dict):
        return {without_credentials(key): without_credentials(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_credentials(item) for item in value)
    return value
