"""The chat page: what it is made of, its log of votes, and headless Chromium that uses it as a person does."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import Server, data_url, png, running

from llava_edge.server.page import Page

HTML = (Path(__file__).resolve().parent.parent / "llava_edge" / "server" / "page" / "index.html").read_text("utf-8")


# The file.


class Reader(HTMLParser):
    """Elements that a person can use, with what names them, and names that are not read out."""

    def __init__(self) -> None:
        super().__init__()
        self.nameless: list[str] = []
        self.inline: list[str] = []
        self.unheard: list[str] = []
        self._open: dict[str, Any] | None = None
        self._labels = set(re.findall(r'<label for="(\w+)"', HTML))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        if tag in ("div", "span") and "aria-label" in given and "role" not in given:
            self.unheard.append(str(given))
        named = "aria-label" in given or "aria-labelledby" in given or given.get("id") in self._labels
        if tag in ("button", "a"):
            self._open = {"tag": tag, "named": named, "id": given.get("id")}
        elif tag in ("textarea", "input", "dialog") and not named:
            inside_its_label = given.get("role") == "switch"
            if not inside_its_label and given.get("aria-hidden") != "true":
                self.nameless.append(str(given))

    def handle_data(self, data: str) -> None:
        if self._open and data.strip():
            self._open["named"] = True

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open["tag"]:
            if not self._open["named"]:
                self.nameless.append(str(self._open))
            self._open = None


def test_everything_one_can_use_has_a_name() -> None:
    reader = Reader()
    reader.feed(HTML)
    assert reader.nameless == []
    assert reader.unheard == []
    assert reader.inline == []  # the policy would block them
    assert '<html lang="en">' in HTML


def test_it_needs_nothing_from_elsewhere() -> None:
    addresses = set(re.findall(r"https?://[^\s\"')]+", HTML))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in HTML  # an answer cannot become markup


def test_the_policy_allows_exactly_what_is_in_it() -> None:
    policy = Page().headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        content = HTML.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_its_example_photos_are_served(server: Server) -> None:
    names = re.findall(r'\["([\w-]+\.jpg)"', HTML)
    assert len(names) == 4
    for name in names:
        status, headers, body = server.request("GET", f"/examples/{name}")
        assert (status, headers["content-type"]) == (200, "image/jpeg")
        assert body[:2] == b"\xff\xd8"


# The log.


def test_nothing_is_written_unless_the_log_is_on(server: Server) -> None:
    file = server.log.parent / "home" / "log" / "votes.jsonl"
    vote = {"type": "upvote", "messages": [["user", "<image>\nWhat is it?"], ["assistant", "A cat."]]}
    assert json.loads(server.request("GET", "/log/state")[2]) == {"on": False, "bytes": 0}
    assert server.request("POST", "/log", vote)[0] == 403
    assert not file.exists()
    assert server.request("PUT", "/log/state", {"on": True})[0] == 200
    for kind in ("upvote", "downvote", "flag"):
        assert server.request("POST", "/log", {**vote, "type": kind})[0] == 204
    for wrong in ({}, {"type": "chat"}, {**vote, "messages": "x"}, {**vote, "messages": [["system", "x"]]}):
        assert server.request("POST", "/log", {**wrong})[0] == 400
    exported = server.request("GET", "/log")[2]
    assert exported == file.read_bytes()
    records = [json.loads(line) for line in exported.splitlines()]
    assert [record["type"] for record in records] == ["upvote", "downvote", "flag"]
    for record in records:  # LLaVA's gradio_web_server.py, vote_last_response, and conversation.py, dict
        assert set(record) == {"tstamp", "type", "model", "state", "ip"}
        assert (record["model"], record["ip"]) == ("micro", "127.0.0.1")
        assert set(record["state"]) == {"system", "roles", "messages", "offset", "sep", "sep2"}
        roles = record["state"]["roles"]
        assert record["state"]["messages"] == [[roles[0], "<image>\nWhat is it?"], [roles[1], "A cat."]]
    assert file.parent.stat().st_mode & 0o077 == 0
    assert server.request("DELETE", "/log")[0] == 204
    assert not file.exists()
    assert server.request("PUT", "/log/state", {"on": False})[0] == 200


# In a browser.


@pytest.fixture
def browser(server: Server) -> Iterator[Any]:
    """Headless Chromium with the page open."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = selenium.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    made.get(f"http://127.0.0.1:{server.port}/")
    yield made
    made.quit()
    server.request("DELETE", "/log")
    server.request("PUT", "/log/state", {"on": False})


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def every(browser: Any, selector: str) -> list[Any]:
    found: list[Any] = browser.find_elements("css selector", selector)
    return found


