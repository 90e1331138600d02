"""The page in a real browser: a message, its tokens, a pause, steps, blocks that come and go."""

import re
import shutil

import pytest

from folovllm.testing.async_contract import write_model_with_tokenizer
from folovllm.testing.server_process import ServerProcess, serving

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs a driver: pip install 'playwright>=1.50,<2'"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs the system's chromium: apt-get install chromium"
)
expect = getattr(playwright, "expect", None)
WIDTHS = (320, 768, 1440, 2560)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    directory = write_model_with_tokenizer(tmp_path_factory.mktemp("model"))
    flags = ["--max-model-len", "128", "--kv-cache-bytes", "1MiB", "--device", "cpu"]
    flags += ["--api-key", "swordfish", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
    log = directory / "server.log"
    with ServerProcess(serving("m6_prefix"), directory, log, *flags) as served:
        yield served.url


@pytest.fixture(scope="module")
def page(url):
    """Open, and let in with the key."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(url)
        for key in ("wrong", "swordfish"):
            page.fill("#key", key)
            page.press("#key", "Enter")
            if key == "wrong":
                expect(page.locator("#key-error")).to_contain_text("wrong")
        expect(page.locator("#state")).to_have_text("idle")
        yield page
        browser.close()
        # The browser tells of the 401 that the keys began with, and of nothing else.
        assert [text for text in complaints if "401" not in text] == []


def held_blocks(page):
    """As the map's description has it, for those who do not see it."""
    text = page.locator("#memory").get_attribute("aria-label")
    found = re.match(r"(\d+) of \d+ blocks", text)
    assert found is not None, text
    return int(found[1])


def ask(page, text, copies=1, max_tokens=8):
    page.fill("#message", text)
    page.fill("#copies", str(copies))
    page.fill("#max-tokens", str(max_tokens))
    page.press("#message", "Enter")


def test_message_gets_its_tokens_and_html_stays_text(page):
    ask(page, "<img src=x onerror=alert(1)> & <b>bold</b>")
    expect(page.locator(".said.user")).to_have_text("<img src=x onerror=alert(1)> & <b>bold</b>")
    expect(page.locator(".said.assistant small")).to_contain_text("new ones", timeout=15_000)
    assert page.locator("#log img, #log b").count() == 0
    expect(page.locator("#state")).to_have_text("idle")
    assert held_blocks(page) == 0
    expect(page.locator("#ttft")).to_contain_text("s")


def test_keys_pause_and_step_and_blocks_come_and_go(page):
    page.press("#message", "Escape")
    page.keyboard.press("p")
    expect(page.locator("#state")).to_have_text("paused")
    ask(page, "quick brown fox", copies=3, max_tokens=4)
    expect(page.locator("#requests tr.waiting")).to_have_count(3)
    assert held_blocks(page) == 0
    page.press("#message", "Escape")
    page.keyboard.press("s")
    expect(page.locator("#requests tr.running")).not_to_have_count(0)
    expect(page.locator("#story li").first).to_contain_text("prompt token")
    expect(page.locator("#story")).to_contain_text("waits")
    assert held_blocks(page) > 0
    for _ in range(30):
        if page.locator("#requests tr").count() == 0:
            break
        told = page.locator("#story").inner_text()
        page.keyboard.press("s")
        expect(page.locator("#story")).not_to_have_text(told, use_inner_text=True)
    expect(page.locator("#requests tr")).to_have_count(0)
    assert held_blocks(page) == 0
    expect(page.locator("#memory")).to_have_attribute(
        "aria-label", re.compile("[1-9][0-9]* cached")
    )
    page.keyboard.press("p")
    expect(page.locator("#state")).to_have_text("idle")
    page.keyboard.press("/")
    expect(page.locator("#message")).to_be_focused()


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_moves_when_the_engine_works(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    boxes = "#chat, #engine > section, #tiles > div, header button, #form"

    def places():
        return [box.bounding_box() for box in page.locator(boxes).all()]

    page.locator("#fresh").click()
    page.evaluate("scrollTo(0, 0)")
    before = places()
    ask(page, "Hello world " * 8, copies=4, max_tokens=6)
    expect(page.locator(".said.assistant small").last).to_contain_text("new ones", timeout=15_000)
    page.evaluate("scrollTo(0, 0)")
    assert places() == before
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in before)
