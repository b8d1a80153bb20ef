"""The page in headless Chromium, against the real service of a tiny checkpoint; skipped where there is no Chromium."""

import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from engine_cases import noise
from PIL import Image

from engine import Engine
from engine.images import ORIENTATION, fit_image, open_image

pytest.importorskip("fastapi", reason="the service's packages are not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the service's packages are not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
expect.set_options(timeout=20_000)

from service_cases import base64_of, file_of, image_of  # noqa: E402

from engine.serving.app import create_app  # noqa: E402 - needs fastapi
from engine.serving.async_engine import AsyncEngine  # noqa: E402
from engine.serving.inputs import Limits  # noqa: E402

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

PICTURE = noise(3)  # of the model's size, so that it is sent as it is
GIVEN = np.asarray(PICTURE)
FEW_STEPS = {"num": "1", "steps": "3"}
AA = 4.5  # WCAG's least contrast of text
CONTRASTS = """() => {
  const levels = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    const colour = levels(getComputedStyle(element).backgroundColor);
    return colour.length === 4 && colour[3] === 0 && element.parentElement ? ground(element.parentElement) : colour;
  };
  const opacity = (e) => (e ? getComputedStyle(e).opacity * opacity(e.parentElement) : 1);
  const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const readable = [...document.body.querySelectorAll("*")].filter((e) => own(e) && e.checkVisibility() && !e.disabled);
  return readable.map((e) => {
    const [below, share] = [ground(e), opacity(e)];
    const seen = levels(getComputedStyle(e).color).slice(0, 3).map((v, i) => share * v + (1 - share) * below[i]);
    const [a, b] = [luminance(seen), luminance(below)];
    return [e.textContent.trim().slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
}"""


class Served:
    """A service in a thread of its own."""

    def __init__(self, checkpoint: Path, **options):
        self.engine = AsyncEngine(Engine.from_pretrained(checkpoint, device="cpu", dtype="float32"))
        app = create_app(self.engine, model="tiny", **options)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def wait_until(condition) -> None:
    for _ in range(4000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it does not come about")


@pytest.fixture(scope="module")
def served(tiny_checkpoint) -> Iterator[Served]:
    served = Served(tiny_checkpoint)
    yield served
    served.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # CI runs as root
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, served):
    """Opens the page in a context of given options; at the end, nothing may have failed or left the origin."""
    contexts, problems = [], []

    def open_page(url: str = served.url, expected: str = "nothing", **options):
        """expected: part of what the browser itself reports on its console, where a request is to fail"""
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)

        def on_console(message) -> None:
            if message.type in ("error", "warning") and expected not in message.text:
                problems.append(message.text)

        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: r.url.startswith((url, "blob:", "data:")) or problems.append(r.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def sent_by(page) -> list[dict]:
    """Bodies of the requests to generate, as they come."""
    bodies = []
    page.on("request", lambda r: r.url.endswith("/v1/infill") and bodies.append(r.post_data_json))
    return bodies


def set_options(page, **values: str) -> None:
    page.locator("#options").evaluate("(details) => { details.open = true; }")
    for name, value in values.items():
        page.fill(f"#{name}", value)


def give_image(page, data: bytes, name: str = "given.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})


def shown_pixels(page) -> np.ndarray:
    """The given image as the page has it, [32, 32, 3]."""
    data = page.locator("#canvas").evaluate("(c) => [...c.getContext('2d').getImageData(0, 0, 32, 32).data]")
    return np.reshape(data, (32, 32, 4))[..., :3]


def generate(page) -> None:
    page.click("#generate")
    expect(page.locator("#gallery .run:not(.running)").first).to_be_visible()
    expect(page.locator("#generate")).to_be_visible()


def downloaded(page) -> np.ndarray:
    """The newest image of the gallery, [H, W, 3] uint8, as a person would save it."""
    with page.expect_download() as download:
        page.locator(".run .download").first.click()
    assert download.value.suggested_filename.endswith(".png")
    return np.asarray(Image.open(download.value.path()).convert("RGB"))


def is_focused(page, selector: str) -> bool:
    return page.evaluate("(selector) => document.activeElement.matches(selector)", selector)


def tab_to(page, selector: str) -> None:
    for _ in range(60):
        if is_focused(page, selector):
            assert (
                page.evaluate("getComputedStyle(document.activeElement.closest('#chip-field, button')).outlineStyle")
                == "solid"
            )
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} cannot be reached with the Tab key")


def test_names_of_elements_are_unique(open_page):
    names = open_page().evaluate("[...document.querySelectorAll('[id]')].map(({ id }) => id)")
    assert len(names) == len(set(names))


def test_words_become_an_image_by_keyboard_alone(open_page):
    page = open_page()
    expect(page.locator("#summary")).to_have_text("Image: all generated. Words: all generated.")
    set_options(page, **FEW_STEPS)
    page.locator("body").focus()
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "#word")
    page.keyboard.type("big re")
    expect(page.locator("#suggestions li").first).to_have_text("red")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#summary")).to_have_text("Image: all generated. Words: given.")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".sample .caption")).to_have_text("big red")
    assert downloaded(page).shape == (32, 32, 3)

    tab_to(page, ".use-image")
    page.keyboard.press("Enter")
    expect(page.locator("#summary")).to_have_text(
        "Everything is given. Paint over a part of the image, or blank a word."
    )
    expect(page.locator("#generate")).to_be_disabled()
    tab_to(page, "[data-preset='left half']")
    page.keyboard.press("Enter")
    expect(page.locator("#summary")).to_have_text("Image: left half generated. Words: given.")
    tab_to(page, ".chip-word")
    page.keyboard.press("Space")
    expect(page.locator("#summary")).to_have_text("Image: left half generated. Words: 1 of 2 generated.")
    assert is_focused(page, ".chip-word"), "the word keeps the focus"