def finished(server: Server, browser: Any, count: int = 1) -> None:
    server.wait_until(lambda: len(every(browser, ".answer .under")) == count)


@pytest.mark.slow
def test_a_person_uses_the_page(server: Server, browser: Any, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 2000), "red").save(tmp_path / "photo.png")
    one(browser, "#file").send_keys(str(tmp_path / "photo.png"))
    server.wait_until(lambda: every(browser, ".thumb img"))
    one(browser, "#text").send_keys("What colour is it?")
    one(browser, "#text").send_keys("\n")
    finished(server, browser)
    said = one(browser, ".answer .said").text
    assert said
    assert "first word after" in one(browser, "details.times summary").text
    # The log: a vote is kept once it is turned on.
    one(browser, "#open-settings").click()
    one(browser, "#log-on").click()
    server.wait_until(lambda: one(browser, "#notice").is_displayed())
    one(browser, "dialog .act").click()
    one(browser, ".act[aria-label='Good answer']").click()
    server.wait_until(lambda: server.request("GET", "/log")[2])
    record = json.loads(server.request("GET", "/log")[2])
    assert record["type"] == "upvote"
    assert record["state"]["messages"][0][1] == "<image>\nWhat colour is it?"
    assert not one(browser, ".act[aria-label='Bad answer']").is_enabled()
    # On with the conversation, and the last answer once more.
    one(browser, "#text").send_keys("Why?\n")
    finished(server, browser, 2)
    one(browser, ".again").click()
    finished(server, browser, 2)
    assert len(every(browser, ".turn")) == 4
    one(browser, "#clear").click()
    assert every(browser, ".turn") == []
    assert one(browser, "#welcome").is_displayed()
    complaints = [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]
    assert complaints == []
    # Nothing but this server was asked for anything.
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 8
    assert all(url.startswith((f"http://127.0.0.1:{server.port}/", "data:", "blob:")) for url in asked)


@pytest.mark.slow
def test_the_answer_is_the_apis(server: Server, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png("blue"))
    one(browser, "#file").send_keys(str(tmp_path / "photo.png"))
    server.wait_until(lambda: every(browser, ".thumb img"))
    one(browser, "#text").send_keys("What colour?\n")
    finished(server, browser)
    wanted = server.text("What colour?", (png("blue"),), max_tokens=512)
    shown = browser.execute_script("return turns.at(-1).text")
    assert shown == wanted


@pytest.mark.slow
def test_stop_and_errors(server: Server, browser: Any) -> None:
    one(browser, "#text").send_keys("Hello\n")
    browser.execute_script("document.getElementById('stop').click()")
    finished(server, browser)
    assert browser.execute_script("return document.activeElement.id") == "text"
    assert server.wait_until(lambda: server.metric("llava_edge_requests_in_work") == 1) < 2
    browser.execute_script("document.getElementById('text').value = 'x '.repeat(5000)")
    one(browser, "#text").send_keys("\n")
    server.wait_until(lambda: every(browser, ".failed"))
    assert "context" in one(browser, ".failed").text
    assert one(browser, ".again").is_enabled()


@pytest.mark.slow
def test_after_an_error_the_talk_goes_on(server: Server, browser: Any) -> None:
    """What was not answered is not part of it; its photo is asked about all the same."""
    browser.execute_script("photos = [arguments[0]]; showPendingPhotos()", data_url(png("blue")))
    browser.execute_script("document.getElementById('text').value = 'x '.repeat(5000)")
    one(browser, "#text").send_keys("\n")
    server.wait_until(lambda: every(browser, ".failed"))
    one(browser, "#text").send_keys("What colour?\n")
    finished(server, browser, 2)
    assert len(every(browser, ".failed")) == 1
    assert browser.execute_script("return turns.at(-1).text") == server.text(
        "What colour?", (png("blue"),), max_tokens=512
    )


