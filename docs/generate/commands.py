"""The page of the command line, from typer, and of the targets of make, from the Makefile's `##` comments."""

from __future__ import annotations

import re
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from lilpipe.cli import app


def pages(makefile: Path) -> dict[str, str]:
    """Path to Markdown."""
    command = typer.main.get_command(app)
    commands = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="lilpipe"), name="lilpipe")
    rows = [f"| `make {name}` | {meaning} |" for name, meaning in make_targets(makefile).items()]
    make = "\n".join(["# `make`", "", "| Target | What it does |", "| --- | --- |", *rows]) + "\n"
    return {"reference/commands/lilpipe.md": commands, "reference/commands/make.md": make}


def make_targets(makefile: Path) -> dict[str, str]:
    """Target to its comment; targets without one are internal."""
    found = re.findall(r"^([a-z][a-z-]*):[^=\n]*?##\s*(.+)$", makefile.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(found)
