"""The page in headless Chromium, as a person uses it. Skipped where Gradio, Playwright or Chromium is missing.

Everything on this machine: whatever the browser asks for at another address fails the test that it happens in.
"""

import gc
import re
import shutil
import socket
import time
import weakref

import pytest
import torch
from PIL import Image


pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.once, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

from shortv_hf.chat import comparison  # noqa: E402
from shortv_hf.chat import conversation as chat  # noqa: E402
from shortv_hf.hub.loading import demo_model  # noqa: E402
from shortv_hf.web.app import build, serve  # noqa: E402
from shortv_hf.web.session import Sessions  # noqa: E402
from shortv_hf.web.shared import load_shared  # noqa: E402


expect = playwright.expect
expect.set_options(timeout=20_000)
DESCRIBED = re.compile("a small green cross at the left, a large purple triangle")
CAPTION = "Describe the picture."


def served(sessions, **options):
    page = build(sessions, **options)
    return page, serve(page, wait=False)


@pytest.fixture(scope="module", autouse=True)
def nobody_else_is_asked():
    """By the server; and no other name is looked up."""
    asked, connect, look_up = [], socket.socket.connect, socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda self, to: (asked.append(to[0]), connect(self, to))[1])
        patch.setattr(
            socket, "getaddrinfo", lambda host, *rest, **more: (asked.append(host), look_up(host, *rest, **more))[1]
        )
        yield
    assert {"127.0.0.1"} <= set(asked) <= {"127.0.0.1", "localhost", "0.0.0.0", "::1", b"127.0.0.1", None}