@pytest.mark.slow
def test_clearing_while_it_answers(server: Server, browser: Any) -> None:
    """The torn answer does not come back as the beginning of the next conversation."""
    one(browser, "#text").send_keys("Hello\n")
    browser.execute_script("document.getElementById('clear').click()")
    assert server.wait_until(lambda: server.metric("llava_edge_requests_in_work") == 1) < 2
    assert one(browser, "#welcome").is_displayed()
    one(browser, "#text").send_keys("Hello\n")
    finished(server, browser)
    assert browser.execute_script("return turns.map(turn => turn.role)") == ["user", "assistant"]
    assert every(browser, ".failed") == []


@pytest.mark.slow
@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_photo_dropped_or_pasted(way: str, server: Server, browser: Any) -> None:
    script = """
        const [way, address] = arguments, data = new DataTransfer();
        const bytes = Uint8Array.from(atob(address.split(",")[1]), letter => letter.charCodeAt(0));
        data.items.add(new File([bytes], "photo.png", {type: "image/png"}));
        document.dispatchEvent(way === "drop"
            ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
    """
    browser.execute_script(script, way, data_url(png("blue")))
    server.wait_until(lambda: every(browser, ".thumb img"))
    assert browser.execute_script("return photos") == [data_url(png("blue"))]
    one(browser, "[aria-label='Remove photo 1']").click()
    assert every(browser, ".thumb img") == []


@pytest.mark.slow
def test_the_settings_reach_the_model(server: Server, browser: Any) -> None:
    one(browser, "#open-settings").click()
    for name, keys in (("temperature", "\ue014" * 4), ("top_p", "\ue012"), ("max_tokens", "\ue012" * 20)):
        one(browser, f"#{name}").send_keys(keys)  # arrows to the right and to the left
    one(browser, "dialog .act").click()
    one(browser, "#text").send_keys("Hello\n")
    finished(server, browser)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    body = json.loads(next(request["postData"] for request in sent if request["url"].endswith("/completions")))
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.4, 0.6, 64)
    assert "cut off after 64 tokens" in one(browser, "details.times summary").text


@pytest.mark.slow
def test_a_vote_without_the_log_is_not_sent(server: Server, browser: Any) -> None:
    one(browser, "#text").send_keys("Hello\n")
    finished(server, browser)
    one(browser, ".act[aria-label='Flag as harmful']").click()
    assert "the log is off" in one(browser, "#toast").text
    assert not one(browser, "#notice").is_displayed()
    assert json.loads(server.request("GET", "/log/state")[2]) == {"on": False, "bytes": 0}
    assert one(browser, ".act[aria-label='Flag as harmful']").get_attribute("aria-pressed") is None  # nothing was saved


@pytest.mark.slow
def test_a_server_that_is_gone_is_said(micro_bundle: Path, server: Server, browser: Any, tmp_path: Path) -> None:
    with running(micro_bundle, tmp_path) as other:
        browser.get(f"http://127.0.0.1:{other.port}/")
        server.wait_until(lambda: "ready" in one(browser, "#state").text)
    one(browser, "#text").send_keys("Hello\n")
    server.wait_until(lambda: every(browser, ".failed"))
    assert "cannot be reached" in one(browser, ".failed").text
    assert one(browser, ".again").text == "Try again"
    server.wait_until(lambda: "not running" in one(browser, "#state").text)


@pytest.mark.slow
def test_by_keyboard_alone(server: Server, browser: Any) -> None:
    """Tab reaches everything in sight, and an example can be started with Enter."""
    names = []
    for _ in range(12):
        browser.switch_to.active_element.send_keys("\ue004")
        names.append(browser.execute_script("const e = document.activeElement; return e.id || e.className"))
    assert names[:7] == ["open-settings", "drop", "example", "example", "example", "example", "attach"]
    every(browser, ".example")[1].send_keys("\n")
    finished(server, browser)
    assert every(browser, ".photos img")
    assert browser.execute_script("return document.activeElement.id") == "text"  # for the next question


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 360, 1000])
def test_nothing_is_wider_than_the_window(width: int, server: Server, browser: Any) -> None:
    size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    one(browser, "#text").send_keys("x" * 300 + "\n")
    finished(server, browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.getElementById('main').scrollWidth") <= width
