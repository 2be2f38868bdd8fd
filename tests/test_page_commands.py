"""Every command of README and the documentation runs, in the order of its page, on small models; and the site builds.

A page is one shell in a folder of its own. There are a tiny GGUF file with the name and the layers of SmolLM2's, texts,
conversations, and a link to this environment as .venv.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.helpers.gguf_files import family_model, write_gguf
from tests.helpers.pages import Block, commands, pages
from tests.helpers.repository import ROOT
from tests.helpers.serving import free_port

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHELL = """
set -euo pipefail
SERVER=
stop() { if [ -n "$SERVER" ]; then kill -TERM $SERVER; wait $SERVER || true; SERVER=; fi; }
trap stop EXIT
curl() { command curl --fail-with-body "$@"; }  # a reply with an error is an error
ready() {
    for _ in $(seq 600); do
        if command curl -sf http://127.0.0.1:PORT/health; then return; fi
        kill -0 $SERVER || { cat server.log; exit 1; }
        sleep 0.5
    done
    cat server.log; exit 1
}
"""


def runnable(page: Path) -> list[Block]:
    return [block for block in commands(page) if block.reason is None]


def script(page: Path, port: int) -> str:
    """The commands of `page` that are run, for bash."""
    lines = [SHELL]
    for block in runnable(page):
        text = block.runnable()
        lines.append(f"echo '== {block.where}' >&2")
        if block.is_server:
            lines += ["stop", f"{text} > server.log 2>&1 &", "SERVER=$!", "ready"]
        elif block.language == "python":
            lines.append(f"python - <<'PYTHON'\n{text}\nPYTHON")
        else:
            lines.append(text)
    return "\n".join(lines).replace("PORT", str(port)).replace("8000", str(port))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """The files that the pages take as given."""
    folder = tmp_path_factory.mktemp("inputs")
    model = family_model("llama", num_hidden_layers=30, max_position_embeddings=4096)
    write_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf", model, metadata={"tokenizer.chat_template": CHAT})
    text = (ROOT / "LICENSE").read_text()
    (folder / "my-text.txt").write_text(text * 4)
    (folder / "held-out.txt").write_text(text)
    chat = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "It is there."}]
    (folder / "my-chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 64)
    records = [json.dumps({"text": part}) for part in text.split("\n\n")]
    (folder / "held-out.jsonl").write_text("\n".join(records))
    (folder / ".venv").symlink_to(sys.prefix)
    programs = folder / "bin"
    programs.mkdir()
    for name, run in (("loopwise", "-m loopwise "), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {run}"$@"\n')
        (programs / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("page", [p for p in pages() if runnable(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_run(page, inputs, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(inputs, folder, symlinks=True)
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = ["bash", "-c", script(page, free_port())]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(1500)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, (tmp_path / "log").read_text()[-6000:]


# ---- the site -------------------------------------------------------------------------------------------------------
class Fetched(HTMLParser):
    """Addresses that a browser fetches to show a page, apart from links that a reader may follow."""

    def __init__(self, page: Path):
        super().__init__()
        self.found: list[str] = []
        self.classes: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.classes |= set((values.get("class") or "").split())
        kind = values.get("rel") or ""
        if tag == "link" and kind not in ("canonical", "prev", "next"):
            self.found.append(values.get("href") or "")
        elif tag != "a" and "src" in values:
            self.found.append(values["src"] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_fetches_nothing_from_elsewhere(site):
    html = sorted(site.rglob("*.html"))
    assert len(html) > 25
    for page in html:
        fetched = Fetched(page)
        assert fetched.found
        assert not [address for address in fetched.found if re.match(r"(https?:)?//", address)], page
        assert "mermaid" not in fetched.classes, f"{page}: the theme would load a script from a CDN for it"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text()), style


def test_the_site_can_be_searched(site):
    """The index is the site's own; it finds generated pages, too."""
    index = json.loads((site / "search/search_index.json").read_text())["docs"]
    for word, page in (("latent-diff", "concepts/exit-rules.html"), ("gradient_accumulation", "reference/keys.html")):
        assert any(word in entry["text"] and entry["location"].startswith(page) for entry in index), word
