"""HTTP responses as they lie in a WARC: status, headers, body; and the body of a page as a string."""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import cchardet

HTML_TYPES = ("text/html", "application/xhtml+xml")
HTML_STARTS = (b"<!doctype html", b"<html")

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
SUPERSETS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
"""Python's names of encodings, and of those that browsers take for them (WHATWG Encoding Standard)."""

NOT_FOR_PAGES = ("idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "utf-7")
DECLARATION_BYTES = 4_096
"""A declaration further down is not seen; browsers look at 1,024."""
SAMPLE_BYTES = 1 << 16
"""By how much of a page its encoding is guessed."""
MAX_LOST_SHARE = 0.01
"""Of the characters of a page; with more that mean nothing in any encoding, it is no text."""


@dataclass(frozen=True)
class Response:
    """A response with its body as sent, without chunks and compression."""

    status: int
    headers: Mapping[str, str]
    """By names in lower case."""
    body: bytes

    @property
    def is_html(self) -> bool:
        """By its type, or if it has none by its first bytes."""
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return media_type in HTML_TYPES or (not media_type and self.body.lstrip()[:14].lower().startswith(HTML_STARTS))


def parse(block: bytes, max_bytes: int) -> Response:
    """A response, no more than ``max_bytes`` of its body. Raises ``ValueError`` if it is none."""
    end = re.search(rb"\r?\n\r?\n", block)
    if not block.startswith(b"HTTP/") or end is None:
        raise ValueError("is no HTTP response: it does not start with a status and headers")
    first, *lines = block[: end.start()].decode("latin-1").splitlines()
    status = first.split()[1:2]
    if not status or not status[0].isascii() or not status[0].isdigit():
        raise ValueError(f"is no HTTP response: its first line is {first[:80]!r}")
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    body = block[end.end() :]
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = b"".join(_chunks(body)) or body  # some archives keep the header and not the chunks
    return Response(int(status[0]), headers, _decompressed(body, headers.get("content-encoding", ""), max_bytes))


def _chunks(body: bytes) -> Iterator[bytes]:
    position = 0
    while size := re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]{0,64}\r\n").match(body, position):
        start, length = size.end(), int(size[1], 16)
        yield body[start : start + length]
        position = start + length + 2


def _decompressed(body: bytes, encoding: str, max_bytes: int) -> bytes:
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"is compressed as {encoding[:20]!r}; gzip and deflate can be read")
    for wbits in (32 + zlib.MAX_WBITS, -zlib.MAX_WBITS):  # by its own header; bare, as some servers send deflate
        try:
            return zlib.decompressobj(wbits=wbits).decompress(body, max_bytes + 1)
        except zlib.error:
            continue
    return body  # some archives keep the header of what they have decompressed


def decode(response: Response) -> str:
    """The body as text. Raises ``ValueError`` if no encoding gives any.

    UTF-8 is tried before what is declared: text in another encoding hardly ever is valid UTF-8, while many servers
    declare Latin-1 for all that they send.
    """
    body = response.body
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if body.startswith(mark):
            return _checked(body[len(mark) :].decode(encoding, errors="replace"))
    declared = list(_declared(response))
    for encoding in [*declared, "utf-8"] if b"\x1b" in body else ["utf-8", *declared]:  # ISO 2022 looks like ASCII
        text = _strict(body, encoding)
        if text is not None:
            return text
    guess = None if declared else cchardet.detect(body[:SAMPLE_BYTES])["encoding"]
    encoding = declared[0] if declared else (_python_name(guess) if guess else None) or "cp1252"
    return _checked(body.decode(encoding, errors="replace"))


def _declared(response: Response) -> Iterator[str]:
    """The encodings that the header and the page name, in Python's names."""
    head = response.body[:DECLARATION_BYTES].decode("latin-1")
    for pattern, text in (
        (r"charset\s*=\s*[\"']?\s*([\w.:-]+)", response.headers.get("content-type", "")),
        (r"<meta[^>]{1,200}?charset\s*=\s*[\"']?\s*([\w.:-]+)", head),
        (r"^\s*<\?xml[^>]{1,200}?encoding\s*=\s*[\"']([\w.:-]+)", head),
    ):
        if (match := re.search(pattern, text, re.IGNORECASE)) and (name := _python_name(match[1])):
            yield name


def _python_name(encoding: str) -> str | None:
    """Python's name of an encoding, or None if there is none of that name."""
    try:
        name = codecs.lookup(encoding).name
        "a".encode(name)  # refuses what encodes no text, such as base64
    except (LookupError, UnicodeError):
        return None
    return None if name in NOT_FOR_PAGES else SUPERSETS.get(name, name)


def _strict(body: bytes, encoding: str) -> str | None:
    """The text, if all is valid; but for the last character, which crawlers cut through."""
    try:
        return body.decode(encoding)
    except UnicodeDecodeError as error:
        if error.start < len(body) - 4 or not error.start:
            return None
        return body[: error.start].decode(encoding)


def _checked(text: str) -> str:
    lost = text.count("\N{REPLACEMENT CHARACTER}")
    if lost > MAX_LOST_SHARE * len(text):
        raise ValueError(f"is in no known encoding: {lost:,} of {len(text):,} characters mean nothing")
    return text
