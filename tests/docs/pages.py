"""The hand-written pages: their fenced blocks with the marks that say what a test does with them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

MARK = re.compile(r"<!-- test: (run|slow) -->")
FENCE = re.compile(r"^ *```(\w*) *(.*)$")
TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    mark: str
    """`run`, `slow`, or empty for blocks that are not run."""
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    start, mark, body = None, "", []
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if start is None and fence:
            before = MARK.fullmatch(lines[number - 2].strip()) if number > 1 else None
            start, mark, body = (number, fence), before[1] if before else "", []
        elif start is not None and line.strip() == "```":
            first, opening = start
            title = TITLE.search(opening[2])
            found.append(
                Block(
                    page=path.relative_to(ROOT).as_posix(),
                    line=first,
                    language=opening[1],
                    mark=mark,
                    title=title[1] if title else None,
                    text="\n".join(body) + "\n",
                )
            )
            start = None
        elif start is not None:
            body.append(line)
    return found


def commands(block: Block) -> list[list[str]]:
    """The commands of a `sh` block as words, without comments, assignments of variables and redirections."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


ALL = [block for path in PAGES for block in blocks(path)]
SHELL = [block for block in ALL if block.language == "sh"]
TOML = [block for block in ALL if block.language == "toml"]
