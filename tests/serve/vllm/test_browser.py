"""The page /depth in headless Chromium, on a real server: `make test-browser`.

LOOPWISE_BROWSER names a Chromium; without it, one on the path is taken. LOOPWISE_SCREENSHOTS names a folder for
pictures of the page.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.serving import Server, serving

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("LOOPWISE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
KEY, TOKENS = "a key", 48

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("vllm"),  # one engine at a time
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium, or LOOPWISE_BROWSER=its path"),
]


@pytest.fixture(scope="module")
def server(model) -> Iterator[Server]:
    """A server with a key, whose requests leave by a rule unless they name another."""
    with serving(model[0], "num_recurrences=4", "kv_policy=last-exited", "--", "--api-key", KEY) as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api")
    with driver.sync_playwright() as started:
        # Chromium's own sandbox does not run as root in a container; the page is ours.
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


class Tab:
    """A page in a tab of its own. faults: errors on its console, exceptions, and requests to other places."""

    def __init__(self, browser: Any, url: str, **options: Any):
        self.faults: list[str] = []
        self.page = browser.new_page(viewport={"width": 1400, "height": 900}, **options)
        self.page.on("console", lambda x: x.type == "error" and self.faults.append(f"{x.text} {x.location['url']}"))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        origin = "/".join(url.split("/")[:3])
        self.page.on("request", lambda one: one.url.startswith(origin) or self.faults.append(one.url))
        self.page.set_default_timeout(60_000)
        self.page.goto(url)

    def unlock(self) -> None:
        self.page.get_by_label("API key").fill(KEY)
        self.page.keyboard.press("Tab")
        self.page.locator("#model", has_text="engine=").wait_for()

    def ask(self, question: str) -> None:
        """Ask, and wait for the end of all replies."""
        turns = self.page.locator(".turn").count()
        self.page.get_by_label("Your text").fill(question)
        self.page.keyboard.press("Enter")
        self.page.locator(".turn").nth(turns).wait_for()
        self.page.locator("#stop:disabled").wait_for()

    def depths(self, reply: int) -> list[int]:
        """The depths that the titles of a reply's tokens name."""
        titles = self.page.locator(".reply").nth(reply).locator(".token").evaluate_all("all => all.map(a => a.title)")
        return [int(re.match(r"(\d+) recurrences?\b", title)[1]) for title in titles]  # pyright: ignore

    def picture(self, name: str) -> None:
        if folder := os.environ.get("LOOPWISE_SCREENSHOTS"):
            self.page.wait_for_timeout(1500)  # the next counters
            self.page.screenshot(path=Path(folder) / f"{name}.png")