@pytest.fixture(scope="module")
def sessions():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Sessions(load_shared(demo_model(), "the demonstration model", dtype="float32"), 64)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def address(sessions):
    page, address = served(sessions, is_demonstration_model=True, max_waiting=1)
    assert address.startswith("http://127.0.0.1:")
    yield address
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address, monkeypatch):
    """Opens the page as another user each time."""
    monkeypatch.setattr(comparison, "MAX_ROUNDS", 2)
    asked, contexts = [], []

    def open_page(url=address, **options):
        context = browser.new_context(**({"viewport": {"width": 1200, "height": 1000}} | options))
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: asked.append(f"http://dialog/{dialog.message}"))
        page.goto(url)
        expect(page.locator("#layers img")).to_be_visible(timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked and not [
        url for url in asked if not re.match(r"(http://127\.0\.0\.1:|data:|blob:http://127\.0\.0\.1:)", url)
    ]


@pytest.fixture
def slow(monkeypatch):
    """A token takes a fifth of a second."""
    put = chat._Stream.put
    monkeypatch.setattr(chat._Stream, "put", lambda self, value: (time.sleep(0.2), put(self, value))[1])


def add(page, *files):
    page.locator("#question input[type=file]").set_input_files([str(file) for file in files])
    expect(page.locator("#question .thumbnail-item")).to_have_count(len(files))


def ask(page, question):
    page.locator("#question textarea").fill(question)
    page.locator("#question textarea").press("Enter")


def says(page, text):
    expect(page.locator("#status")).to_contain_text(text)


def choose(page, method):
    page.get_by_label("Token reduction").click()
    page.get_by_role("option", name=method, exact=True).click()


def chart(page):
    return page.locator("#layers img").get_attribute("src")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    from shortv_hf.web.examples import write_examples

    return write_examples(tmp_path_factory.mktemp("examples"))[0]["files"][0]


def test_an_example_is_answered_and_compared(visit):
    page = visit()
    page.get_by_text(CAPTION).first.click()
    says(page, "64 of them visual")
    expect(page.locator("#chat")).to_contain_text(DESCRIBED)
    expect(page.locator("#costs")).to_contain_text("The same answer for 52% of the language model's FLOPs")
    expect(page.locator("#costs tbody tr")).to_have_count(7)


def test_upload_ask_move_the_slider_and_compare(visit, picture):
    page = visit()
    page.get_by_label("Compare with the dense model after each answer").uncheck()
    add(page, picture)
    ask(page, CAPTION)
    says(page, "73 prompt tokens, 64 of them visual")
    expect(page.locator("#chat")).to_contain_text(DESCRIBED)
    expect(page.locator("#costs")).to_be_empty()
    ask(page, "How many green crosses are there?")
    says(page, "went on from the cache")
    before = chart(page)
    page.locator("#layers-slider input[type=number]").fill("12")
    page.locator("#layers-slider input[type=number]").press("Enter")
    says(page, "These settings hold")
    assert chart(page) != before
    page.get_by_role("button", name="Compare with dense").click()
    says(page, "Compared")
    expect(page.locator("#costs")).to_contain_text(re.compile("frozen layers and halves\\s*0\\s*12"))
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#chat")).not_to_contain_text(DESCRIBED)
    page.get_by_role("button", name="Compare with dense").click()
    says(page, "ask something first")


def test_a_method_is_drawn_and_one_that_cannot_be_keeps_the_session(visit, picture):
    page = visit()
    page.get_by_label("Compare with the dense model after each answer").uncheck()
    choose(page, "fastv")
    expect(page.get_by_label("ratio").first).to_be_visible()
    says(page, "These settings hold")
    add(page, picture)
    ask(page, CAPTION)
    expect(page.locator("#patches img")).to_be_visible()
    page.get_by_label("k", exact=True).fill("99")
    says(page, "fastv: k is 99; the valid range is the integers 1 to 12")
    expect(page.locator("#layers-text")).to_contain_text("fastv: k is 99")
    ask(page, "How many green crosses are there?")
    says(page, "fastv: k is 99")
    expect(page.locator("#question textarea")).to_have_value("How many green crosses are there?")
    page.get_by_label("k", exact=True).fill("3")
    says(page, "These settings hold")
    page.locator("#question textarea").press("Enter")
    says(page, "output tokens")
    expect(page.locator("#chat")).to_contain_text(DESCRIBED)


def test_text_is_text(visit, monkeypatch):
    monkeypatch.setattr(
        chat.Conversation, "ask", answering(chat.Conversation.ask, "<img src=x onerror=alert(2)><b>bold</b>")
    )
    page = visit()
    page.get_by_label("Compare with the dense model after each answer").check()
    ask(page, "<img src=y onerror=alert(1)> & <i>so</i>")
    says(page, "output tokens")
    expect(page.locator("#chat")).to_contain_text("<img src=y onerror=alert(1)> & <i>so</i>")
    expect(page.locator("#chat")).to_contain_text("<img src=x onerror=alert(2)><b>bold</b>")
    expect(page.locator("#costs")).to_contain_text("<b>bold</b>")
    assert page.locator("#chat img, #chat b, #chat i, #costs img, #costs b").count() == 0


def answering(ask, text):
    """A model that says what it must not be able to do."""

    def spoken(self, *arguments, **options):
        answer = ask(self, *arguments, **options)
        answer.text = text
        return answer

    return spoken


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_uploads_say_why(visit, picture, tmp_path):
    page = visit()
    (tmp_path / "notes.png").write_text("no picture")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "big.png")
    for name, said in (("notes.png", "notes.png: it is no picture"), ("big.png", "100 megapixels; the limit is 40")):
        add(page, tmp_path / name)
        ask(page, "What is this?")
        says(page, said)
        expect(page.locator("#question .thumbnail-item")).to_have_count(0)
        expect(page.locator("#question textarea")).to_have_value("What is this?")
    add(page, picture)
    page.locator("#question textarea").press("Enter")
    says(page, "64 of them visual")


