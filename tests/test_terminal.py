"""Hostile text in a terminal: shown, not obeyed."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from rich.table import Table

from lilpipe import cli
from lilpipe.display import Display
from lilpipe.errors import DataError
from lilpipe.generation import chat
from lilpipe.terminal import make_console, visible

HOSTILE = "a\x1b]52;c;ZXZpbA==\x07b\x9b2Jc\u202etxt.exe\u2066d\re"
SHOWN = r"a\x1b]52;c;ZXZpbA==\x07b\x9b2Jc\u202etxt.exe\u2066d\re"


def shown(*printed, **options):
    file = io.StringIO()
    console = make_console(file=file, width=200, **options)
    for each in printed:
        console.print(each, markup=False)
    return file.getvalue()


def test_controls_are_shown_as_escapes_and_text_stays():
    assert visible(HOSTILE) == SHOWN
    assert visible("naïve 人 👩🏽‍🚀\tשלום\n") == "naïve 人 👩🏽‍🚀\tשלום\n"
    assert visible("\ud800") == r"\ud800"


@given(st.text(st.characters(categories=["Cc", "Cf", "Cs", "Lu", "Zl", "Zp"])))
def test_what_is_shown_can_be_encoded_and_has_no_control_characters(text):
    clean = visible(text)
    clean.encode()
    assert not {"\x1b", "\x9b", "\x07", "\r", "\u202e", "\u2067", "\u2028"} & set(clean)


def test_a_console_shows_hostile_text_in_lines_and_tables_and_keeps_its_own_colours():
    table = Table("document")
    table.add_row(HOSTILE)
    said = shown(HOSTILE, table)
    assert not {"\x1b", "\x9b", "\u202e", "\u2066"} & set(said)
    assert r"\x1b]52;c;" in said
    assert "\x1b[1m" in shown_in_colour("[bold]x[/]")


def shown_in_colour(text):
    file = io.StringIO()
    make_console(file=file, force_terminal=True).print(text)
    return file.getvalue()


def test_a_progress_bar_still_moves_the_cursor():
    file = io.StringIO()
    console = make_console(file=file, force_terminal=True, width=80)
    with Progress(console=console, transient=True) as progress:
        progress.add_task("one", total=2)
        console.print("line \x1b[2J", markup=False, highlight=False)
        progress.refresh()
    assert "\x1b[1A" in file.getvalue()
    assert "\x1b[2J" not in file.getvalue()
    assert r"line \x1b[2J" in file.getvalue()


def test_an_event_of_a_stage_and_an_error_are_shown(capsys, monkeypatch):
    file = io.StringIO()
    Display(make_console(file=file, width=200)).stage_event("corpus", {"message": f"quarantined {HOSTILE}"})
    assert "\x1b" not in file.getvalue()
    assert r"quarantined a\x1b]52" in file.getvalue()

    def fail():
        raise DataError(f"source {HOSTILE}")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert r"source a\x1b]52" in json.dumps(capsys.readouterr().err).replace("\\\\", "\\")


def test_a_completion_cannot_control_the_terminal_of_a_chat(capsys):
    assert chat._say(iter(["fine \x1b", "[2J"])) == "fine \x1b[2J"
    assert capsys.readouterr().out == "fine \\x1b[2J\n"
