import contextlib
import gzip
import io
import zlib
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from lilpipe.config.sources import Source
from lilpipe.data.sources.http_response import decode, parse
from lilpipe.data.sources.readers import RawDocument, Unreadable, digest_source, find_parts, read_part
from tests.data.prose import prose

DATE = "2024-05-06T07:08:09Z"


class Archive:
    """A WARC written by warcio."""

    def __init__(self, *, compressed=False):
        self.buffer = io.BytesIO()
        self.writer = WARCWriter(self.buffer, gzip=compressed)
        self.ids = []

    def add(self, body, *, kind="response", status="200 OK", url="http://x.org/", content_type="text/html", **headers):
        headers = {"Content-Type": content_type, **{name.replace("_", "-"): value for name, value in headers.items()}}
        http = StatusAndHeaders(status, [(n, v) for n, v in headers.items() if v], protocol="HTTP/1.1")
        record = self.writer.create_warc_record(
            url,
            kind,
            payload=io.BytesIO(body if isinstance(body, bytes) else body.encode()),
            http_headers=http if kind == "response" else None,
            warc_content_type="text/plain" if kind == "conversion" else "",
            warc_headers_dict={"WARC-Date": DATE},
        )
        self.ids.append(record.rec_headers.get_header("WARC-Record-ID").removeprefix("<urn:uuid:").removesuffix(">"))
        self.writer.write_record(record)
        return self

    @property
    def content(self):
        return self.buffer.getvalue()


def page(text, head=""):
    return f"<html><head>{head}</head><body><article><p>{text}</p></article></body></html>"


def read(path, content, skipped=None):
    path.write_bytes(content)
    source = Source(kind="warc", name="crawl", path=str(path))
    return [row for part in find_parts(source) for row in read_part(part, skipped)]


def texts(rows):
    return [row.text for row in rows if isinstance(row, RawDocument)]


def errors(rows):
    return [(row.file, row.row, row.error) for row in rows if isinstance(row, Unreadable)]


@pytest.mark.parametrize("compressed", [False, True])
def test_every_html_response_is_a_document_with_the_ids_of_its_record(tmp_path, compressed):
    archive = Archive(compressed=compressed)
    archive.add("software: x", kind="warcinfo", url="")
    archive.add(page(prose(1)), url="http://x.org/1")
    archive.add("GET / HTTP/1.1\r\n\r\n", kind="request")
    archive.add(page(prose(2)), url="http://x.org/2")
    first, second = read(tmp_path / ("x.warc.gz" if compressed else "x.warc"), archive.content)
    assert isinstance(first, RawDocument)
    assert (first.id, first.text, first.row) == (archive.ids[1], prose(1), 2)
    assert (first.url, first.date, first.name) == ("http://x.org/1", DATE, "crawl")
    assert isinstance(second, RawDocument)
    assert (second.id, second.text, second.row) == (archive.ids[3], prose(2), 4)


def test_what_is_no_page_is_counted_and_is_not_unreadable(tmp_path):
    archive = Archive()
    archive.add(page(prose(1)), status="404 Not Found")
    archive.add(b"\x89PNG\r\n\x1a\n", content_type="image/png")
    archive.add("<html><body></body></html>")
    archive.add(page(prose(2)), content_type="")
    skipped = Counter()
    assert texts(read(tmp_path / "x.warc", archive.content, skipped)) == [prose(2)]
    assert skipped == {"status is not 200": 1, "no HTML": 1, "no text": 1}


def test_text_that_was_extracted_by_others_is_taken_as_it_is(tmp_path):
    archive = Archive(compressed=True).add("one\n\ntwo", kind="conversion").add(b"\xff\xfe\xfd", kind="conversion")
    rows = read(tmp_path / "x.warc.wet.gz", archive.content)
    assert texts(rows) == ["one\n\ntwo"]
    assert [row for _, row, _ in errors(rows)] == [2]