def test_two_users_keep_their_own(visit, picture, sessions):
    one, other = visit(), visit()
    one.get_by_label("Compare with the dense model after each answer").uncheck()
    other.get_by_label("Compare with the dense model after each answer").uncheck()
    add(one, picture)
    ask(one, CAPTION)
    ask(other, "How many objects are there?")
    says(one, "64 of them visual")
    says(other, "0 of them visual")
    expect(other.locator("#chat")).not_to_contain_text(DESCRIBED)
    ask(one, "How many green crosses are there?")
    says(one, "went on from the cache")
    assert len(sessions) >= 2


def test_stop(visit, picture, slow):
    page = visit()
    add(page, picture)
    ask(page, CAPTION)
    expect(page.locator("#chat")).to_contain_text("a small")
    page.get_by_role("button", name="Stop").click()
    says(page, "Stopped; the question was not kept")
    expect(page.locator("#question textarea")).to_have_value(CAPTION)


def test_a_closed_tab_stops_its_answer_and_a_full_queue_says_so(visit, picture, slow, sessions):
    first, second, third = visit(), visit(), visit()
    add(first, picture)
    before = set(sessions._sessions)
    ask(first, CAPTION)
    expect(first.locator("#chat")).to_contain_text("a small")
    (key,) = set(sessions._sessions) - before
    gone = weakref.ref(sessions._sessions[key])
    ask(second, "How many objects are there?")
    expect(second.locator("#question")).to_contain_text(re.compile("queue|processing", re.I))
    ask(third, "What color is the square?")
    expect(third.locator(".toast-body")).to_contain_text("currently busy. Please try again")
    expect(third.locator("#question textarea")).to_have_value("What color is the square?")
    first.close()
    says(second, "output tokens")
    deadline = time.monotonic() + 30
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.2)
        gc.collect()
    assert key not in sessions._sessions and gone() is None


def test_narrow_dark_and_by_keyboard(visit, picture):
    page = visit(viewport={"width": 400, "height": 800}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    add(page, picture)
    ask(page, CAPTION)
    expect(page.locator("#costs")).to_contain_text("The same answer")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    for selector in ("#status div", "#costs td", "#costs p"):
        assert contrast(page, selector) >= 4.5, selector
    page.locator("#layers-slider input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    says(page, "These settings hold")
    assert page.locator("#layers-slider input[type=number]").input_value() == "7"
    page.locator("#question textarea").focus()
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''").strip()
        )
    assert {"Compare with dense", "Stop", "New conversation"} <= set(reached), reached


CONTRAST = """element => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number)
  const light = color => numbers(color).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
  let behind = element
  while (behind.parentElement && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement
  const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)]
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
}"""


def contrast(page, selector):
    """Of the text to what is behind it, as WCAG counts it."""
    return page.locator(selector).first.evaluate(CONTRAST)


def test_a_video(visit, tmp_path):
    pytest.importorskip("av")
    from families import END, IMAGE, SPECIAL, START, VIDEO, shortv_of
    from families import build as tiny
    from processor_files import write_processor
    from video_files import write_video

    model = shortv_of(tiny("llava_onevision"), [2, 1])
    model.generation_config.suppress_tokens = SPECIAL
    model.save_pretrained(tmp_path / "repo")
    ids = {"<image>": IMAGE, "<video>": VIDEO, "<start>": START, "<end>": END}
    write_processor(tmp_path / "repo", "llava_onevision", ids=ids)
    server, address = served(Sessions(load_shared(str(tmp_path / "repo"), "tiny"), 3))
    try:
        page = visit(address)
        (tmp_path / "broken.mp4").write_bytes(b"no video")
        add(page, tmp_path / "broken.mp4")
        ask(page, "what happens ?")
        says(page, "broken.mp4: it is no video that can be read, or it is broken")
        add(page, write_video(tmp_path / "clip.mp4", 12))
        page.locator("#question textarea").press("Enter")
        says(page, "output tokens")
        expect(page.locator("#costs")).to_contain_text("of the language model's FLOPs")
    finally:
        server.close()
