import sys

import pytest

from lilpipe.config.sources import Source
from lilpipe.data.sources import installed_docs
from lilpipe.data.sources.readers import RawDocument, Unreadable, find_parts, read_part

MODULE = '''"""About boats."""
import does_not_exist
raise SystemExit("imported")


class Boat:
    """A thing that floats.

    Shared paragraph.
    """

    def sail(self, to, *, speed=3):
        """Go there.

        Shared paragraph.
        """
        def local():
            """Not public."""


try:
    def moor():
        """Tie up."""
except Exception:
    pass
'''

METADATA = """Metadata-Version: 2.1
Name: boats
Version: 1.2
License: MIT
Classifier: License :: OSI Approved :: MIT License

# Boats

A README about boats.
"""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    site, stdlib = tmp_path / "site", tmp_path / "lib"
    files = {
        "site/boats/__init__.py": MODULE,
        "site/boats/tests/test_boats.py": '"""A test."""',
        "site/boats/_vendor/other.py": '"""Of another licence."""',
        "site/boats/broken.py": 'print "no"\n"""x"""',
        "site/boats/silent.py": "x = 1",
        "site/lilpipe/x.py": '"""Itself."""',
        "site/boats-1.2.dist-info/METADATA": METADATA,
        "site/boats-1.2.dist-info/RECORD": "".join(
            f"boats/{name},sha256=x,1\n"
            for name in ("__init__.py", "tests/test_boats.py", "_vendor/other.py", "broken.py", "silent.py", "gone.py")
        )
        + "../../bin/boat,,\n",
        "site/lilpipe-0.dist-info/METADATA": METADATA,
        "site/lilpipe-0.dist-info/RECORD": "lilpipe/x.py,,\n",
        "lib/os.py": '"""About the system."""',
        "lib/pydoc_data/topics.py": "topics = {'with': 'About ' 'with.', 'if': 'About if.'}",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    paths = {"purelib": str(site), "platlib": str(site), "stdlib": str(stdlib)}
    monkeypatch.setattr(installed_docs.sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(installed_docs, "items", installed_docs.items.__wrapped__)
    return site


def read(**settings):
    source = Source(kind="installed-docs", name="docs", **settings)
    return [row for part in find_parts(source) for row in read_part(part)]


def test_docstrings_topics_and_readmes_are_read_with_name_version_and_licence(environment):
    documents = {row.id: row for row in read() if isinstance(row, RawDocument)}
    assert set(documents) == {
        "boats/README",
        "boats/boats/__init__.py",
        "python/os.py",
        "python/topics/with",
        "python/topics/if",
    }
    module = documents["boats/boats/__init__.py"]
    assert (module.name, module.version, module.licence) == ("boats", "1.2", "MIT")
    assert documents["python/os.py"].licence == "PSF-2.0"
    assert documents["python/topics/with"].text == "About with."
    assert documents["boats/README"].text == "# Boats\n\nA README about boats."
    assert "boats" not in sys.modules


def test_a_modules_text_names_what_each_docstring_documents_and_repeats_no_paragraph(environment):
    assert installed_docs.module_texts(MODULE.encode()) == [
        "About boats.\n\nclass Boat\n\nA thing that floats.\n\nShared paragraph.\n\n"
        "Boat.sail(to, speed)\n\nGo there.\n\nmoor()\n\nTie up."
    ]


def test_a_large_module_becomes_several_documents():
    source = "".join(f'def f{i}():\n    """{i} {"long " * 200}"""\n' for i in range(12))
    texts = installed_docs.module_texts(source.encode())
    assert len(texts) == 4
    assert max(map(len, texts)) <= installed_docs.TEXT_CHARS
    assert "\n\n".join(texts).count("long") == 12 * 200


def test_a_file_that_is_no_python_is_reported_with_its_line(environment):
    (broken,) = (row for row in read() if isinstance(row, Unreadable))
    assert (broken.file, broken.row) == ("boats/boats/broken.py", 1)
    assert "not valid Python" in broken.error


def test_the_digest_follows_names_and_versions(environment):
    before = installed_docs.digest()
    (environment / "boats-1.2.dist-info").rename(environment / "boats-1.3.dist-info")
    assert installed_docs.digest() != before


@pytest.mark.parametrize(
    ("header", "licence"),
    [
        ("License-Expression: Apache-2.0\nLicense: MIT", "Apache-2.0"),
        ("License: BSD", "BSD"),
        ("License: a long text\n that goes on\nClassifier: License :: OSI Approved :: MIT License", "MIT License"),
        ("Name: x", "unknown"),
    ],
)
def test_the_licence_is_the_most_exact_one_that_the_metadata_give(tmp_path, header, licence):
    (tmp_path / "METADATA").write_text(header + "\n\nbody")
    assert installed_docs._licence(installed_docs._metadata(tmp_path / "METADATA")) == licence


def test_real_documentation_of_this_environment_keeps_within_max_bytes():
    texts = [row.text for row in read(max_bytes=40_000) if isinstance(row, RawDocument)]
    assert 10_000 < sum(len(text.encode()) for text in texts) <= 40_000
