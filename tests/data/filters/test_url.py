import pickle
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lilpipe.config.corpus import UrlConfig
from lilpipe.data.filters.chain import Document
from lilpipe.data.filters.url import TRACKING_PARAMETERS, UrlFilter, normalise_url, url_key
from lilpipe.errors import ConfigError, DataError

SAME = {
    "example.com/a/b?x=1&y=2": [
        "http://example.com/a/b?x=1&y=2",
        "https://www.example.com/a/b?x=1&y=2",
        "HTTPS://WWW.Example.COM:443/a/b?x=1&y=2",
        "http://example.com:80/a/b/?x=1&y=2#top",
        "//example.com./a/b?x=1&y=2",
        "  https://user:secret@example.com/a/./c/../b?x=1&&y=2\n",
        "https://example.com/%61/b?utm_source=mail&x=1&UTM_Medium=x&y=2&gclid=abc&fbclid=1",
        "https://example.com/a/b?x=1&utm%5Fcampaign=spring&y=2",
    ],
    "example.com": [
        "http://example.com",
        "https://example.com/",
        "www.example.com?utm_source=a",
        "example.com/#!/p",
    ],
    "example.com:8080/x": ["http://www.example.com:8080/x/", "example.com:8080/x"],
    "example.com/caf%C3%A9%20bar": ["http://example.com/café bar", "http://example.com/caf%c3%a9%20bar"],
    "xn--mnchen-3ya.de/x": [
        "https://www.MÜNCHEN.de/x",
        "http://xn--mnchen-3ya.de/x/",
        "http://mu\u0308nchen.de/x",
        "http://m%C3%BCnchen.de/x",
        "http://ｍünchen。de/x",
    ],
    "xn--strae-oqa.org/a": ["http://straße.org/a", "http://STRAẞE.org/a", "http://xn--strae-oqa.org/a"],  # IDNA 2008
    "strasse.org/a": ["http://Strasse.org/a"],
    "xn--i-7iq.ws/a": ["http://i❤.ws/a", "http://xn--i-7iq.ws/a"],
    "xn--mnchen-3ya.de:8080/x": ["http://münchen.de:8080/x"],
    "www.com": ["https://www.com/", "http://www.www.com"],
    "ftp://example.com/f": ["FTP://www.example.com/f"],
    "": ["", "  ", "http://", "https:///", "/relative/page", "#top"],
}
DIFFERENT = [
    "example.com/A",
    "example.com/a",
    "example.com/a?b",
    "example.com/a?b=1",
    "example.com/a?b=1&c=2",
    "example.com/a?c=2&b=1",
    "example.com/a%2Fb",
    "example.com/a/b",
    "example.com:8443/a",
    "m.example.com/a",
    "ftp://example.com/a",
    "example.org/a",
]


@pytest.mark.parametrize(("normalised", "url"), [(to, url) for to, urls in SAME.items() for url in urls])
def test_addresses_of_one_page_share_a_form_and_a_key(normalised, url):
    assert normalise_url(url) == normalised
    assert url_key(url) == url_key(normalised)


def test_addresses_of_different_pages_stay_apart():
    assert len({normalise_url(url) for url in DIFFERENT}) == len(DIFFERENT)
    assert len({url_key(url) for url in DIFFERENT}) == len(DIFFERENT)


def test_keys_fit_64_bits_stay_the_same_and_are_0_for_no_address():
    assert url_key("https://example.com/") == 10044734154400447347
    assert all(0 < url_key(url) < 2**64 for url in DIFFERENT)
    assert url_key("") == url_key("http://") == 0


URLS = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["http://", "HTTPS://", "//", "", "ftp://", "http:", "www.", "http:////"]),
    st.text("wW.aä:80443@%[] /", max_size=12),
    st.text("/.%2eEfFé?&=#:utm_ \0", max_size=20),
    st.sampled_from(["?", "?utm_id=1", "?a=%7e&gclid=2", "#x", ""]),
    st.text(max_size=5),
)


@given(st.one_of(URLS, st.text()))
@example("http://www.www.com:80.:443")
@example("http:////a")
@example("http://@//a")
@example("ftp://@//a")
@example("%")
@example("http://http://a")
def test_normalising_twice_changes_nothing(url):
    once = normalise_url(url)
    assert normalise_url(once) == once
    assert once.isascii()


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=8)


@given(
    host=st.from_regex(r"[a-v][a-z0-9-]{0,8}[a-z0-9](\.[a-z]{2,4}){1,2}", fullmatch=True),
    path=st.lists(WORDS.filter(lambda word: word not in (".", "..")), max_size=4),
    query=st.dictionaries(WORDS.filter(lambda word: word not in TRACKING_PARAMETERS), WORDS, max_size=3),
)
def test_host_path_and_parameters_mean_what_they_meant(host, path, query):
    url = f"https://{host}" + "".join("/" + quote(part, safe="") for part in path)
    url += "?" + "&".join(f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in query.items())
    parts = urlsplit("//" + normalise_url(url))
    assert parts.hostname == host
    assert [unquote(part) for part in parts.path.split("/")[1:]] == path
    assert dict(parse_qsl(parts.query)) == query