def check_accessible(page: Any) -> None:
    """axe-core finds nothing: names, roles, order of headings, contrast of all text."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe().run(page)
    assert axe.violations_count == 0, axe.generate_report()


def asked(server: Server, question: str, **fields: Any) -> tuple[list[int], str]:
    """The depths and the text of a reply that is not streamed."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": question}], "temperature": 0, **fields}
    body |= {"max_tokens": TOKENS, "return_recurrences": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    call = urllib.request.Request(server.url + "/v1/chat/completions", json.dumps(body).encode(), headers)
    reply = json.load(urllib.request.urlopen(call, timeout=60))
    return reply["usage"]["recurrences"]["per_token"][0], reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_question_at_two_depths(server, browser, scheme):
    """Every token of both replies has the depth that the server gives elsewhere, as title, number and colour."""
    tab = Tab(browser, server.url + "/depth", color_scheme=scheme)
    page = tab.page
    page.locator("#model", has_text="API key").wait_for()
    refused = [fault.rpartition(server.url)[2] for fault in tab.faults if "401" in fault]
    assert sorted(refused) == ["/metrics", "/v1/depth", "/v1/models"]  # each is asked once
    tab.faults.clear()
    tab.unlock()
    policy = "kv_policy=last-exited: exits save work, and change what later tokens read."
    assert page.locator("#policy").inner_text() == policy
    page.get_by_label("Recurrences R").fill("8")
    page.get_by_label("Compare with a second R").check()
    page.get_by_label("Second R:").fill("2")
    page.get_by_label("Exit rule").select_option("latent-diff")
    page.get_by_label("Exit threshold").fill("0.95")
    page.get_by_label("Most tokens").fill(str(TOKENS))
    page.evaluate(SHIFTS)
    tab.ask("hello")
    for reply, depth in enumerate((8, 2)):
        fields = {"num_recurrences": depth, "exit_rule": "latent-diff", "exit_threshold": 0.95}
        depths, text = asked(server, "hello", **fields)
        assert tab.depths(reply) == depths
        assert page.locator(".reply .text").nth(reply).text_content() == text
    assert len(set(tab.depths(0))) > 1
    assert page.evaluate("shifted") < 0.01, "the layout jumps while tokens come"
    summary = page.locator(".reply .summary").first
    assert summary.inner_text().startswith(f"{len(tab.depths(0))} tokens, ")
    summary.locator("summary").press("Enter")  # the table, by keyboard
    summary.locator("table").wait_for()
    assert summary.locator("tbody tr").count() == len(tab.depths(0))
    summary.locator("summary").press("Enter")
    page.get_by_label("Show numbers").check()
    number = "token => getComputedStyle(token, '::after').content"
    assert page.locator(".token").first.evaluate(number) == f'"{tab.depths(0)[0]}"'
    tab.picture(f"two-depths-{scheme}")
    check_colours(page)
    check_accessible(page)
    assert tab.faults == []
    page.close()


SHIFTS = """() => {
  window.shifted = 0;
  new PerformanceObserver((seen) => seen.getEntries().forEach((one) => (window.shifted += one.value)))
    .observe({ type: "layout-shift", buffered: false });
}"""
COLOURS = """all => all.map((one) => {
  const style = getComputedStyle(one);
  return [style.color, style.backgroundColor].map((text) => text.match(/[\\d.]+/g).map(Number));
})"""


def luminance(colour: list[float]) -> float:
    """Relative luminance of an sRGB colour, 0 to 255 (WCAG 2.2)."""
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def check_colours(page: Any) -> None:
    """Text on every colour of the scale has the contrast of WCAG AA, and lightness alone orders the depths."""
    steps = page.locator("#legend .step").evaluate_all(COLOURS)
    assert len(steps) == 8
    for text, fill in steps:
        high, low = sorted((luminance(text), luminance(fill)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5
    fills = [luminance(fill) for _, fill in steps]
    assert fills in (sorted(fills), sorted(fills, reverse=True))


def test_counters_of_the_engine(server, browser):
    """The histogram counts the tokens that were asked for here, at their depth."""
    tab = Tab(browser, server.url + "/depth")
    tab.unlock()
    tab.page.locator("#live-note", has_text="engine").wait_for()
    tab.page.get_by_label("Recurrences R").fill("3")
    tab.page.get_by_label("Exit rule").select_option("fixed")
    tab.page.get_by_label("Most tokens").fill("30")
    tab.page.get_by_role("button", name="Count anew").click()
    tab.ask("hello")
    count = len(tab.depths(0))
    tab.page.locator(f"#exits[aria-label='Tokens by recurrences: 3: {count}']").wait_for()
    lanes = tab.page.locator("#lanes").get_attribute("aria-label")
    assert float(lanes.rpartition(" ")[2]) >= 1
    tab.faults = [fault for fault in tab.faults if "401" not in fault]
    assert tab.faults == []
    tab.page.close()


def test_a_text_of_the_model_stays_text(server, browser):
    """Whatever it holds; and a reply of several chunks, cut anywhere, is put together."""
    tab = Tab(browser, server.url + "/depth")
    tab.unlock()
    text = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    choice = {"index": 0, "delta": {"content": text}, "recurrences": [1, 12], "tokens": [text[:20], text[20:]]}
    event = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    answer = {"status": 200, "content_type": "text/event-stream", "body": event}
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))
    tab.page.get_by_label("Your text").fill("<b>bold</b>")
    tab.page.get_by_role("button", name="Send").click()
    tab.page.locator(".reply details").wait_for()
    assert tab.page.locator(".reply .text").text_content() == text
    assert tab.page.locator(".question").text_content() == "<b>bold</b>"
    assert tab.page.locator("#turns").locator("img, script, b").count() == 0
    assert tab.page.locator("#legend .step").last.text_content() == "12"  # the scale reaches the deepest token
    tab.page.close()


def test_mistakes_are_the_servers_own_words(server, browser):
    tab = Tab(browser, server.url + "/depth")
    tab.unlock()
    tab.page.get_by_label("Exit rule").select_option("latent-diff")
    tab.page.get_by_label("Exit threshold").fill("-1")
    tab.ask("hello")
    assert "exit_threshold=-1: at least 0" in tab.page.get_by_role("alert").inner_text()
    assert tab.page.locator(".reply .summary").inner_text() == "no reply"
    tab.page.get_by_label("API key").fill("another")
    tab.ask("hello")
    assert "wants an API key" in tab.page.get_by_role("alert").last.inner_text()
    tab.page.close()


def test_a_long_reply_can_be_stopped_and_the_conversation_goes_on(server, browser):
    tab = Tab(browser, server.url + "/depth")
    tab.unlock()
    tab.page.get_by_label("Most tokens").fill("400")
    tab.page.get_by_label("Your text").fill("hello")
    tab.page.keyboard.press("Enter")
    tab.page.locator(".token").nth(3).wait_for()
    tab.page.get_by_role("button", name="Stop").click()
    tab.page.locator("#stop:disabled").wait_for()
    assert tab.page.locator(".summary").inner_text().endswith("stopped")
    with tab.page.expect_request("**/v1/chat/completions") as sent:
        tab.page.get_by_label("Most tokens").fill("4")
        tab.ask("and then?")
    messages = sent.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == tab.page.locator(".text").first.text_content()
    tab.page.get_by_role("button", name="New conversation").click()
    assert tab.page.locator(".turn").count() == 0
    tab.page.close()


def test_everything_has_a_name_and_a_place_in_the_order_of_keys(server, browser):
    """A screen reader names every control, and the tabulator reaches them all."""
    tab = Tab(browser, server.url + "/depth")
    tab.unlock()
    tab.page.get_by_label("Compare with a second R").check()
    tab.page.get_by_label("Exit rule").select_option("cosine")
    tab.page.locator("#reset").wait_for()  # the first counters show it
    controls = tab.page.locator("input, select, textarea, button").all()
    named = [one.evaluate("one => one.labels?.[0]?.textContent || one.textContent") for one in controls]
    assert all(name.strip() for name in named)
    tab.page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(30):
        tab.page.keyboard.press("Tab")
        reached.add(tab.page.evaluate("document.activeElement.id"))
    ids = {one.get_attribute("id") for one in controls if one.is_enabled() and one.is_visible()}
    assert {"depth", "depth-b", "threshold", "decoder", "question", "send", "numbers", "reset"} <= ids <= reached
    tab.page.close()


def test_the_fixed_engine_shows_one_depth_behind_a_prefix(model, browser):
    with serving(model[0], "engine=fixed", "num_recurrences=2", "--", "--root-path", "/x") as server:
        tab = Tab(browser, server.url + "/x/depth")
        tab.page.locator("#note", has_text="every token at R = 2").wait_for()
        assert tab.page.get_by_label("Recurrences R").is_disabled()
        assert tab.page.locator("#policy").inner_text() == "kv_policy=per-depth"
        tab.page.get_by_label("Most tokens").fill("12")
        tab.page.get_by_label("The model gets").select_option("text")
        tab.ask("hello")
        assert set(tab.depths(0)) == {2}
        assert "no lanes" in tab.page.locator("#live-note").inner_text()
        tab.picture("fixed")
        assert tab.faults == []
