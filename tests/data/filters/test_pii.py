import ipaddress
import pickle
import random
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilpipe.config.corpus import PIIConfig
from lilpipe.data.filters.chain import Bounds, Document
from lilpipe.data.filters.pii import KINDS, PIIFilter, replace
from tests.data.prose import prose

ALL = PIIConfig(emails=True, ip_addresses=True, phone_numbers=True, secrets=True)


def token(length, alphabet=string.ascii_letters + string.digits, seed=1):
    return "".join(random.Random(f"{seed}{length}{alphabet}").choices(alphabet, k=length))


BASE32, URL_SAFE = string.ascii_uppercase + "234567", string.ascii_letters + string.digits + "_-"
# Built from parts, so that no scanner takes this file for a leak.
SECRETS = [
    "AKIA" + token(16, BASE32),
    "ASIA" + token(16, BASE32),
    *(f"gh{kind}_" + token(36) for kind in "pousr"),
    "github_pat_" + token(22) + "_" + token(59),
    "glpat-" + token(20),
    "xoxb-" + token(12, string.digits) + "-" + token(12, string.digits) + "-" + token(24),
    "sk_live_" + token(24),
    "rk_test_" + token(99),
    "AIza" + token(35, URL_SAFE[:-1]),
    "ya29." + token(60),
    "sk-proj-" + token(40) + "T3BlbkFJ" + token(40),
    "sk-" + token(20) + "T3BlbkFJ" + token(20),
    "sk-ant-api03-" + token(93) + "AA",
    "hf_" + token(34, string.ascii_letters),
    "npm_" + token(36),
    "pypi-AgEIcHlwaS5vcmc" + token(100),
    "SG." + token(22) + "." + token(43),
    "eyJ" + token(20) + ".eyJ" + token(60) + "." + token(43),
]
BODY = "\n".join(token(64, string.ascii_letters + string.digits + "+/", seed) for seed in range(5))


def pem(kind, body=BODY):
    return f"-----BEGIN {kind}-----\n{body}\n-----END {kind}-----"


PERSONAL = {
    "emails": [
        "jane.doe@gmail.com",
        "o'brien+lists@mail.uni-bonn.de",
        "x_1@sub.domain.co.uk",
        "JANE@MAIL.ORG",
        "a@b.museum",
        "me@xn--mnchen-3ya.xn--p1ai",
        "jörg.muster@example.de",
        "jo\u0308rg@mail.de",
        "info@müller.example",
        "me@mail.example",
        "иван@почта.рф",
        "δοκιμή@παράδειγμα.gr",
        "संपर्क@डाटामेल.भारत",
        "me@例子.广告",
    ],
    "ip_addresses": [
        "93.184.216.34",
        "8.88.45.1",
        "8.8.4.4",
        "203.0.114.7",
        "2606:2800:220:1:248:1893:25c8:1946",
        "2a00:1450::200e",
    ],
    "phone_numbers": [
        "+49 30 901820",
        "+44 (0)20 7946 1234",
        "+86-10-6552-9988",
        "+390612345678",
        "+1 212 736 5000",
        "+12127365000",
        "+1 (212) 736-5000",
        "(212) 736-5000",
        "212-736-5000",
        "212.736.5000",
        "1-800-736-5000",
    ],
    "secrets": [*SECRETS, pem("RSA PRIVATE KEY"), pem("OPENSSH PRIVATE KEY"), pem("PGP PRIVATE KEY BLOCK")],
}
FRAMES = ["{}", "see {}.", "<{}>", "({})", '"{}",', "联系{}。", "a {} b", "x\n{}\ny", "Kontakt: {}; und", "*{}*"]


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in PERSONAL.items() for value in values])
def test_personal_data_is_replaced_and_all_around_it_stays(kind, value):
    for frame in FRAMES:
        assert replace(frame.format(value), kind) == (frame.format(KINDS[kind][1]), 1)