def test_an_example_is_generated_by_itself(open_page):
    page = open_page()
    sent = sent_by(page)
    give_image(page, file_of(PICTURE))
    expect(page.locator("#canvas")).to_be_visible()
    set_options(page, **FEW_STEPS)
    page.click("#examples button:text('red heart')")
    expect(page.locator(".sample .caption")).to_have_text("red heart")
    assert sent[0]["prompt"] == "red heart" and "image" not in sent[0]


def test_only_what_the_brush_painted_is_generated(open_page):
    page = open_page()
    sent = sent_by(page)
    set_options(page, **FEW_STEPS)
    give_image(page, file_of(PICTURE))
    box = page.locator("#overlay").bounding_box()
    x, y, side = box["x"], box["y"], box["width"]
    page.mouse.move(x + side / 4, y + side / 4)
    page.mouse.down()
    page.mouse.move(x + side / 4, y + side * 3 / 4, steps=3)
    page.mouse.up()
    expect(page.locator("#summary")).to_contain_text("% generated. Words: all generated.")
    assert (shown_pixels(page) == GIVEN).all(), "the mask has changed the image below it"
    painted = page.locator("#overlay").evaluate("(c) => [...c.getContext('2d').getImageData(180, 380, 40, 40).data]")
    assert 20 < np.mean(painted[3::4]) < 160, "the mask is invisible, or hides the image"

    generate(page)
    mask = np.asarray(image_of(sent[0]["mask"].partition(",")[2]).convert("L")) > 127  # [32, 32]
    assert mask[8:24, 8].all() and not mask[:, 16:].any() and set(sent[0]) >= {"image", "seed", "stream"}
    assert (np.asarray(image_of(sent[0]["image"].partition(",")[2]).convert("RGB")) == GIVEN).all()
    result = downloaded(page)
    assert (result[~mask] == GIVEN[~mask]).all() and (result[mask] != GIVEN[mask]).any()

    page.click("#undo")
    expect(page.locator("#summary")).to_have_text("Image: given. Words: all generated.")
    page.fill("#steps", "2")  # where the focus then is
    page.mouse.click(x + side / 2, y + side / 2)
    expect(page.locator("#summary")).to_contain_text("% generated.")
    page.keyboard.press("Control+z")
    expect(page.locator("#summary")).to_have_text("Image: given. Words: all generated.")
    for half, dark in {"left": np.s_[:, :17], "right": np.s_[:, 17:]}.items():
        icon = Image.open(io.BytesIO(page.locator(f"[data-preset='{half} half']").screenshot())).convert("L")
        levels = np.asarray(icon)  # [34, 34]
        assert levels[dark].mean() < levels.mean() - 5, f"the icon's {half} half is not filled"
    page.click("#invert")
    expect(page.locator("#summary")).to_have_text("Image: all generated. Words: all generated.")
    page.check("[value=erase]", force=True)  # which has the focus
    page.keyboard.press("Control+Shift+Z")
    expect(page.locator("#summary")).to_have_text("Image: all generated. Words: all generated.")
    page.click("#image-leave")
    page.keyboard.press("Control+z")
    expect(page.locator("#summary")).to_have_text("Image: given. Words: all generated.")


