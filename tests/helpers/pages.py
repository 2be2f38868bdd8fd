"""Pages of the documentation: their sentences, their blocks of commands, and the marks of these.

A mark is an HTML comment before a block, which a reader does not see:

    <!-- not run: REASON -->               no test runs the block
    <!-- run with: A -> B; C -> D -->      the test replaces A by B in the block, to make it short
    <!-- run as server -->                 the test runs it in the background, until the page's next server
    <!-- run first                         commands that the test runs here, and readers do not need
    COMMANDS
    -->
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.repository import ROOT

PROGRAMS = (
    "loopwise|make|python3?|pip|curl|docker|git|source|accelerate|pipx|VENV/bin/python|tests/|/tmp/renew|\\.venv/bin/"
)
COMMAND = re.compile(rf"^(?:\$ )?(?:[A-Z_]+=\S+ )*(?:{PROGRAMS})(?:\s|\S*/|$)", re.MULTILINE)
LANGUAGES = ("sh", "bash", "shell", "console", "python")
FENCE = re.compile(r"^ *```(\w*)")
MARK = re.compile(r"not run: |run with: |run as server$|run first\n")


@dataclass
class Block:
    """A block of code on a page. text: its lines, without indentation.   marks: the comments before it."""

    page: str
    line: int
    language: str
    text: str
    marks: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_command(self) -> bool:
        return self.language in LANGUAGES or (not self.language and COMMAND.search(self.text) is not None)

    @property
    def reason(self) -> str | None:
        """The reason why no test runs it; None for a block that is run."""
        return next((mark.removeprefix("not run: ") for mark in self.marks if mark.startswith("not run: ")), None)

    @property
    def is_server(self) -> bool:
        return "run as server" in self.marks

    def replacements(self) -> Iterator[tuple[str, str]]:
        for mark in self.marks:
            if mark.startswith("run with: "):
                for pair in mark.removeprefix("run with: ").split("; "):
                    old, arrow, new = pair.partition(" -> ")
                    assert arrow, f"{self.where}: {pair!r} is no A -> B"
                    yield old, new

    def runnable(self) -> str:
        """The text as the test runs it."""
        text = self.text
        for old, new in self.replacements():
            text = text.replace(old, new)
        return text


def pages() -> list[Path]:
    """README and all pages of the documentation that stand in the repository."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The blocks of code of `page` in order, fenced and indented ones, and those of `run first`."""
    name, found, marks = page.relative_to(ROOT).as_posix(), list[Block](), list[str]()
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    blank, in_list = True, False
    for number, line in lines:
        if fence := FENCE.match(line):
            body = []
            for _, inner in lines:
                if FENCE.match(inner):
                    break
                body.append(inner)
            found.append(Block(name, number, fence[1], "\n".join(body), marks))
            marks = []
        elif line.startswith("<!--"):
            comment = [line]
            while "-->" not in comment[-1]:
                comment.append(next(lines)[1])
            mark = "\n".join(comment).removeprefix("<!--").partition("-->")[0].strip()
            if mark.startswith("run first\n"):
                found.append(Block(name, number, "sh", mark.removeprefix("run first\n")))
            elif MARK.match(mark):
                marks = [*marks, mark]
        elif line.startswith("    ") and line.strip() and not in_list:
            if blank:
                found.append(Block(name, number, "", line[4:], marks))
                marks = []
            elif found and not found[-1].language:
                found[-1].text += "\n" + line[4:]
            blank = False
            continue
        elif line.strip():
            in_list = re.match(r" *([-*]|\d+\.) ", line) is not None or (in_list and line.startswith(" "))
        blank = not line.strip()
    return found


def commands(page: Path) -> list[Block]:
    """The blocks of `page` that hold commands."""
    return [block for block in blocks(page) if block.is_command]


# ---- sentences ------------------------------------------------------------------------------------------------------
def sentences(page: Path) -> Iterator[str]:
    """The sentences of `page`, those of cells, headings and list items among them; code counts as one word."""
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)  # lists of names
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?m)^    .*$", "", text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]+>|\{ #[\w-]+ \}", " ", text)
    text = re.sub(r"(?m)^ *(#+|[-*]|\d+\.) ", "\n\n", text)
    for paragraph in re.split(r"\n\s*\n", text):
        pieces = re.split(r"\||\n(?=\|)", paragraph) if paragraph.lstrip().startswith("|") else [paragraph]
        for piece in pieces:
            yield from (part for part in re.split(r"(?<=[.!?])[\"*)]*\s+", " ".join(piece.split())) if part)


def words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())
