"""HTTP responses in WARC files: status, headers and body, and the decoding of the body to text.

warcio parses the headers and joins chunks; urllib3 decompresses, with a limit on the output that warcio lacks;
webencodings resolves encoding labels by the WHATWG Encoding Standard.
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
"""Encodings whose bytes can be valid UTF-8 with another meaning, with a byte sequence that occurs in such pages."""

NOT_FOR_PAGES = ("idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "utf-7")
DECLARATION_BYTES = 4_096
"""Bytes of a page that are searched for an encoding declaration; browsers search 1,024."""
SAMPLE_BYTES = 1 << 16
"""Bytes of a page used to detect its encoding."""
LOST = "\N{REPLACEMENT CHARACTER}"
MAX_LOST_SHARE = 0.01
"""Maximum share of undecodable characters in a page."""


@dataclass(frozen=True)
class Response:
    """A response; its body is decompressed and not chunked."""

    status: int
    headers: Mapping[str, str]
    """Header values by lower-case name."""
    body: bytes

    @property
    def is_html(self) -> bool:
        """Whether it is HTML, by its content type or, without one, by its first bytes."""
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return media_type in HTML_TYPES or (not media_type and self.body.lstrip()[:14].lower().startswith(HTML_STARTS))


def parse(block: bytes, max_bytes: int) -> Response:
    """Parse a response and decompress at most ``max_bytes`` + 1 bytes of its body.

    Raises ``ValueError`` if it is not a response.
    """
    stream = io.BytesIO(block)
    try:
        parsed = StatusAndHeadersParser(["HTTP/"]).parse(stream)
    except (EOFError, StatusAndHeadersParserException) as error:
        raise ValueError(f"is not an HTTP response: it starts with {block[:80]!r}") from error
    if not block[: stream.tell()].endswith((b"\n\r\n", b"\n\n")):
        raise ValueError("is not an HTTP response: no empty line after the headers")
    status = str(parsed.statusline).split()[1:2]  # after the version
    if not status or not status[0].isascii() or not status[0].isdecimal():
        raise ValueError(f"is not an HTTP response: got status {parsed.statusline[:80]!r}, expected a number")
    headers = {name.strip().lower(): value.strip() for name, value in parsed.headers}
    chunked = "chunked" in headers.get("transfer-encoding", "").lower()
    body = cast(bytes, (ChunkedDataReader(stream) if chunked else stream).read())
    return Response(int(status[0]), headers, _decompressed(body, headers.get("content-encoding", ""), max_bytes))


def _decompressed(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decompress the body. It may be plain: some archives keep the header of a body that they have decompressed."""
    encodings = [name.strip().lower() for name in encoding.split(",")]
    encodings = [name for name in encodings if name not in ("", "identity")]
    if not encodings:
        return body
    if not set(encodings) <= set(CONTENT_ENCODINGS):
        raise ValueError(f"has content encoding {encoding[:20]!r}, expected gzip or deflate")
    try:
        return MultiDecoder(",".join(encodings)).decompress(body, max_length=max_bytes + 1)
    except (DecodeError, zlib.error) as error:
        if body.startswith(GZIP_START):
            raise ValueError(f"is damaged: its body is not valid {encoding[:20]}") from error
        return body


def decode(response: Response) -> str:
    """Decode the body to text. Raises ``ValueError`` if no encoding fits.

    The order is that of the WHATWG HTML Standard: byte order mark, header, declaration in the page. There are two
    exceptions, because many servers declare one encoding for all pages: valid UTF-8 is read as UTF-8, and a declaration
    that does not fit most of the non-ASCII bytes is ignored.
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
    """Yield the encodings that the header and the page declare."""
    head = re.sub(r"(?s)<!--.*?(?:-->|$)", "", response.body[:DECLARATION_BYTES].decode("latin-1"))
    charset, xml = r"charset\s*=\s*[\"']?\s*([\w.:-]+)", r"^\s*<\?xml[^>]{1,200}?encoding\s*=\s*[\"']([\w.:-]+)"
    header = re.search(charset, response.headers.get("content-type", ""), re.IGNORECASE)
    if header and (codec := _codec(header[1])):
        yield codec
    for pattern in (rf"<meta[^>]{{1,200}}?{charset}", xml):
        if (match := re.search(pattern, head, re.IGNORECASE)) and (codec := _codec(match[1])):
            yield UTF8 if codec.name.startswith("utf-16") else codec  # the declaration was readable as ASCII


def _codec(label: str) -> codecs.CodecInfo | None:
    """Return the codec that browsers use for a label, or Python's codec for labels unknown to browsers."""
    found = webencodings.lookup(label)
    if found is None or found.name == "replacement":  # browsers refuse these encodings for security
        try:
            codec = codecs.lookup(label)
            "a".encode(codec.name)  # fails for codecs that are not text encodings, such as base64
        except (LookupError, ValueError):
            return None
        if codec.name in NOT_FOR_PAGES:
            return None
        found = webencodings.lookup(codec.name)
        if found is None:
            return codec
    return codecs.lookup("gb18030") if found.name == "gbk" else found.codec_info


def _strict(body: bytes, codec: codecs.CodecInfo) -> str | None:
    """Decode strictly; only the last character, which crawlers may truncate, may be invalid."""
    try:
        return codec.decode(body, "strict")[0]
    except UnicodeDecodeError as error:
        if error.start < len(body) - 4 or not error.start:
            return None
        return codec.decode(body[: error.start], "strict")[0]


def _is_mostly_valid(text: str) -> bool:
    """Return whether few characters, of all and of the non-ASCII ones, are undecodable; else the encoding is wrong."""
    lost = text.count(LOST)
    return lost <= MAX_LOST_SHARE * len(text) and 2 * lost <= len(text) - len(text.encode("ascii", "ignore"))


def _checked(text: str) -> str:
    lost = text.count(LOST)
    if lost > MAX_LOST_SHARE * len(text):
        raise ValueError(f"has no known encoding: {lost:,} of {len(text):,} characters cannot be decoded")
    return text
