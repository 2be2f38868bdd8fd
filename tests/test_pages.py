"""README and the documentation: lengths, links, marks of commands, lists and messages, compared with the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from docs.code_map import LINKED
from loopwise.cli import VERBS, main
from loopwise.convert.architectures import SUPPORTED
from loopwise.serve.api.architectures import ARCHITECTURES
from loopwise.serve.api.fields import ABOUT, FIELDS
from tests.helpers.pages import MARK, blocks, commands, pages, sentences, words
from tests.helpers.repository import ROOT

PLAIN = [ROOT / "README.md", ROOT / "docs/tutorial.md", *sorted((ROOT / "docs/guides").glob("*.md"))]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PLAIN, ids=named)
def test_sentences_are_short(page):
    long = [sentence for sentence in sentences(page) if words(sentence) > 30]
    assert not long


def test_the_count_of_words_sees_what_a_reader_sees(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Two words\n\n<!-- hidden -->\nOne `a b c` [two three](x.md). Next\nline!\n\n| a b | c |\n\n```\nx y\n```\n"
    )
    assert [words(sentence) for sentence in sentences(page)] == [2, 4, 2, 2, 1]


@pytest.mark.parametrize("page", pages(), ids=named)
def test_every_command_is_run_or_says_why_not(page):
    """Unmarked blocks are run by tests/test_page_commands.py. A mark that changes nothing is a mistake, too."""
    for block in blocks(page):
        if not block.is_command:
            assert not block.marks, f"{block.where}: marks before a block that is no command"
            continue
        assert block.language in ("sh", "python"), f"{block.where}: fence it as sh or python, so that a test can run it"
        if block.reason is not None:
            assert len(block.reason.split()) >= 3, f"{block.where}: give the reason"
            assert len(block.marks) == 1, f"{block.where}: it is not run, so other marks do nothing"
        for old, _ in block.replacements():
            assert old in block.text, f"{block.where}: {old!r} does not stand in the block"


def test_marks_are_spelt_right():
    for page in pages():
        for comment in re.findall(r"<!--\s*((?:not )?run\b.*?)\s*-->", page.read_text(), re.DOTALL):
            assert MARK.match(comment), f"{named(page)}: {comment!r}"


def test_a_block_without_a_mark_is_found_in_any_form():
    page = ROOT / "docs" / "index.md"
    text = "a\n\n    loopwise x\n\n```sh\nls\n```\n\n<!-- not run: no such thing -->\n```python\nx\n```\n\n"
    found = blocks_of(text + "```text\nmake\n```\n", page)
    assert [(block.language, block.is_command, block.reason) for block in found] == [
        ("", True, None), ("sh", True, None), ("python", True, "no such thing"), ("text", False, None),
    ]  # fmt: skip


def blocks_of(text: str, page: Path):
    """The blocks of `text`, as if it stood at `page`."""

    class Text(type(page)):
        def read_text(self, *args, **kwargs):
            return text

    return blocks(Text(page))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=named)
def test_links_of_pages_outside_of_the_site_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


# ---- lists that the code has, too -----------------------------------------------------------------------------------
@pytest.mark.parametrize("page", ["README.md", "docs/reference/sources.md"])
def test_lists_of_architectures_are_the_code_s(page):
    found = re.findall(r"(?m)^((?:afmoe|arcee),[\w\s,-]*?)\.$", (ROOT / page).read_text())
    served = set(ARCHITECTURES) - {"sandwich", "ungated"}  # which imports become
    lists = [served] if page == "README.md" else [set(SUPPORTED), served]
    assert [set(re.split(r",\s*", text)) for text in found] == lists
    assert f"{len(SUPPORTED)} architectures" in (ROOT / "README.md").read_text()


def test_every_request_field_is_explained():
    assert ABOUT.keys() == set(FIELDS)


@cache
def generated() -> dict[str, str]:
    from docs.generated import PAGES

    return {path: page() for path, page in PAGES.items()}


def test_generated_reference_has_every_verb_option_and_key(capsys):
    """Compared with what `--help` prints."""
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        text = capsys.readouterr().out
        section = generated()["reference/cli.md"].partition(f"## {verb} {{")[2].partition("\n## ")[0]
        for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text.partition("keys:")[0])) - {"--help"}:
            assert option in section, f"{verb} {option}"
        keys = generated()["reference/keys.md"].partition(f"## loopwise {verb}\n")[2].partition("\n## ")[0]
        for key in re.findall(r"(?m)^  ([a-z_.]+): ", text.partition("\nkeys:\n")[2]):
            assert f"`{key}`" in keys or f"`{key}`".replace("phases.", "phases[].") in keys, f"{verb} {key}"


def test_generated_reference_has_every_field_rule_and_metric():
    for name in FIELDS:
        assert f"| `{name}` |" in generated()["reference/fields.md"]
    metrics = (ROOT / "serve/vllm/metrics.py").read_text()
    names = set(re.findall(r'"(loopwise:\w+)"', metrics))
    assert len(names) > 3
    for name in names:
        assert f"`{name}" in generated()["reference/metrics.md"]


# ---- messages -------------------------------------------------------------------------------------------------------
PLACE = "\0"  # of a value in a message


def messages(*folders: str) -> Iterator[str]:
    """Every text in the code that may be a message, with PLACE for each value in it."""
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else PLACE for part in node.values]
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value.replace("{}", PLACE)


def test_messages_of_the_troubleshooting_page_are_the_code_s():
    """Each has a text of the code in it, with at least 18 letters of its own, whatever the values."""
    patterns = [
        re.compile(".*?".join(map(re.escape, text.strip().split(PLACE))))
        for text in {*messages("loopwise", *LINKED), *re.findall(r"[^\"]{30,}", (ROOT / "Makefile").read_text())}
        if len(text.replace(PLACE, "")) >= 18
    ]
    shown = [block.text for block in blocks(ROOT / "docs/troubleshooting.md") if block.language == "text"]
    assert len(shown) > 25
    for message in shown:
        assert any(pattern.search(message) for pattern in patterns), message


# ---- the site -------------------------------------------------------------------------------------------------------
def test_diagrams_become_tables():
    from docs.generated import on_page_markdown

    page = "a\n```mermaid\ngraph TD\n    b --> c\n    b --> d/e\n```\n"
    assert on_page_markdown(page) == "a\n| box | imports |\n| --- | --- |\n| `b` | `c`, `d/e` |\n"


def test_commands_that_a_test_runs_are_many():
    """Most commands on the pages that a newcomer follows are run."""
    found = [block for page in PLAIN for block in commands(page)]
    assert sum(block.reason is None for block in found) > 0.85 * len(found)