GREEK = "Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί, και κανείς δεν την είδε. " * 3
LATIN = "Größe und Länge sind für die Prüfung nötig, äußerst wichtig – und „schön“ dazu. " * 3
JAPANESE = "素早い茶色の狐がのろまな犬を飛び越えた。誰もそれを見ていなかったという話である。" * 3


@pytest.mark.parametrize(
    ("text", "encoding", "content_type", "head"),
    [
        (GREEK, "iso8859-7", "text/html; charset=ISO-8859-7", ""),
        (GREEK, "iso8859-7", "text/html", '<meta charset="iso-8859-7">'),
        (GREEK, "cp1253", "text/html", "<meta http-equiv=Content-Type content='text/html; charset=windows-1253'>"),
        (GREEK, "utf-8", "text/html; charset=ISO-8859-1", ""),
        (GREEK, "utf-16", "text/html", ""),
        (GREEK, "utf-8-sig", "text/html; charset=nonsense", ""),
        (LATIN, "cp1252", "text/html; charset=iso-8859-1", ""),
        (LATIN, "cp1252", "text/html; charset=utf-8", "<meta charset=latin1>"),
        (JAPANESE, "shift_jis", "text/html;charset=Shift_JIS", ""),
        (JAPANESE, "iso2022_jp", "text/html; charset=iso-2022-jp", ""),
        (JAPANESE, "euc_jp", "text/html", ""),
    ],
)
def test_a_page_is_decoded_by_its_mark_utf8_its_header_its_declaration_or_a_guess(
    tmp_path, text, encoding, content_type, head
):
    archive = Archive().add(page(text, head).encode(encoding), content_type=content_type)
    assert texts(read(tmp_path / "x.warc", archive.content)) == [text.strip()]


def test_a_page_that_the_crawler_cut_through_a_character_is_still_utf8(tmp_path):
    body = page(GREEK).encode()
    archive = Archive().add(body[: body.index("σκυλί".encode()) + 1])
    (text,) = texts(read(tmp_path / "x.warc", archive.content))
    assert text == GREEK[: GREEK.index("σκυλί")].strip()


def test_a_page_in_no_encoding_is_quarantined(tmp_path):
    archive = Archive().add(bytes(range(128, 256)) * 40, content_type="text/html; charset=utf-8")
    (error,) = errors(read(tmp_path / "x.warc", archive.content))
    assert error[:2] == ("x.warc", 1)
    assert "no known encoding" in error[2]


def chunked(body, size=100):
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def test_chunks_and_compression_are_undone_where_they_are_there(tmp_path):
    plain = page(prose(1)).encode()
    archive = Archive()
    archive.add(chunked(plain), Transfer_Encoding="chunked")
    archive.add(chunked(gzip.compress(plain)), Transfer_Encoding="chunked", Content_Encoding="gzip")
    archive.add(plain, Transfer_Encoding="chunked", Content_Encoding="gzip")
    archive.add(plain, Content_Encoding="br")
    rows = read(tmp_path / "x.warc", archive.content)
    assert texts(rows) == [prose(1)] * 3
    assert [(row, error[:26]) for _, row, error in errors(rows)] == [(4, "has content encoding 'br',")]


def test_a_page_that_decompresses_without_end_is_quarantined_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("lilpipe.data.sources.warc.MAX_PAGE_BYTES", 100_000)
    bomb = gzip.compress(page("word " * 10_000_000).encode())
    archive = Archive().add(bomb, Content_Encoding="gzip").add(page("long " * 30_000)).add(page(prose(1)))
    rows = read(tmp_path / "x.warc", archive.content)
    assert texts(rows) == [prose(1)]
    assert [error[1:] for error in errors(rows)] == [(n, "page is longer than 100,000 bytes") for n in (1, 2)]
    assert len(parse(archive.content.split(b"\r\n\r\n", 1)[1], 100_000).body) == 100_001


