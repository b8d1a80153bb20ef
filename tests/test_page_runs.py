"""The page: runs, their results, the service's answers and limits, tokens, models of one modality, and phones."""

import json

import pytest

pytest.importorskip("fastapi", reason="the service's packages are not installed")
pytest.importorskip("uvicorn", reason="the service's packages are not installed")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from page_cases import (  # noqa: E402
    FEW_STEPS,
    GIVEN,
    PICTURE,
    dropped,
    expect,
    generate,
    give_image,
    sent_by,
    set_options,
    shown_pixels,
    wait_until,
)
from service_cases import base64_of, file_of  # noqa: E402

from engine.serving.inputs import Limits  # noqa: E402

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


def test_a_double_click_and_a_held_key_begin_one_run_and_cancel_none(open_page):
    page = open_page()
    sent, cancelled = sent_by(page), []
    page.on("request", lambda request: request.method == "DELETE" and cancelled.append(request.url))
    set_options(page, num="16", steps="250")
    page.dblclick("#generate")
    expect(page.locator("#cancel")).to_be_visible()
    page.dblclick("#cancel")
    expect(page.locator(".run-state")).to_contain_text("Cancelled")
    expect(page.locator("#generate")).to_be_visible()
    set_options(page, **FEW_STEPS)
    page.focus("#generate")
    for _ in range(3):
        page.keyboard.down("Enter")  # the second and third are repeats
    page.keyboard.up("Enter")
    expect(page.locator("#cancel")).to_be_focused()
    expect(page.locator(".run:not(.running, .stopped)")).to_have_count(1)
    assert len(sent) == 2 and len(cancelled) <= 1


def test_a_run_waits_for_the_image_that_is_still_being_read(open_page):
    page = open_page()
    sent = sent_by(page)
    set_options(page, **FEW_STEPS)
    page.evaluate(
        """() => {
          const read = window.createImageBitmap;
          window.createImageBitmap = async (...what) => {
            await new Promise((done) => setTimeout(done, 300));
            return read(...what);
          };
        }"""
    )
    dropped(page, "#stage", file_of(PICTURE))
    generate(page)
    assert "image" in sent[0]
    dropped(page, "#stage", b"no image")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#image-error")).to_contain_text("cannot be read as an image")
    expect(page.locator("#generate")).to_be_visible()
    assert len(sent) == 1, "the image that was asked for is not there"


def test_text_with_a_picture_of_it_is_pasted_as_text(open_page):
    page = open_page()
    paste = """([selector, bytes]) => {
      const clipboardData = new DataTransfer();
      clipboardData.items.add(new File([Uint8Array.from(bytes)], "image.png", { type: "image/png" }));
      clipboardData.setData("text/plain", "red heart");
      const event = new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true });
      document.querySelector(selector).dispatchEvent(event);
      return event.defaultPrevented;
    }"""
    expect(page.locator("#generate")).to_be_enabled()
    assert not page.evaluate(paste, ["#word", [*file_of(PICTURE)]])
    assert page.evaluate(paste, ["#stage", [*file_of(PICTURE)]])
    expect(page.locator("#canvas")).to_be_visible()


def test_a_service_that_comes_back_with_another_model_is_noticed(open_page):
    page = open_page(expected="status of 503")
    sent = sent_by(page)
    give_image(page, file_of(PICTURE))
    page.click("[data-preset='left half']")
    set_options(page, **FEW_STEPS)

    def another(route) -> None:
        asked.append(model["id"])
        route.fulfill(json={**listed, "data": [{**listed["data"][0], **model}]})

    listed = page.request.get(f"{page.url}v1/models").json()
    asked, model = [], {"id": "another"}
    page.route("**/v1/models", another)
    generate(page)  # the answer is of "tiny", the page's model
    assert not asked
    refusal = {"error": {"message": "the engine is shutting down", "param": None}}
    for size, kept in ((32, True), (16, False)):
        page.route("**/v1/infill", lambda route: route.fulfill(status=503, json=refusal))
        page.click("#generate")
        expect(page.locator("#error")).to_contain_text("shutting down")
        page.unroute("**/v1/infill")
        model["size"] = f"{size}x{size}"
        page.click("#generate")
        expect(page.locator("#about")).to_contain_text(f"another · {size}-pixel images")
        expect(page.locator("#canvas")).to_be_visible(visible=kept)
        expect(page.locator("#generate")).to_be_visible()
    page.unroute_all(behavior="ignoreErrors")  # the model is asked for after a result of another one, too
    assert "mask" in sent[2] and "image" not in sent[4]


def test_a_list_of_suggestions_that_comes_late_keeps_the_selected_word(open_page):
    page = open_page()
    held = []
    page.route("**/v1/vocabulary?prefix=re&*", lambda route: held.append(route))
    page.locator("#word").focus()
    page.keyboard.type("r")
    expect(page.locator("#suggestions li").first).to_have_text("red")
    page.keyboard.type("e")
    page.keyboard.press("ArrowDown")
    count = page.locator("#suggestions li").count()
    held.pop().continue_()
    expect(page.locator("#suggestions li")).not_to_have_count(count)
    selected = page.locator("#suggestions [aria-selected=true]")
    expect(selected).to_have_text("red")
    expect(page.locator("#word")).to_have_attribute("aria-activedescendant", selected.get_attribute("id"))
    page.keyboard.press("Enter")
    expect(page.locator(".chip-word")).to_have_text(["red"])


def test_a_selected_word_is_not_that_of_what_is_typed_next(open_page):
    page = open_page()
    page.locator("#word").focus()
    page.keyboard.type("r")
    expect(page.locator("#suggestions li").first).to_have_text("red")
    page.keyboard.press("ArrowDown")
    count = page.locator("#suggestions li").count()
    page.keyboard.type("e")
    expect(page.locator("#suggestions li")).not_to_have_count(count)
    expect(page.locator("#suggestions [aria-selected=true]")).to_have_count(0)
    page.keyboard.press("Enter")
    expect(page.locator(".chip-word")).to_have_text(["re"])


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


def test_a_service_that_takes_less_than_the_usual_can_be_used_at_once(open_page, serve, tiny_checkpoint):
    served = serve(tiny_checkpoint, limits=Limits(num=2, steps=3))
    page = open_page(served.url)
    expect(page.locator("#options-summary")).to_contain_text("2 samples · 3 steps")
    generate(page)
    expect(page.locator(".use-image")).to_have_count(2)


def test_a_model_of_one_modality_is_served_without_the_other(open_page, serve, single):
    name, checkpoint = single
    served = serve(checkpoint)
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


def test_a_token_is_asked_for_and_kept(open_page, serve, tiny_checkpoint):
    served = serve(tiny_checkpoint, tokens=["secret"])
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


def test_a_token_is_kept_by_the_page_where_storage_is_blocked(open_page, serve, tiny_checkpoint):
    page = open_page(serve(tiny_checkpoint, tokens=["secret"]).url, expected="status of 401")
    page.add_init_script(
        "Object.defineProperty(window, 'sessionStorage', { get() { throw new DOMException('', 'SecurityError'); } })"
    )
    page.reload()
    page.fill("#token", "secret")
    page.keyboard.press("Enter")
    expect(page.locator("#about")).to_contain_text("tiny")
    set_options(page, **FEW_STEPS)
    generate(page)