@pytest.mark.parametrize(
    ("kind", "text", "replaced"),
    [
        ("emails", "mailto:jane@mail.org?subject=x", "mailto:<EMAIL>?subject=x"),
        ("emails", "_jane@mail.org_, email=joe@mail.org", "_<EMAIL>_, email=<EMAIL>"),
        ("emails", "https://lists.python.org/list/dev@python.org/", "https://lists.python.org/list/<EMAIL>/"),
        ("ip_addresses", "http://93.184.216.34:8080/x", "http://<IP_ADDRESS>:8080/x"),
        ("ip_addresses", "host=93.184.216.34/24", "host=<IP_ADDRESS>/24"),
        ("ip_addresses", "5.9.77.0-5.9.77.255", "<IP_ADDRESS>-<IP_ADDRESS>"),
        ("ip_addresses", "[2a00:1450::200e]:80 2a00:1450::/32", "[<IP_ADDRESS>]:80 <IP_ADDRESS>/32"),
        ("emails", "联系用户@例子.广告。", "<EMAIL>。"),
        ("ip_addresses", "the host 8.8.45.1 and http://5.6.7.8/", "the host <IP_ADDRESS> and http://<IP_ADDRESS>/"),
        ("secrets", "postgres://user:secret@host/db", "postgres://user:<SECRET>@host/db"),
        ("secrets", "redis://:p4ss:w0rd@host", "redis://:<SECRET>@host"),
        ("secrets", 'password = "hunter2"', 'password = "<SECRET>"'),
        ("secrets", '{"api_key": "0f8fad5bd9cb"}', '{"api_key": "<SECRET>"}'),
        ("secrets", "Authorization: Bearer abcdef0123456789", "Authorization: Bearer <SECRET>"),
        ("secrets", '-H "authorization: basic dXNlcjpwYXNz"', '-H "authorization: basic <SECRET>"'),
        ("secrets", 'aws_secret_access_key = "' + token(40) + '"', 'aws_secret_access_key = "<SECRET>"'),
        ("secrets", "export AWS_SECRET_ACCESS_KEY=" + token(40), "export AWS_SECRET_ACCESS_KEY=<SECRET>"),
        (
            "secrets",
            f"https://hooks.slack.com/services/T{token(9)}/B{token(9)}/{token(24)}",
            "https://hooks.slack.com/services/<SECRET>",
        ),
    ],
)
def test_only_the_part_that_is_personal_is_replaced(kind, text, replaced):
    assert replace(text, kind)[0] == replaced


HARMLESS = {
    "emails": [
        "@pytest.fixture",
        "@app.route('/')\n@x.y",
        "user@example.com, a@b.example.org, you@host.test, x@printer.local, root@localhost",
        "logo@2x.png and icon@3x.jpeg",
        "git@github.com:python/cpython.git",
        "ssh://git@github.com/x, https://jane:secret@host.com/, ftp://user@ftp.host.org",
        "npm install react@18.2.0 and clap@5.11.0 and @types/node",
        "y = W@x.transpose(0, 1) + A@B.T",
        "jane at mail dot org, a@b, @jane, jane@, @",
        f"{'a' * 70}@mail.org",
        "uses: actions/checkout@main.yml, pkg@settings.toml",
    ],
    "ip_addresses": [
        "git 2.40.1.1 and 95.0.2.1",
        "version 1.2.3.4 and 10.0.19041.1 and 3.3.9.4",
        "pip install x==93.184.21.3 'y>=5.0.0.62' z~=4.3.2.77",
        "Chrome/49.0.26.112 base-4.10.1.90 v2.6.32.61 release 2.6.32.61 text-93.18.21.3.tar.gz",
        "Section 4.2.1.33 and section-8.1.2.44",
        "192.168.1.77 10.0.0.99 172.16.5.44 127.0.0.1 169.254.1.99 0.0.0.0 255.255.255.255",
        "192.0.2.44 198.51.100.77 203.0.113.99",
        "224.0.0.251 239.255.255.250",
        "1.3.6.1.4.1.311.21.20 and 1.2.3.256 and 01.02.03.44",
        "std::vector a::b ::1 fe80::1 fc00::99 2001:db8::44 ff02::fb dead::beef",
        "in the year 2006:: and at 2024:10:12 10:44:59",
        "bad.domain.93.184.216.34x",
    ],
    "phone_numbers": [
        "ISBN 978-3-16-148410-0, 0-306-40615-2, 9783161484100",
        "2024-10-12T10:44:59+0100 2024-10-12 10:44:59.123456 +02:00",
        "212-555-0123 (555) 555-0199 +1 415 555 0100",
        "PEP 0440, RFC 2616, 1234567890, 12345-6789, 123-45-6789",
        "0.212.736.5000 3.141-592.6535 x+12127365000 212-736-50001 212-736-5000-77",
        "+1 and +15 and +12345678 and +123 456 and +1 012 736 5000",
        "a = b + 4930901820; c += 4930901820",
    ],
    "secrets": [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "x" * 36,
        "hf_" + "a" * 34,
        "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        pem("RSA PRIVATE KEY", "..."),
        pem("PUBLIC KEY"),
        pem("CERTIFICATE"),
        "-----BEGIN RSA PRIVATE KEY----- starts such a file",
        "task-" + token(48),
        "xghp_" + token(36),
        "AKIA" + token(17, BASE32),
        "sha256:" + token(64, "0123456789abcdef"),
        'password = "<your password>", password="", passwd: "${PASSWORD}", token = "hello", key = "abcdefghijk"',
        "postgres://user:$PASSWORD@host/db https://host:8080/a@b https://user@host/x",
        "Authorization: Bearer YOUR_TOKEN, Authorization: Bearer <token>",
        "hf_hub_download npm_config_registry sk-learn xoxo-love",
    ],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in HARMLESS.items() for text in texts])