def test_a_bomb_of_tags_is_quarantined_with_its_url_and_what_follows_is_read(tmp_path):
    archive = Archive().add("<html><body>" + "<div>" * 50_000, url="http://bomb.org/").add(page(prose(1)))
    rows = read(tmp_path / "x.warc", archive.content)
    assert texts(rows) == [prose(1)]
    (bomb,) = (row for row in rows if isinstance(row, Unreadable))
    assert (bomb.row, bomb.excerpt, bomb.breaks_off) == (1, "http://bomb.org/", False)
    assert "nested elements" in bomb.error


def test_a_response_that_is_none_is_quarantined_and_what_follows_is_read(tmp_path):
    archive = Archive().add("x").add(page(prose(1)))
    content = archive.content.replace(b"HTTP/1.1 200 OK", b"HTPP/1.1 2zz OK", 1)
    rows = read(tmp_path / "x.warc", content)
    assert texts(rows) == [prose(1)]
    assert "is not an HTTP response" in errors(rows)[0][2]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_truncated_archive_gives_the_pages_before_and_says_where_it_breaks_off(tmp_path, compressed):
    name = "x.warc.gz" if compressed else "x.warc"
    archive = Archive(compressed=compressed)
    for seed in range(4):
        archive.add(page(prose(seed)))
    rows = read(tmp_path / name, archive.content[:-200])
    assert texts(rows) == [prose(seed) for seed in range(3)]
    (broken,) = (row for row in rows if isinstance(row, Unreadable))
    assert (broken.file, broken.row, broken.breaks_off) == (name, 4, True)


def test_a_file_that_is_no_warc_breaks_off_at_once(tmp_path):
    (broken,) = read(tmp_path / "x.warc", b"<html>" * 1_000)
    assert isinstance(broken, Unreadable)
    assert (broken.row, broken.breaks_off) == (1, True)


def test_the_digest_of_a_source_follows_its_content(tmp_path):
    source = Source(kind="warc", name="crawl", path=str(tmp_path))
    (tmp_path / "x.warc").write_bytes(Archive().add("one").content)
    before = digest_source(source)
    (tmp_path / "x.warc").write_bytes((tmp_path / "x.warc").read_bytes().replace(b"one", b"two"))
    assert digest_source(source) != before


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TEXT, min_size=1, max_size=5), st.booleans())
def test_any_texts_come_back_as_they_were(tmp_path, given_texts, compressed):
    archive = Archive(compressed=compressed)
    for text in given_texts:
        archive.add(text, kind="conversion")
    rows = read(tmp_path / ("x.warc.gz" if compressed else "x.warc"), archive.content)
    assert texts(rows) == given_texts
    assert not errors(rows)


CONVERSIONS = [f"text {number} " + "word " * 50 for number in range(6)]


@pytest.fixture(scope="module")
def archives():
    found = {}
    for compressed in (False, True):
        archive = Archive(compressed=compressed)
        ends = [len(archive.add(text, kind="conversion").content) for text in CONVERSIONS]
        found[compressed] = archive.content, ends
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.booleans(), st.booleans())
def test_no_damage_raises_and_what_lies_before_it_is_kept(tmp_path, archives, data, compressed, cut):
    content, ends = archives[compressed]
    position = data.draw(st.integers(1, len(content) - 1))
    damaged = bytearray(content[:position] if cut else content)
    if not cut:
        damaged[position] ^= data.draw(st.integers(1, 255))
    rows = read(tmp_path / ("x.warc.gz" if compressed else "x.warc"), bytes(damaged))
    whole = sum(end <= position for end in ends)
    assert texts(rows)[:whole] == CONVERSIONS[:whole]
    if cut and not any(end - len("\r\n\r\n") <= position <= end for end in ends):
        assert any(row.breaks_off for row in rows if isinstance(row, Unreadable))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(["", "charset=utf-16", "charset=base64", "charset=\0", "charset=idna"]))