def test_a_stroke_ends_where_it_is_undone_or_cut_off(open_page, three_modality_checkpoint):
    with closing(Served(three_modality_checkpoint)) as served:
        page = open_page(served.url, viewport={"width": 900, "height": 1600})
        give_image(page, file_of(PICTURE))
        nothing = "Image: given. Sketch: all generated. Words: all generated."
        summary = page.locator("#summary")
        expect(summary).to_have_text(nothing)
        for pad in ("#overlay", "#sketch"):
            box = page.locator(pad).bounding_box()
            x, y, side = box["x"], box["y"], box["width"]
            page.mouse.move(x + side / 4, y + side / 4)
            for cut_off in ("undone", "cancelled"):
                page.mouse.down()
                page.mouse.move(x + side / 2, y + side / 2)
                if cut_off == "undone":
                    page.keyboard.press("Control+z")
                else:  # as when two fingers begin to zoom
                    page.dispatch_event(pad, "pointercancel", {"pointerId": 1, "isPrimary": True, "bubbles": True})
                page.mouse.move(x + side / 2, y + side / 4)
                page.mouse.up()
                expect(summary).to_have_text(nothing)
                page.mouse.move(x + side / 4, y + side / 4)


def test_a_word_is_blanked_given_again_and_filled_in(open_page):
    page = open_page()
    sent = sent_by(page)
    set_options(page, **FEW_STEPS)
    page.fill("#word", "red cat, dog")  # the last one still being typed
    word = page.locator(".chip-word", has_text="cat")
    for sentence in ("Words: 1 of 3 generated.", "Words: given.", "Words: 1 of 3 generated."):
        word.click()
        expect(page.locator("#summary")).to_contain_text(sentence)
    generate(page)
    assert sent[0]["prompt"] == "red _ dog" and "image" not in sent[0]
    assert page.locator(".caption .generated").count() == 1
    words = page.locator(".caption > span:not(.confidence)").all_text_contents()
    assert (words[0], words[2], len(words)) == ("red", "dog", 3)
    page.fill("#word", "gre")
    page.click("#suggestions li:text('green')")
    expect(page.locator(".chip-word")).to_have_text(["red", "cat", "dog", "green"])
    page.fill("#word", "bl")  # which, like the words, the caption replaces
    page.click(".use-caption")
    expect(page.locator(".chip-word")).to_have_text(words)
    expect(page.locator("#summary")).to_have_text("Image: all generated. Words: given.")
    page.click("#caption-leave")
    expect(page.locator("#summary")).to_have_text("Image: all generated. Words: all generated.")
    generate(page)
    assert "prompt" not in sent[1]
    expect(page.locator("#summary")).to_have_text("Image: all generated. Words: all generated.")


