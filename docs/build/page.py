"""Makes docs/page.png, the README's picture of the page, with the built-in model: `python docs/build/page.py`.

Needs the extra [serve], playwright and Debian's chromium. A caption is drawn four times; the first image is then used
again with its face painted over and one word blanked.
"""

import threading
import time
from pathlib import Path

import uvicorn
from playwright.sync_api import Page, expect, sync_playwright

from engine import Engine
from engine.serving.app import create_app
from engine.serving.async_engine import AsyncEngine

CAPTION, BLANK = "firefighter light skin tone", "light"
FACE = ((0.30, 0.40), (0.70, 0.40), (0.70, 0.50), (0.30, 0.50), (0.35, 0.62), (0.65, 0.62), (0.50, 0.70))  # a stroke
CHROMIUM = "/usr/bin/chromium"


def generate(page: Page, seed: int, runs: int) -> None:
    """Generates four samples, the gallery's run number `runs`, and waits for them."""
    page.locator("#options").evaluate("(details) => { details.open = true; }")
    page.fill("#seed", str(seed))
    page.locator("#options").evaluate("(details) => { details.open = false; }")
    page.click("#generate")
    expect(page.locator("#gallery .run:not(.running)")).to_have_count(runs, timeout=120_000)
    expect(page.locator("#generate")).to_be_visible()


def paint(page: Page) -> None:
    page.fill("#brush-size", "16")
    box = page.locator("#overlay").bounding_box()
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in FACE]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places:
        page.mouse.move(*place, steps=8)
    page.mouse.up()


def picture(url: str) -> bytes:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(url)
        page.fill("#word", CAPTION + ",")
        generate(page, seed=7, runs=1)
        page.locator(".use-image").first.click()
        page.locator(".chip-word", has_text=BLANK).first.click()
        paint(page)
        generate(page, seed=3, runs=2)
        page.evaluate("window.scrollTo(0, 0)")
        page.mouse.move(0, 0)
        shot = page.screenshot()
        browser.close()
    return shot


def main() -> None:
    engine = AsyncEngine(Engine.from_pretrained(device="cpu"))
    server = uvicorn.Server(uvicorn.Config(create_app(engine, model="emoji"), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        shot = picture(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/")
    finally:
        server.should_exit = True
        thread.join()
    (Path(__file__).resolve().parents[1] / "page.png").write_bytes(shot)


if __name__ == "__main__":
    main()
