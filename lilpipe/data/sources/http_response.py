"""HTTP responses as a WARC stores them: status, headers and body; and the body of a page as text.

warcio parses the headers and joins chunks, urllib3 decompresses (it bounds its output, which warcio does not), and
webencodings resolves the names of encodings by the WHATWG Encoding Standard.
"""

from __future__ import annotations

import codecs
import io
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import cchardet
import webencodings
from urllib3.exceptions import DecodeError
from urllib3.response import MultiDecoder
from warcio.bufferedreaders import ChunkedDataReader
from warcio.statusandheaders import StatusAndHeadersParser, StatusAndHeadersParserException

HTML_TYPES = ("text/html", "application/xhtml+xml")
HTML_STARTS = (b"<!doctype html", b"<html")

CONTENT_ENCODINGS = ("gzip", "x-gzip", "deflate")
GZIP_START = b"\x1f\x8b"

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
UTF8 = codecs.lookup("utf-8")
NOT_ASCII_SUPERSETS = {
    "iso2022_jp": b"\x1b",
    "iso2022_kr": b"\x1b",
    "hz": b"~{",
    "utf-16-le": b"\0",
    "utf-16-be": b"\0",
}
"""Encodings whose bytes can be valid UTF-8 of another meaning, and a byte sequence that a page in them holds."""

NOT_FOR_PAGES = ("idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "utf-7")
DECLARATION_BYTES = 4_096
"""A declaration further down is not seen; browsers look at 1,024."""
SAMPLE_BYTES = 1 << 16
"""By how much of a page its encoding is guessed."""
LOST = "\N{REPLACEMENT CHARACTER}"
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
    """A response with at most ``max_bytes`` + 1 of its decompressed body. Raises ``ValueError`` if it is none."""
    stream = io.BytesIO(block)
    try:
        parsed = StatusAndHeadersParser(["HTTP/"]).parse(stream)
    except (EOFError, StatusAndHeadersParserException) as error:
        raise ValueError(f"is no HTTP response: it starts with {block[:80]!r}") from error
    if not block[: stream.tell()].endswith((b"\n\r\n", b"\n\n")):
        raise ValueError("is no HTTP response: no empty line ends its headers")
    status = str(parsed.statusline).split()[1:2]  # after the version
    if not status or not status[0].isascii() or not status[0].isdecimal():
        raise ValueError(f"is no HTTP response: its status is {parsed.statusline[:80]!r}, expected a number")
    headers = {name.strip().lower(): value.strip() for name, value in parsed.headers}
    chunked = "chunked" in headers.get("transfer-encoding", "").lower()
    body = cast(bytes, (ChunkedDataReader(stream) if chunked else stream).read())
    return Response(int(status[0]), headers, _decompressed(body, headers.get("content-encoding", ""), max_bytes))


def _decompressed(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body decompressed, or as it is: some archives keep the header of a body that they have decompressed."""
    encodings = [name.strip().lower() for name in encoding.split(",")]
    encodings = [name for name in encodings if name not in ("", "identity")]
    if not encodings:
        return body
    if not set(encodings) <= set(CONTENT_ENCODINGS):
        raise ValueError(f"is compressed as {encoding[:20]!r}; gzip and deflate can be read")
    try:
        return MultiDecoder(",".join(encodings)).decompress(body, max_length=max_bytes + 1)
    except (DecodeError, zlib.error) as error:
        if body.startswith(GZIP_START):
            raise ValueError(f"is damaged: its body is no valid {encoding[:20]}") from error
        return body


def decode(response: Response) -> str:
    """The body as text. Raises ``ValueError`` if no encoding gives any.

    A byte order mark decides, then the header, then the page's declaration, as the WHATWG's HTML Standard says; but
    what is valid UTF-8 is read as UTF-8, and a declaration that most of the other bytes contradict is passed over:
    many servers declare one encoding for all that they send.
    """
    body = response.body
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if body.startswith(mark):
            return _checked(body[len(mark) :].decode(encoding, errors="replace"))
    sample = body[:SAMPLE_BYTES]
    signs = {name for name, sign in NOT_ASCII_SUPERSETS.items() if sign in sample}
    before_utf8 = [codec for codec in _declared(response) if codec.name in signs] if signs else []
    for codec in [*before_utf8, UTF8]:
        if (text := _strict(body, codec)) is not None:
            return text
    declared = list(_declared(response))
    for codec in declared:
        if (text := _strict(body, codec)) is not None or _is_mostly_valid(text := codec.decode(body, "replace")[0]):
            return text
    guess = None if declared else cchardet.detect(sample)["encoding"]
    codec = declared[0] if declared else (_codec(guess) if guess else None) or codecs.lookup("cp1252")
    return _checked(codec.decode(body, "replace")[0])


def _declared(response: Response) -> Iterator[codecs.CodecInfo]:
    """The encodings that the header and the page name."""
    head = re.sub(r"(?s)<!--.*?(?:-->|$)", "", response.body[:DECLARATION_BYTES].decode("latin-1"))
    charset, xml = r"charset\s*=\s*[\"']?\s*([\w.:-]+)", r"^\s*<\?xml[^>]{1,200}?encoding\s*=\s*[\"']([\w.:-]+)"
    header = re.search(charset, response.headers.get("content-type", ""), re.IGNORECASE)
    if header and (codec := _codec(header[1])):
        yield codec
    for pattern in (rf"<meta[^>]{{1,200}}?{charset}", xml):
        if (match := re.search(pattern, head, re.IGNORECASE)) and (codec := _codec(match[1])):
            yield UTF8 if codec.name.startswith("utf-16") else codec  # as ASCII it could be read


def _codec(label: str) -> codecs.CodecInfo | None:
    """The codec that browsers take for a label; of a label that they do not know, Python's."""
    found = webencodings.lookup(label)
    if found is None or found.name == "replacement":  # browsers refuse these encodings, because scripts hide in them
        try:
            codec = codecs.lookup(label)
            "a".encode(codec.name)  # refuses what encodes no text, such as base64
        except (LookupError, ValueError):
            return None
        if codec.name in NOT_FOR_PAGES:
            return None
        found = webencodings.lookup(codec.name)
        if found is None:
            return codec
    return codecs.lookup("gb18030") if found.name == "gbk" else found.codec_info


def _strict(body: bytes, codec: codecs.CodecInfo) -> str | None:
    """The text, if all is valid; but for the last character, which crawlers cut through."""
    try:
        return codec.decode(body, "strict")[0]
    except UnicodeDecodeError as error:
        if error.start < len(body) - 4 or not error.start:
            return None
        return codec.decode(body[: error.start], "strict")[0]


def _is_mostly_valid(text: str) -> bool:
    """Whether few characters are lost, of all and of those outside ASCII: else the text is in another encoding."""
    lost = text.count(LOST)
    return lost <= MAX_LOST_SHARE * len(text) and 2 * lost <= len(text) - len(text.encode("ascii", "ignore"))


def _checked(text: str) -> str:
    lost = text.count(LOST)
    if lost > MAX_LOST_SHARE * len(text):
        raise ValueError(f"is in no known encoding: {lost:,} of {len(text):,} characters mean nothing")
    return text