def test_a_run_is_cancelled_on_the_page_and_in_the_engine(open_page, served):
    page = open_page()
    set_options(page, num="16", steps="250")
    page.select_option("#order", label="together")
    with page.expect_response(lambda response: response.request.method == "DELETE") as deleted:
        page.click("#generate")
        expect(page.locator(".run-state")).to_contain_text("of 250")
        expect(page.locator(".sample img:visible").first).to_be_visible()  # a preview
        page.keyboard.press("Escape")
    assert deleted.value.ok
    expect(page.locator(".run-state")).to_contain_text("Cancelled at step")
    expect(page.locator("#generate")).to_be_focused()
    wait_until(lambda: served.engine.requests == (0, 0))


@pytest.mark.parametrize("name", ["notes.txt", "truncated.png"])
def test_files_other_than_images_are_refused_where_they_were_given(open_page, name):
    page = open_page()
    data = b"some notes" if name == "notes.txt" else file_of(PICTURE)[:-500]
    give_image(page, data, name)
    expect(page.get_by_role("alert")).to_contain_text(f"“{name}” cannot be read as an image.")
    expect(page.locator("#canvas")).to_be_hidden()
    give_image(page, file_of(PICTURE.resize((50, 40))))
    expect(page.locator("#canvas")).to_be_visible()
    expect(page.locator("#image-error")).to_be_hidden()


def test_the_file_that_was_given_last_is_used(open_page):
    page = open_page()
    page.evaluate("""() => {
      const decode = createImageBitmap;
      window.held = [];
      window.createImageBitmap = (source, ...rest) => source.name === "first.png"
        ? new Promise((resolve) => held.push(resolve)).then(() => decode(source, ...rest)) : decode(source, ...rest);
    }""")
    for ending in ("second.png", None):
        give_image(page, file_of(noise(4)), "first.png")
        if ending:
            give_image(page, file_of(PICTURE), ending)
            expect(page.locator("#canvas")).to_be_visible()
        else:
            page.click("#remove")
        page.evaluate("held.pop()()")
        page.evaluate("new Promise((resolve) => setTimeout(resolve, 100))")
        expect(page.locator("#canvas")).to_be_visible(visible=bool(ending))
        assert (shown_pixels(page) == GIVEN).all()


def dropped(page, target: str, data: bytes | None) -> bool:
    """Drops a file, or else a text; returns whether the page took it."""
    return page.locator(target).evaluate(
        """(target, bytes) => {
          const dataTransfer = new DataTransfer();
          if (bytes) dataTransfer.items.add(new File([Uint8Array.from(bytes)], "given.png", { type: "image/png" }));
          else dataTransfer.setData("text/plain", "red");
          const init = { dataTransfer, bubbles: true, cancelable: true };
          const events = ["dragover", "drop"].map((type) => new DragEvent(type, init));
          for (const event of events) target.dispatchEvent(event);
          return events.every((event) => event.defaultPrevented);
        }""",
        data and [*data],
    )


def test_files_can_be_dropped_and_texts_are_left_to_the_browser(open_page, three_modality_checkpoint):
    with closing(Served(three_modality_checkpoint)) as served:
        page = open_page(served.url)
        assert not dropped(page, "#word", None) and dropped(page, "#welcome", None)
        assert dropped(page, "#sketch", file_of(PICTURE))
        expect(page.locator("#summary")).to_contain_text("Image: all generated. Sketch: given.")
        assert dropped(page, "#welcome", file_of(PICTURE))
        expect(page.locator("#summary")).to_contain_text("Image: given. Sketch: given.")