def test_no_response_does_more_than_raise_a_value_error(body, declared):
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; {declared}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for block in (body, head + body, head.replace(b"Transfer-Encoding: chunked", b"Content-Encoding: deflate") + body):
        with contextlib.suppress(ValueError):
            decode(parse(block, 1_000))


HANZI = "敏捷的棕色狐狸跳过了那只懒惰的狗，而没有人看见它，这真是一件可惜的事情。" * 3
TURKISH = "Hızlı kahverengi tilki tembel köpeğin üzerinden atladı ve kimse bunu görmedi, ışık da yoktu. " * 3


@pytest.mark.parametrize(
    ("text", "encoding", "content_type", "head"),
    [
        (GREEK, "utf-16-le", "text/html; charset=utf-16le", ""),
        (GREEK, "utf-16-be", "text/html; charset=UTF-16BE", ""),
        (GREEK, "utf-8", "text/html; charset=utf-16le", ""),
        (HANZI, "hz", "text/html; charset=hz-gb-2312", ""),
        (HANZI, "utf-8", "text/html; charset=hz-gb-2312", "<!--~{-->"),
        (HANZI, "gb18030", "text/html; charset=gb2312", ""),
        (HANZI, "utf-8", "text/html; charset=iso-8859-1", "<!--~{ \x1b-->"),
        (TURKISH, "cp1254", "text/html; charset=iso-8859-9", "<meta charset=iso-8859-1>"),
        (TURKISH, "cp1254", "text/html", "<!-- <meta charset=koi8-r> --><meta charset=windows-1254>"),
        (GREEK, "cp1253", "text/html; charset=windows-1253", "<meta charset=utf-16>"),
    ],
)
def test_a_page_is_decoded_as_its_header_or_else_its_declaration_says(tmp_path, text, encoding, content_type, head):
    archive = Archive().add(page(text, head).encode(encoding), content_type=content_type)
    assert texts(read(tmp_path / "x.warc", archive.content)) == [text.strip()]


@pytest.mark.parametrize("declared", ["windows-1252", "koi8-r"])
def test_a_broken_byte_does_not_turn_a_page_from_the_encoding_of_its_header_to_that_of_its_declaration(
    tmp_path, declared
):
    body = page(GREEK, f"<meta charset={declared}>").encode().replace("αλεπού".encode(), b"\xff", 1)
    archive = Archive().add(body, content_type="text/html; charset=utf-8")
    assert texts(read(tmp_path / "x.warc", archive.content)) == [GREEK.replace("αλεπού", "\ufffd", 1).strip()]


def body_of(body, **headers):
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return parse(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + body, 1 << 20).body


@pytest.mark.parametrize("end", [b"", b"\0" * 100, b"garbage behind"])
def test_all_gzip_members_of_a_body_are_read(end):
    body = gzip.compress(b"<p>one</p>") + gzip.compress(b"<p>two</p>") + end
    assert body_of(body, Content_Encoding="gzip") == b"<p>one</p><p>two</p>"


def test_codings_that_were_applied_one_after_another_are_undone():
    body = zlib.compress(gzip.compress(b"<p>one</p>"))
    assert body_of(body, Content_Encoding="gzip, deflate") == b"<p>one</p>"


def test_a_header_may_go_on_in_the_next_line():
    assert body_of(gzip.compress(b"one"), Content_Encoding="\r\n gzip") == b"one"


def test_a_damaged_compressed_body_is_refused_by_that_reason():
    body = bytearray(gzip.compress(prose(1).encode()))
    body[20:40] = b"\xff" * 20
    with pytest.raises(ValueError, match="is damaged"):
        body_of(bytes(body), Content_Encoding="gzip")


@pytest.mark.parametrize(
    "block", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n", b"HTTP/1.1\r\n\r\n", b"x\n\n"]
)
def test_a_response_without_status_or_end_of_headers_is_refused(block):
    with pytest.raises(ValueError, match="is not an HTTP response"):
        parse(block, 100)