def test_what_only_looks_like_personal_data_stays(kind, text):
    assert replace(text, kind) == (text, 0)


@given(st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address))
def test_an_ipv4_address_goes_if_it_is_public_and_no_section_number(address):
    is_address = sum(number > 31 for number in address.packed) > 1 or str(address) in ("8.8.8.8", "8.8.4.4", "1.1.1.1")
    is_personal = address.is_global and not address.is_multicast and is_address
    assert replace(f"from {address} to", "ip_addresses")[1] == is_personal


@given(st.integers(0x2000 << 112, 2**128 - 1).map(ipaddress.IPv6Address), st.booleans())
def test_an_ipv6_address_goes_if_it_is_public(address, exploded):
    is_personal = address.is_global and address in ipaddress.IPv6Network("2000::/3")
    written = address.exploded if exploded else str(address)
    is_written_open = written.endswith("::")
    assert replace(f"from {written} to", "ip_addresses")[1] == (is_personal and not is_written_open)


PIECES = st.sampled_from([value for values in PERSONAL.values() for value in values])
GAPS = st.sampled_from(["\n", "\t", ", ", "; ", " | ", '" "', "><", "/ "])
TEXTS = st.lists(st.tuples(st.one_of(PIECES, st.text(max_size=6)), GAPS).map("".join), max_size=8).map("".join)


@given(TEXTS)
def test_replacing_again_finds_nothing_and_the_rest_is_as_it_was(text):
    for kind, (_, placeholder) in KINDS.items():
        replaced, count = replace(text, kind)
        assert replace(replaced, kind) == (replaced, 0)
        if placeholder not in text:
            rest = replaced.split(placeholder)
            assert len(rest) == count + 1
            assert re.fullmatch("(?s:.+?)".join(map(re.escape, rest)), text)


@given(st.text())
def test_any_text_is_taken(text):
    document = Document(id="d", text=text, source="s")
    assert PIIFilter(ALL)(document) is None


def test_counts_are_noted_and_nothing_is_rejected():
    text = f"{prose(1)} a@mail.org b@mail.org 93.184.216.34 +49 30 901820 {SECRETS[0]} {prose(2)}"
    document = Document(id="d", text=text, source="s")
    assert PIIFilter(ALL)(document) is None
    assert document.scores == {"pii.secrets": 1, "pii.emails": 2, "pii.ip_addresses": 1, "pii.phone_numbers": 1}
    assert document.text == f"{prose(1)} <EMAIL> <EMAIL> <IP_ADDRESS> <PHONE_NUMBER> <SECRET> {prose(2)}"


def test_only_the_kinds_asked_for_are_replaced_and_noted():
    for kind in KINDS:
        config = PIIConfig(**{each: each == kind for each in KINDS})
        document = Document(id="d", text=" ".join(values[0] for values in PERSONAL.values()), source="s")
        pii = pickle.loads(pickle.dumps(PIIFilter(config)))
        pii(document)
        assert document.scores == {f"pii.{kind}": 1}
        assert dict(pii.bounds) == {kind: Bounds()}
        assert [value[0] in document.text for value in PERSONAL.values()] == [each != kind for each in PERSONAL]


def test_text_without_personal_data_stays_the_very_object():
    text = prose(1)
    document = Document(id="d", text=text, source="s")
    PIIFilter(ALL)(document)
    assert document.text is text


@pytest.mark.parametrize(
    "unit",
    [
        "a@",
        "@a.",
        "1.",
        "a.b@c.",
        "2a00:",
        "+1 ",
        "-----BEGIN PRIVATE KEY-----\nA",
        "eyJ",
        ".eyJ",
        "sk-",
        "12-",
        "+49 30 901820",
        "ö@",
        "@例.",
        "संप",
        "://a:b",
        "password='",
        "Authorization: Bearer ",
    ],
)
def test_hostile_text_takes_time_in_proportion_to_its_length(unit):
    text = unit * (200_000 // len(unit))
    PIIFilter(ALL)(Document(id="d", text=text, source="s"))  # quadratic time would run into the suite's limit
