"""Completion in shells: bash, zsh and fish themselves, each by the script that `loopwise completion` prints."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loopwise.arguments import RecipeParser
from loopwise.candidates import candidates
from loopwise.cli import VERBS, main
from loopwise.recipe import RECIPES
from tests.helpers.recipes import MODELS, keys
from tests.helpers.repository import ROOT

BIN = Path(sys.executable).parent  # where the command `loopwise` stands


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("_ARGCOMPLETE", "COMP_"))}
    return {**kept, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TERM": "dumb", **more}


class Terminal:
    """An interactive shell behind a terminal of 200 columns. `prompt` ends what it shows when it waits."""

    def __init__(self, command: list[str], folder: Path):
        self.shown = ""
        self.pid, self.file = pty.fork()
        if not self.pid:
            os.chdir(folder)
            os.execvpe(command[0], command, environment(COLUMNS="200", LINES="200"))

    def read_until(self, pattern: str, seconds: float = 60) -> str:
        """The output up to the end of the first match of `pattern`, which is then forgotten."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"{pattern!r} is not in {self.shown!r}"
            if select.select([self.file], [], [], 0.1)[0]:
                self.shown += os.read(self.file, 65536).decode(errors="replace")
        found, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return found

    def send(self, text: str) -> None:
        os.write(self.file, text.encode())

    def close(self) -> None:
        os.close(self.file)
        os.waitpid(self.pid, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with one file and one directory."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "notes.txt").write_text("text")
    (folder / "smol").mkdir()
    return folder


@pytest.fixture(scope="module")
def bash(folder):
    """bash with the script, that lists ambiguous words at one TAB."""
    terminal = Terminal(["bash", "--norc", "--noprofile", "-i"], folder)
    terminal.send(
        "PS1='ready> '; bind 'set show-all-if-ambiguous on' 'set bell-style none' 'set page-completions off'\n"
    )
    terminal.send("bind 'set show-all-if-ambiguous on'; bind 'set enable-bracketed-paste off'\n")
    terminal.send('eval "$(loopwise completion bash)"; echo set up\n')
    terminal.read_until(r"\nset up\r?\n.*ready> ")
    yield terminal
    terminal.close()


def typed(terminal: Terminal, line: str, pattern: str) -> str:
    """The shell's output after `line` and TAB, until `pattern`; the line is then taken back."""
    terminal.send(line + "\t")
    found = terminal.read_until(pattern)
    terminal.send("\x15")
    return found


# line -> the line after TAB, with the space that follows a whole word
ENDED = {
    "loopwise conv": "loopwise convert ",
    "loopwise train --recipe retr": "loopwise train --recipe retrofit ",
    "loopwise train M OUT --recipe retrofit optimiser.ki": "loopwise train M OUT --recipe retrofit optimiser.kind=",
    "loopwise train M OUT optimiser.kind=mu": "loopwise train M OUT optimiser.kind=muon ",
    "loopwise train M OUT optimiser.train=core,no": "loopwise train M OUT optimiser.train=core,norms ",
    "loopwise train M OUT data.train=no": "loopwise train M OUT data.train=notes.txt ",
    "loopwise train M OUT --launcher fs": "loopwise train M OUT --launcher fsdp2 ",
    "loopwise serve --print-c": "loopwise serve --print-config ",
    "loopwise serve smo": "loopwise serve smol/",
    "loopwise plot curr": "loopwise plot curriculum ",
}


@pytest.mark.parametrize("line", ENDED)
def test_bash_ends_a_word(bash, line):
    assert typed(bash, line, re.escape(ENDED[line]) + "$").endswith(ENDED[line])


def test_bash_lists_words(bash):
    assert set(VERBS) <= set(typed(bash, "loopwise ", r"(?s)serve.*ready> ").split())
    listed = typed(bash, "loopwise convert M OUT lora.", r"(?s)lora\.targets=.*ready> ")
    assert set(re.findall(r"lora\.\w+=", listed)) == {"lora.rank=", "lora.targets=", "lora.init=", "lora.dora="}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh(folder):
    terminal = Terminal(["zsh", "-f", "-i"], folder)
    terminal.send("PS1='ready> '; unsetopt zle_bracketed_paste prompt_sp; autoload -U compinit; compinit -u -D\n")
    terminal.send('eval "$(loopwise completion zsh)"; echo set up\n')
    terminal.read_until(r"\nset up\r?\n")
    for line in ("loopwise conv", "loopwise train M OUT optimiser.kind=mu", "loopwise train --recipe retr"):
        terminal.send(line + "\t")
        rest = ENDED[line].removeprefix(line).rstrip()
        terminal.read_until(re.escape(rest))
        terminal.send("\x15")
    terminal.close()


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish(folder):
    program = "loopwise completion fish | source; for line in $argv; complete -C $line; echo; end"
    lines = ["loopwise conv", "loopwise train M OUT optimiser.kind=mu", "loopwise train M OUT optimiser.warm"]
    command = ["fish", "--no-config", "-c", program, *lines]
    done = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n\n")[:3] == [
        f"convert\t{VERBS['convert'][1]}",
        "optimiser.kind=muon",
        "optimiser.warmup=\tshare of the steps with linear warm-up",
    ], done.stderr


@pytest.mark.parametrize("verb", MODELS)
def test_all_keys_and_recipes_are_candidates(verb, folder, monkeypatch):
    monkeypatch.chdir(folder)
    parser = RecipeParser(verb, {"model": "", "out": ""}, MODELS[verb], "")
    found = candidates(parser, ["M", "OUT"], "")
    assert [*found] == [f"{key}=" for key, _ in keys(MODELS[verb])]
    assert all(found.values()), "every key has a meaning"
    names = {path.stem for path in (RECIPES / verb).glob("*.yaml")}
    assert {*candidates(parser, ["M", "--recipe"], "")} == names | {"notes.txt", "smol/"}


def test_operands_are_files(folder, monkeypatch):
    monkeypatch.chdir(folder)
    parser = RecipeParser("train", {"model": "", "out": ""}, MODELS["train"], "")
    for words in ([], ["M"], ["M", "--recipe", "retrofit"], ["steps=3", "M"]):
        assert {*candidates(parser, words, "")} == {"notes.txt", "smol/"}
    assert "steps=" in candidates(parser, ["M", "--recipe", "retrofit", "OUT"], "")
    assert candidates(parser, ["M", "OUT", "--"], "") == {}


def test_an_unknown_shell_is_named(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
