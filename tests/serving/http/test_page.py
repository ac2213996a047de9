"""The page, in a real browser: what it shows, what it asks for, and that names of adapters are text."""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from tests.patience import HANG_S, until
from tests.serving.http.fake_engine import FakeEngine
from tests.serving.http.harness import KEYS, USER_KEY, Running, running

from roadie import embedded
from roadie.errors import ConfigError
from roadie.serving.http.extensions import Extension, RunFigures, StepFigures

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
PICTURES = os.environ.get("ROADIE_PICTURES")
"""A folder for screenshots, where somebody wants to look at them."""

needs_a_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with a chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # whatever goes elsewhere fails
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    browser.set_page_load_timeout(HANG_S)
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture
def server() -> Iterator[Running]:
    with running(FakeEngine(step_s=0.004, adapter_names=("legal", "pirate", "terse"))) as server:
        yield server


def find(browser: Any, css: str) -> Any:
    return browser.find_element("css selector", css)


def texts(browser: Any, css: str) -> list[str]:
    """Of all at once: rows are replaced as figures come."""
    return browser.execute_script(
        "return Array.from(document.querySelectorAll(arguments[0]), each => each.innerText)", css
    )


def look(browser: Any, server: Running, *, width: int = 1100, scheme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # of the pages before
    browser.get(server.url)


def run_all(browser: Any, prompt: str = "The") -> None:
    find(browser, "#prompt").clear()
    find(browser, "#prompt").send_keys(prompt)
    find(browser, "#run").click()
    until(lambda: all("tokens" in text for text in texts(browser, ".measured")))


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def asked_for(browser: Any) -> set[str]:
    """Every address that the page asked for."""
    found = set()
    for entry in browser.get_log("performance"):
        for url in re.findall(r'"Network\.requestWillBeSent".*?"request":\{.*?"url":"([^"]+)"', entry["message"]):
            found.add(url)
    return found


def take_picture(browser: Any, name: str) -> None:
    if PICTURES:
        height = browser.execute_script("return document.documentElement.scrollHeight")
        width = browser.execute_script("return document.documentElement.clientWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        (Path(PICTURES) / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


@needs_a_browser
def test_several_adapters_side_by_side_and_a_slider_for_strength(browser: Any, server: Running) -> None:
    look(browser, server)
    until(lambda: texts(browser, ".column h3") == ["base model", "legal", "pirate", "terse"])
    run_all(browser)
    shown = dict(zip(texts(browser, ".column h3"), texts(browser, ".column pre"), strict=True))
    assert shown["base model"].startswith("The base 2 0 1 2 3")
    assert shown["legal"].startswith("The legal*1 2 0 1 2 3")
    slider = find(browser, '[data-adapter="legal"] input')
    before = len(server.engine.requests)
    browser.execute_script("arguments[0].value = 1.5; arguments[0].dispatchEvent(new Event('input'))", slider)
    until(lambda: find(browser, '[data-adapter="legal"] pre').text.startswith("The legal*1.5 2 0"))
    assert find(browser, '[data-adapter="legal"] output').text == "1.5"
    assert len(server.engine.requests) == before + 1  # the others stay as they are
    assert server.engine.requests[-1].adapter == {"legal": 1.5}
    until(lambda: "48 tokens" in find(browser, '[data-adapter="legal"] .measured').text)
    assert complaints(browser) == []
    asked = asked_for(browser)
    assert any(url.endswith("/v1/completions") for url in asked)
    assert {url for url in asked if not url.startswith(server.url)} == set()


@pytest.fixture
def talking() -> Iterator[Running]:
    tokenizer = embedded.load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    with running(FakeEngine(step_s=0.004, adapter_names=("legal", "terse")), tokenizer=tokenizer) as server:
        yield server


def prompts(server: Running, number: int) -> set[str]:
    """Of the last requests."""
    decode = embedded.load_tokenizer().decode
    return {decode(request.prompt_ids).strip() for request in server.engine.requests[-number:]}


@needs_a_browser
def test_a_model_with_a_chat_template_is_talked_with_by_several_adapters(browser: Any, talking: Running) -> None:
    look(browser, talking)
    until(lambda: texts(browser, "#run") == ["Send"])
    find(browser, "#run").click()  # nothing was said, and nothing is asked
    find(browser, "#max-tokens").clear()
    find(browser, "#max-tokens").send_keys("3")
    run_all(browser, "Hi")
    assert find(browser, "#prompt").get_attribute("value") == ""
    assert prompts(talking, 3) == {"<user>Hi"}
    length = len(talking.engine.requests[-1].prompt_ids)
    assert texts(browser, '[data-adapter="legal"] pre') == [f"Hi\n\n legal*1 {length} 0"]
    find(browser, "#prompt").send_keys("And?")
    find(browser, "#run").click()
    until(lambda: len(talking.engine.requests) == 6 and all("tokens" in text for text in texts(browser, ".measured")))
    names = ("base", "legal*1", "terse*1")
    assert prompts(talking, 3) == {f"<user>Hi<assistant> {name} {length} 0<user>And?" for name in names}
    take_picture(browser, "chat")
    slider = find(browser, '[data-adapter="legal"] input')
    browser.execute_script("arguments[0].value = 0.5; arguments[0].dispatchEvent(new Event('input'))", slider)
    until(lambda: "legal*0.5" in find(browser, '[data-adapter="legal"] pre').text)
    assert prompts(talking, 1) == {f"<user>Hi<assistant> legal*1 {length} 0<user>And?"}  # the last answer, once more
    until(lambda: "tokens" in find(browser, '[data-adapter="legal"] .measured').text)
    browser.execute_script("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    find(browser, '[data-adapter="legal"] .copy').click()
    until(lambda: (browser.execute_script("return window.copied") or "").startswith(" legal*0.5 "))
    find(browser, "#again").click()
    assert texts(browser, ".column pre") == ["", "", ""]
    run_all(browser, "Anew")
    assert prompts(talking, 3) == {"<user>Anew"}
    assert complaints(browser) == []


@needs_a_browser
def test_a_conversation_that_is_stopped_or_refused_goes_on(browser: Any, talking: Running) -> None:
    talking.engine.held.set()
    look(browser, talking)
    until(lambda: texts(browser, "#run") == ["Send"])
    find(browser, "#prompt").send_keys("Hi")
    find(browser, "#run").click()
    until(lambda: talking.engine.num_live == 3)
    assert not find(browser, "#run").is_enabled()
    find(browser, "#stop").click()
    until(lambda: texts(browser, ".measured") == ["stopped"] * 3)
    talking.engine.held.clear()
    talking.engine.failing = ConfigError("not now")
    find(browser, "#prompt").send_keys("Well?")
    find(browser, "#run").click()
    until(lambda: texts(browser, ".column pre") == ["not now"] * 3)
    talking.engine.failing = None
    run_all(browser, "So?")
    assert prompts(talking, 3) == {"<user>Hi<assistant><user>So?"}


@needs_a_browser
def test_figures_and_adapters_are_live(browser: Any, server: Running) -> None:
    look(browser, server)
    until(lambda: texts(browser, "#adapters td:first-child") == ["legal", "pirate", "terse"])
    assert texts(browser, "#adapters tr:first-child td")[1:3] == ["known", "\u2013"]
    run_all(browser)
    until(lambda: texts(browser, "#adapters tr:first-child td")[1:3] == ["resident", "1"])
    until(lambda: "192" in texts(browser, "#figures dd"))  # 4 times 48 tokens
    assert find(browser, "#state").text == "ready"
    server.service.gate.is_open = False
    until(lambda: find(browser, "#state").text == "takes no requests")


@needs_a_browser
def test_what_trains_is_live(browser: Any, server: Running) -> None:
    steps = [StepFigures(1, 4.5, None), StepFigures(2, 3.25, 0.5), StepFigures(3, 3.5, 0.75)]
    runs = [
        RunFigures("<b>job</b>", "fine_tuning.job", "running", 12, 1234, 56.7, tuple(steps[:2])),
        RunFigures("new", "training_run", "idle", None, 0, 0.0, ()),
    ]
    look(browser, server)
    until(lambda: texts(browser, "#adapters td:first-child") == ["legal", "pirate", "terse"])
    assert not find(browser, "#training").is_displayed()  # this server does not train
    with running(FakeEngine(), extensions=[Extension(APIRouter(), {}, runs_of=lambda _: runs)]) as training:
        look(browser, training)
        until(lambda: texts(browser, "#runs td:first-child") == ["<b>job</b>", "new"])
        shown = ["<b>job</b>", "running", "2 of 12", "3.25", "", "0.5", "", "1,234", "56.7"]
        assert texts(browser, "#runs tr:first-child td") == shown
        assert texts(browser, "#runs tr:last-child td") == [
            "new",
            "idle",
            "\u2013",
            "\u2013",
            "",
            "\u2013",
            "",
            "0",
            "0",
        ]
        assert find(browser, "#runs polyline").get_attribute("points") == "0.0,2.0 100.0,18.0"
        runs[0] = RunFigures("<b>job</b>", "fine_tuning.job", "running", 12, 2345, 56.7, tuple(steps))
        until(lambda: texts(browser, "#runs tr:first-child td")[2:6:3] == ["3 of 12", "0.75"])
        take_picture(browser, "training")
        assert texts(browser, "#runs-count") == ["1 running"]
        assert complaints(browser) == []


@needs_a_browser
def test_stop_cancels_and_a_column_can_be_added_and_removed(browser: Any, server: Running) -> None:
    server.engine.held.set()  # no word comes, so that no answer ends before it is stopped
    look(browser, server)
    until(lambda: len(texts(browser, ".column h3")) == 4)
    find(browser, '[data-adapter="pirate"] .remove').click()
    find(browser, "#run").click()
    until(lambda: server.engine.num_live == 3)
    find(browser, "#stop").click()
    until(lambda: server.engine.num_live == 0)
    assert server.engine.counts["cancelled"] == 3
    until(lambda: texts(browser, ".measured") == ["stopped"] * 3)
    find(browser, "#add").send_keys("pirate")
    until(lambda: texts(browser, ".column h3") == ["base model", "legal", "terse", "pirate"])


@needs_a_browser
def test_errors_are_shown_and_markup_is_text(browser: Any) -> None:
    name = "<img src=x onerror=alert(1)>"  # no registry lets it in; the page trusts none
    with running(FakeEngine(adapter_names=(name, "legal"), broken=("legal",))) as server:
        look(browser, server)
        until(lambda: name in texts(browser, ".column h3"))
        assert name in texts(browser, "#adapters td:first-child")
        find(browser, "#prompt").send_keys("<b>bold</b>")
        find(browser, "#run").click()
        until(lambda: "cannot be used" in find(browser, '[data-adapter="legal"] pre').text)
        until(lambda: "<b>bold</b> base" in find(browser, '[data-adapter="base"] pre').text)
        assert browser.find_elements("css selector", "img, pre b") == []


@needs_a_browser
def test_a_server_with_keys_asks_for_one(browser: Any) -> None:
    with running(FakeEngine(), keys=KEYS) as server:
        look(browser, server)
        until(lambda: find(browser, "#key-form").is_displayed())
        find(browser, "#key").send_keys("wrong")
        find(browser, "#key-form button").click()
        until(lambda: find(browser, "#state").text == "this key is not known")
        find(browser, "#key").send_keys(USER_KEY)
        find(browser, "#key-form button").click()
        until(lambda: find(browser, "#state").text == "ready")
        run_all(browser)
        assert not find(browser, "#key-form").is_displayed()


@needs_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser: Any, server: Running, scheme: str) -> None:
    look(browser, server, width=375, scheme=scheme)
    until(lambda: len(texts(browser, ".column h3")) == 4)
    run_all(browser, "a_word_without_an_end_" * 10)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 375
    for css in ("#prompt", "#run", ".column input", "#add"):
        box = find(browser, css).rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 375
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    is_dark = int(re.findall(r"\d+", paper)[0]) < 128
    assert is_dark == (scheme == "dark")


def test_the_page_asks_nobody_else_and_runs_nothing_else(open_server: Running) -> None:
    client = open_server.http()
    for path, kind in (
        ("/", "text/html"),
        ("/page.js", "text/javascript"),
        ("/page.css", "text/css"),
        ("/icon.svg", "image/svg"),
    ):
        response = client.get(path)
        assert response.headers["content-type"].startswith(kind)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in policy
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", response.text)
    page = client.get("/").text
    assert not re.findall(r"<script>|\son\w+=|style=", page)
