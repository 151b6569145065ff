"""URL filtering: normalisation, and block lists.

URLs of one page may differ in scheme, `www.`, default port, tracking parameters, fragment, trailing slash, case of the
host, dot segments and percent-encoding (RFC 3986, section 6.2, and common practice of web crawls); their normalised
forms are equal. Block lists of domains and words follow RefinedWeb (Penedo et al. 2023, appendix G.1). The survey uses
`url_key` to keep one page per URL (Llama 3, Grattafiori et al. 2024, 3.1.1).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote

import idna
import xxhash

from lilpipe.config.corpus import UrlConfig
from lilpipe.data.filters.chain import Bounds, Document, Rejection
from lilpipe.errors import ConfigError, DataError

TRACKING_PREFIXES = ("utm_",)
# fmt: off
TRACKING_PARAMETERS = frozenset({
    "gclid", "gclsrc", "dclid", "gbraid", "wbraid", "fbclid", "msclkid", "yclid", "twclid", "ttclid", "igshid", "igsh",
    "li_fat_id", "mc_cid", "mc_eid", "_ga", "_gl", "_hsenc", "_hsmi", "__hstc", "__hssc", "__hsfp", "mkt_tok",
    "srsltid", "vero_id", "oly_anon_id", "oly_enc_id", "wickedid", "epik",
})
# fmt: on
"""Names of query parameters that track the visitor and do not identify the page."""

_WEB = re.compile(r"(?:https?:/+|/{2,})*", re.IGNORECASE)
_PARTS = re.compile(r"((?:[A-Za-z][A-Za-z0-9+.-]*:/{2})?)([^/?#]*)([^?#]*)(?:\?([^#]*))?", re.DOTALL)
_HOST_END = re.compile(r"(?:\.|:(?:80|443)?)+$")
_ENCODED_IDN = re.compile(r"(?:%[89A-Fa-f][0-9A-Fa-f])+")
_WWW = re.compile(r"(?:www\.)+(?=[^.]+\.)")  # leaves www.com
_PLAIN = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/?\[\]-]*")
_TO_ENCODE = re.compile(r"%([0-9A-Fa-f]{2})|[^A-Za-z0-9._~!$&'()*+,;=:@/?\[\]-]")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_URL_WORD = re.compile(r"[^\W_]+")


def normalise_url(url: str) -> str:
    """Return the normalised form of a URL, such as `example.com/a?b=1`; "" without scheme and host.

    Normalisation is idempotent. Schemes other than http and https are kept. User names and fragments are removed. The
    order of parameters is kept, because it may matter.
    """
    url = url.strip()
    web = _WEB.match(url)
    parts = _PARTS.match(url, web.end() if web else 0)
    assert parts is not None  # all groups may be empty
    scheme, authority, path, query = parts.groups()
    host = _host(authority)
    if not scheme and not host:
        return ""
    kept = "&".join(part for part in _encode(query or "").split("&") if part and not _is_tracking(part))
    return scheme.lower() + host + _without_dots(_encode(path)) + (f"?{kept}" if kept else "")


def url_key(url: str) -> int:
    """Return the 64-bit hash of the normalised URL, the same in every process; 0 if it is empty."""
    normalised = normalise_url(url)
    return xxhash.xxh3_64_intdigest(normalised.encode()) if normalised else 0


class UrlFilter:
    """Rejects documents whose URL is on a block list; documents without a URL pass.

    Raises:
        ConfigError: A list cannot be read.
        DataError: A list is not UTF-8, or has a line that is not a domain or word.
    """

    stage = "url"
    bounds: Mapping[str, Bounds] = {}

    def __init__(self, config: UrlConfig) -> None:
        self.blocked_domains = _read_domains(config.blocked_domains)
        self.blocked_words = _read_words(config.blocked_words)
        self._word_counts = sorted({word.count(" ") + 1 for word in self.blocked_words})

    def __call__(self, document: Document) -> Rejection | None:
        """Reject as `blocked_domain` or `blocked_word`, with the list entry as detail."""
        if not document.url:
            return None
        url = normalise_url(document.url)
        if entry := self._blocked_domain(url):
            return Rejection("blocked_domain", entry)
        if entry := self._blocked_word(url):
            return Rejection("blocked_word", entry)
        return None

    def _blocked_domain(self, url: str) -> str | None:
        """Return the entry that blocks the host: the host itself or a parent domain."""
        domain = url.rpartition("://")[2].partition("/")[0].partition("?")[0].partition(":")[0]
        while domain and domain not in self.blocked_domains:
            domain = domain.partition(".")[2]
        return domain or None

    def _blocked_word(self, url: str) -> str | None:
        """Return the first entry whose words are whole, adjacent words of the URL."""
        words = _words(unquote(url)) if self.blocked_words else []
        for count in self._word_counts:
            for start in range(len(words) - count + 1):
                if (entry := " ".join(words[start : start + count])) in self.blocked_words:
                    return entry
        return None


def _host(authority: str) -> str:
    """Return the normalised host, with the port unless it is a default port."""
    host = _ENCODED_IDN.sub(lambda found: unquote(found[0]), authority.rpartition("@")[2])
    host = _HOST_END.sub("", _encode(_ascii(host)).lower())
    return _WWW.sub("", host) if host.startswith("www.") else host


def _ascii(host: str) -> str:
    """Return an internationalised domain name in its ASCII form (IDNA 2008, with the mapping of UTS 46).

    A label that IDNA 2008 does not permit, such as an emoji, is encoded as it is, as browsers do.
    """
    if host.isascii():
        return host
    name, colon, port = host.partition(":")
    try:
        return idna.encode(name, uts46=True).decode() + colon + port
    except UnicodeError:
        labels = re.split("[.。．｡]", unicodedata.normalize("NFKC", name).lower())
        encoded = (label if label.isascii() else f"xn--{label.encode('punycode').decode()}" for label in labels)
        return ".".join(encoded) + colon + port


def _is_tracking(parameter: str) -> bool:
    name = parameter.partition("=")[0].lower()
    return name in TRACKING_PARAMETERS or name.startswith(TRACKING_PREFIXES)


def _encode(part: str) -> str:
    """Percent-encode characters only where necessary, in upper case."""
    return part if _PLAIN.fullmatch(part) else _TO_ENCODE.sub(_encode_one, part)


def _encode_one(found: re.Match[str]) -> str:
    if found[1]:
        character = chr(int(found[1], 16))
        return character if character in _UNRESERVED else found[0].upper()
    return "".join(f"%{byte:02X}" for byte in found[0].encode(errors="replace"))


def _without_dots(path: str) -> str:
    """Remove `.` and `..` segments and trailing slashes from a path."""
    if "/." in path:
        kept: list[str] = []
        for segment in path.split("/")[1:]:
            if segment == "..":
                del kept[-1:]
            elif segment != ".":
                kept.append(segment)
        path = "".join(f"/{segment}" for segment in kept)
    return path.rstrip("/")


def _words(text: str) -> list[str]:
    return _URL_WORD.findall(text.lower())


def _read_domains(path: str | None) -> frozenset[str]:
    field = "corpus.url.blocked_domains"
    domains = set()
    for number, line in _entries(path, field):
        domain = normalise_url(line.removeprefix("*.").removeprefix("."))
        if not domain or set(domain) & set("/?:%"):
            raise DataError(f"{field}: {path}, line {number}: got {line!r}, expected a domain such as example.com")
        domains.add(domain)
    return frozenset(domains)


def _read_words(path: str | None) -> frozenset[str]:
    field = "corpus.url.blocked_words"
    entries = set()
    for number, line in _entries(path, field):
        if not (words := _words(line)):
            raise DataError(f"{field}: {path}, line {number}: got {line!r}, expected a word of letters or digits")
        entries.add(" ".join(words))
    return frozenset(entries)


def _entries(path: str | None, field: str) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines of a list, without blank lines and comments (`#`)."""
    if path is None:
        return
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{field}: {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(
            f"{field}: got {path!r}, which is not readable ({error.strerror}); name a text file"
        ) from error
    for number, line in enumerate(lines, 1):
        if (line := line.strip()) and not line.startswith("#"):
            yield number, line