@pytest.mark.parametrize("kind", ["transparent", "palette with a transparent colour", "turned by EXIF", "oblong"])
def test_an_image_is_shown_and_sent_as_the_engine_reads_it(open_page, kind, tmp_path):
    file = tmp_path / "given"
    if kind == "transparent":
        alpha = Image.linear_gradient("L").resize((32, 32))
        image = PICTURE.copy()
        image.putalpha(alpha)
        file.write_bytes(file_of(image))
    elif kind == "palette with a transparent colour":
        file.write_bytes(file_of(PICTURE.quantize(16), transparency=3))
    elif kind == "turned by EXIF":
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        file.write_bytes(file_of(PICTURE, "JPEG", exif=exif, quality=95))
    else:
        file.write_bytes(file_of(noise(4, (46, 32))))
    page = open_page()
    give_image(page, file.read_bytes())
    expect(page.locator("#canvas")).to_be_visible()
    expected = fit_image(open_image(file), 32).permute(1, 2, 0).numpy().astype(int)
    assert abs(shown_pixels(page) - expected).max() <= 4


REFUSAL = {"error": {"message": "seed: is bad", "param": "seed"}}
QUEUED = {"id": "1", "position": 3}
ANSWERS = {  # of the service, and where the page tells what of them
    "queue full": (
        429,
        json.dumps({"error": {"message": "the queue is full", "param": None}}),
        "#error",
        "queue is full",
    ),
    "no JSON": (502, "<html>bad gateway</html>", "#error", "The server answered with status 502."),
    "error in the stream": (200, f"event: error\ndata: {json.dumps(REFUSAL)}\n\n", "#seed-error", "is bad"),
    "stream without an end": (200, f"event: queued\ndata: {json.dumps(QUEUED)}\n\n", "#error", "connection ended"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_failed_answer_is_told_and_another_try_is_possible(open_page, answer):
    status, body, place, text = ANSWERS[answer]
    page = open_page(expected=f"status of {status}")
    kind = "text/event-stream" if status == 200 else "application/json"
    page.route("**/v1/infill", lambda route: route.fulfill(status=status, content_type=kind, body=body))
    page.click("#generate")
    expect(page.locator(place)).to_contain_text(text)
    expect(page.locator("#generate")).to_be_visible()
    expect(page.locator(".run")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()


def test_errors_stand_at_the_field_that_they_are_about(open_page):
    page = open_page(expected="status of 400")
    set_options(page, num="65")
    page.click("#generate")
    expect(page.locator("#num-error")).to_contain_text("64")
    expect(page.locator("#num")).to_be_focused()
    set_options(page, **FEW_STEPS)
    expect(page.locator("#num-error")).to_be_hidden()

    page.locator("#steps").evaluate("(steps) => { steps.max = 1000; }")  # so that the service refuses it
    page.fill("#steps", "251")
    page.click("#generate")
    expect(page.locator("#steps-error")).to_contain_text("use at most 250")
    expect(page.locator("#steps")).to_have_attribute("aria-invalid", "true")
    page.fill("#steps", "2")

    page.fill("#word", "red dragonfly")
    page.click("#generate")
    expect(page.locator("#caption-error")).to_contain_text("dragonfly")
    expect(page.locator(".chip.unknown")).to_have_text("dragonfly")
    expect(page.locator("#generate")).to_be_enabled()
    page.check("#fill-unknown")
    expect(page.locator("#summary")).to_contain_text("Words: 1 of 2 generated.")
    generate(page)
    expect(page.locator("#caption-error")).to_be_hidden()
    assert page.locator(".caption .generated").count() == 1


def test_a_server_that_is_away_can_be_tried_again(open_page):
    page = open_page(expected="ERR_FAILED")
    sent = sent_by(page)
    for addresses in ("**/v1/infill", "**/v1/models"):
        page.route(addresses, lambda route: route.abort())
        if addresses.endswith("models"):
            page.reload()
        else:
            page.click("#generate")
        expect(page.locator("#error")).to_contain_text("The server does not answer.")
        page.unroute(addresses)
        set_options(page, **FEW_STEPS)
        generate(page)
        expect(page.locator("#error")).to_be_hidden()
        assert sent[-1]["steps"] == 3
    page.route("**/v1/vocabulary*", lambda route: route.abort())
    page.reload()
    expect(page.locator("#examples button")).to_have_text(["Surprise me"])


def test_what_is_done_while_the_model_loads_waits_for_it(open_page):
    page = open_page()
    sent, held = sent_by(page), []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    give_image(page, file_of(PICTURE))
    held.pop().continue_()
    expect(page.locator("#canvas")).to_be_visible()
    assert (shown_pixels(page) == GIVEN).all()

    page.reload()
    set_options(page, num="1")
    for _ in range(2):
        page.keyboard.press("Control+Enter")
    while held:
        held.pop().continue_()
    expect(page.locator("#gallery .run:not(.running)")).to_have_count(1)
    expect(page.locator("#generate")).to_be_visible()
    assert len(sent) == 1


def test_old_results_make_room_for_new_ones(open_page):
    page = open_page()
    page.evaluate("() => { window.revoked = []; URL.revokeObjectURL = (url) => revoked.push(url); }")
    sample = {"image": base64_of(PICTURE), "text": "red", "seed": 1, "words": [], "outputs": {}}
    result = json.dumps({"samples": [sample] * 64, "timings": {"total_s": 1.0}})
    answer = {"content_type": "text/event-stream", "body": f"event: result\ndata: {result}\n\n"}
    page.route("**/v1/infill", lambda route: route.fulfill(**answer))
    set_options(page, num="64")
    for runs in range(1, 10):
        generate(page)
        expect(page.locator(".run")).to_have_count(min(runs, 8))
    assert page.evaluate("revoked.length") == 64
    page.click("#clear-gallery")
    assert page.evaluate("new Set(revoked).size") == 9 * 64


def test_a_service_that_takes_less_than_the_usual_can_be_used_at_once(open_page, tiny_checkpoint):
    with closing(Served(tiny_checkpoint, limits=Limits(num=2, steps=3))) as served:
        page = open_page(served.url)
        expect(page.locator("#options-summary")).to_contain_text("2 samples · 3 steps")
        generate(page)
        expect(page.locator(".use-image")).to_have_count(2)


def test_a_model_of_one_modality_is_served_without_the_other(open_page, single):
    name, checkpoint = single
    with closing(Served(checkpoint)) as served:
        page = open_page(served.url)
        sent = sent_by(page)
        label, title = ("Image", "Image") if name == "image" else ("Words", "Caption")
        expect(page.locator("#summary")).to_have_text(f"{label}: all generated.")
        if name == "text":
            assert dropped(page, "#results", file_of(PICTURE)), "the browser would open the file"
        set_options(page, **FEW_STEPS)
        generate(page)
        expect(page.locator(".run h3")).to_have_text(title)
        expect(page.locator(".frame")).to_be_visible(visible=name == "image")
        assert "image" not in sent[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_needs_no_sideways_scrolling_and_text_is_readable(open_page, scheme):
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, color_scheme=scheme)
    set_options(page, **FEW_STEPS | {"num": "3"})
    page.fill("#word", "_ cat dog bird")
    page.tap("#generate")
    expect(page.locator(".use-image")).to_have_count(3)
    expect(page.locator(".use-image").first).to_be_visible()
    page.locator(".use-image").first.tap()
    page.locator("#overlay").tap()
    expect(page.locator("#summary")).to_contain_text("% generated")
    page.fill("#word", "dragonfly ")
    expect(page.locator("#caption-error")).to_be_visible()
    page.tap("#caption-leave")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    cut_off = "(p) => { p.textContent += ' · many more words'.repeat(5); return p.scrollWidth > p.clientWidth; }"
    assert not page.locator("#about").evaluate(cut_off)
    low = {text: round(ratio, 2) for text, ratio in page.evaluate(CONTRASTS) if ratio < AA}
    assert not low


def test_a_token_is_asked_for_and_kept(open_page, tiny_checkpoint):
    with closing(Served(tiny_checkpoint, tokens=["secret"])) as served:
        page = open_page(served.url, expected="status of 401")
        expect(page.locator("#token")).to_be_focused()
        page.fill("#token", "sécret…")
        page.keyboard.press("Enter")
        assert page.locator("#token").evaluate("(token) => token.validity.patternMismatch")
        for token in ("wrong", "secret"):
            page.fill("#token", token)
            page.keyboard.press("Enter")
            expect(page.locator("#token-error")).to_be_visible(visible=token == "wrong")
        expect(page.locator("#about")).to_contain_text("tiny")
        page.reload()
        expect(page.locator("#about")).to_contain_text("tiny")
        expect(page.locator("#token")).to_be_hidden()


def test_further_modalities_are_shown(open_page, three_modality_checkpoint):
    with closing(Served(three_modality_checkpoint)) as served:
        page = open_page(served.url)
        set_options(page, **FEW_STEPS)
        generate(page)
        assert page.locator(".other").evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 32
        expect(page.locator(".other")).to_have_attribute("alt", "sketch")


def test_a_sketch_is_drawn_undone_cleared_and_made_into_an_image(open_page, three_modality_checkpoint):
    with closing(Served(three_modality_checkpoint)) as served:
        page = open_page(served.url, viewport={"width": 900, "height": 1400}, has_touch=True)
        sent = sent_by(page)
        set_options(page, **FEW_STEPS)
        summary, pad = page.locator("#summary"), page.locator("#sketch")
        expect(summary).to_have_text("Image: all generated. Sketch: all generated. Words: all generated.")
        box = pad.bounding_box()
        x, y, side = box["x"], box["y"], box["width"]
        page.mouse.move(x + side / 4, y + side / 4)
        page.mouse.down()
        page.mouse.move(x + side / 4, y + side * 3 / 4, steps=3)
        page.mouse.up()
        expect(summary).to_have_text("Image: all generated. Sketch: given. Words: all generated.")
        page.touchscreen.tap(x + side * 3 / 4, y + side / 2)
        assert ink_of(page)[8:24, 8].max() < 200 and ink_of(page)[16, 24] < 240
        page.keyboard.press("Control+z")
        assert ink_of(page)[16, 24] == 255 and ink_of(page)[8:24, 8].max() < 200
        generate(page)
        drawn = np.asarray(image_of(sent[0]["sketch"].partition(",")[2]).convert("L"))  # [512, 512]
        assert drawn[200, 128] == 0 and drawn[:, 256:].min() == 255 and "image" not in sent[0]
        expect(page.locator(".run h3")).to_have_text("Image and caption for a sketch")
        page.click("#clear-sketch")
        expect(summary).to_contain_text("Sketch: all generated.")
        page.click("#undo-sketch")
        expect(summary).to_contain_text("Sketch: given.")
        page.click("#clear-sketch")
        page.click(".use-sketch")  # of the result, which is the sketch that was given
        expect(summary).to_contain_text("Sketch: given.")
        assert ink_of(page)[8:24, 8].max() < 200
        page.click(".use-image")
        page.click(".use-caption")
        expect(summary).to_contain_text("Everything is given.")
        expect(page.locator("#generate")).to_be_disabled()
        page.click("#clear-sketch")
        generate(page)
        assert "sketch" not in sent[1] and {"image", "prompt"} <= sent[1].keys()


def ink_of(page) -> np.ndarray:
    """The sketch as the page shows it, [32, 32] from 0, black, to 255."""
    data = page.locator("#sketch").evaluate("(c) => c.toDataURL()").partition(",")[2]
    return np.asarray(image_of(data).convert("L").resize((32, 32), Image.Resampling.BOX))


def test_only_a_model_of_sketches_has_a_canvas_for_them(open_page):
    page = open_page()
    expect(page.locator("#about")).to_contain_text("tiny")
    expect(page.locator("#image-card")).to_be_visible()
    expect(page.locator("#sketch-card")).to_be_hidden()