def blocks(url, tmp_path, domains="", words=""):
    (tmp_path / "domains").write_text(domains, encoding="utf-8")
    (tmp_path / "words").write_text(words, encoding="utf-8")
    config = UrlConfig(blocked_domains=str(tmp_path / "domains"), blocked_words=str(tmp_path / "words"))
    return UrlFilter(config)(Document(id="d", text="", source="s", url=url))


DOMAINS = "# adverts\nbad.com\n\nhttps://www.Ads.example.org/\n*.tracker.net\n.dotted.io\nmünchen.de\n10.0.0.1\n"


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("https://bad.com/page", "bad.com"),
        ("http://a.b.bad.com:8080?x", "bad.com"),
        ("WWW.BAD.COM", "bad.com"),
        ("https://ads.example.org", "ads.example.org"),
        ("https://x.tracker.net/", "tracker.net"),
        ("https://tracker.net/", "tracker.net"),
        ("https://dotted.io/", "dotted.io"),
        ("https://münchen.de/x", "xn--mnchen-3ya.de"),
        ("http://10.0.0.1/x", "10.0.0.1"),
    ],
)
def test_a_blocked_domain_and_its_subdomains_go_with_the_entry_as_detail(tmp_path, url, entry):
    assert blocks(url, tmp_path, DOMAINS) == ("blocked_domain", entry)


@pytest.mark.parametrize(
    "url",
    [
        "https://notbad.com",
        "https://bad.com.org",
        "https://example.org/bad.com",
        "https://example.org",
        "",
        "https://com",
    ],
)
def test_other_domains_pass(tmp_path, url):
    assert blocks(url, tmp_path, DOMAINS) is None


LIST = "Casino\nfree-money\nказино\n"


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("https://x.com/best_casino_2", "casino"),
        ("https://casino.x.com", "casino"),
        ("https://x.com/?q=CASINO", "casino"),
        ("https://x.com/free_money", "free money"),
        ("https://x.com/free/money", "free money"),
        ("https://x.com/%D0%BA%D0%B0%D0%B7%D0%B8%D0%BD%D0%BE", "казино"),
    ],
)
def test_a_blocked_word_between_separators_goes_with_the_entry_as_detail(tmp_path, url, entry):
    assert blocks(url, tmp_path, words=LIST) == ("blocked_word", entry)


@pytest.mark.parametrize("url", ["https://x.com/occasinos", "https://x.com/free", "https://x.com/money-free", ""])
def test_words_inside_others_and_parts_of_entries_pass(tmp_path, url):
    assert blocks(url, tmp_path, words=LIST) is None


def test_without_lists_every_address_passes_and_no_score_is_noted():
    url_filter = UrlFilter(UrlConfig())
    document = Document(id="d", text="", source="s", url="https://casino.bad.com")
    assert url_filter(document) is None
    assert (document.scores, dict(url_filter.bounds)) == ({}, {})


def test_a_missing_list_names_the_setting():
    with pytest.raises(ConfigError, match=r"corpus.url.blocked_domains: got '/none/such', .*No such file"):
        UrlFilter(UrlConfig(blocked_domains="/none/such"))
    with pytest.raises(ConfigError, match=r"corpus.url.blocked_words: got '/none/such'"):
        UrlFilter(UrlConfig(blocked_words="/none/such"))


def test_a_bad_line_is_told_with_its_number(tmp_path):
    with pytest.raises(DataError, match=r"domains, line 2: got 'bad.com/page', expected a domain"):
        blocks("", tmp_path, "good.com\nbad.com/page\n")
    with pytest.raises(DataError, match=r"line 1: got '0.0.0.0 bad.com', expected a domain"):
        blocks("", tmp_path, "0.0.0.0 bad.com")
    with pytest.raises(DataError, match=r"words, line 1: got '---', expected a word"):
        blocks("", tmp_path, words="---")


def test_a_list_in_another_encoding_is_told(tmp_path):
    (tmp_path / "list").write_bytes("münchen.de".encode("latin-1"))
    with pytest.raises(DataError, match=r"blocked_domains: .*list is not UTF-8 \(byte 1\)"):
        UrlFilter(UrlConfig(blocked_domains=str(tmp_path / "list")))


def test_the_filter_travels_to_other_processes(tmp_path):
    (tmp_path / "domains").write_text("bad.com")
    copy = pickle.loads(pickle.dumps(UrlFilter(UrlConfig(blocked_domains=str(tmp_path / "domains")))))
    assert copy(Document(id="d", text="", source="s", url="https://bad.com")) == ("blocked_domain", "bad.com")
