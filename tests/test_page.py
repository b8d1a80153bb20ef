"""The page: what is given and what is left to the model, by brush, words, files and keyboard."""

import io

import numpy as np
import pytest
from engine_cases import noise
from PIL import Image

from engine.images import ORIENTATION, fit_image, open_image

pytest.importorskip("fastapi", reason="the service's packages are not installed")
pytest.importorskip("uvicorn", reason="the service's packages are not installed")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from page_cases import (  # noqa: E402
    FEW_STEPS,
    GIVEN,
    PICTURE,
    downloaded,
    dropped,
    expect,
    generate,
    give_image,
    is_focused,
    sent_by,
    set_options,
    shown_pixels,
    tab_to,
)
from service_cases import file_of, image_of  # noqa: E402


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


def test_a_stroke_ends_where_it_is_undone_or_cut_off(open_page, serve, three_modality_checkpoint):
    served = serve(three_modality_checkpoint)
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


def test_files_can_be_dropped_and_texts_are_left_to_the_browser(open_page, serve, three_modality_checkpoint):
    served = serve(three_modality_checkpoint)
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


def test_further_modalities_are_shown(open_page, serve, three_modality_checkpoint):
    served = serve(three_modality_checkpoint)
    page = open_page(served.url)
    set_options(page, **FEW_STEPS)
    generate(page)
    assert page.locator(".other").evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 32
    expect(page.locator(".other")).to_have_attribute("alt", "sketch")


def test_a_sketch_is_drawn_undone_cleared_and_made_into_an_image(open_page, serve, three_modality_checkpoint):
    served = serve(three_modality_checkpoint)
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
