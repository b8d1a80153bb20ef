"""The page in headless Chromium, against a service in a thread: what its tests share."""

import threading
import time
from pathlib import Path

import numpy as np
import uvicorn
from engine_cases import noise
from PIL import Image
from playwright.sync_api import expect

from engine import Engine
from engine.serving.app import create_app
from engine.serving.async_engine import AsyncEngine

expect.set_options(timeout=20_000)

PICTURE = noise(3)  # of the model's size, so that it is sent as it is
GIVEN = np.asarray(PICTURE)
FEW_STEPS = {"num": "1", "steps": "3"}


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
