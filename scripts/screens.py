"""Make the screens in docs/: the explorer as an app, and the review page of a few results, both by the embedded profile.

    python scripts/screens.py

It needs chromium, which on Debian ``apt-get install chromium`` brings. The images are those of the embedded benchmark whose
licence, CC BY 2.0, allows it; docs/explore.md and docs/tools.md credit them.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from fmbseg import cli, files
from fmbseg.data import fetch
from fmbseg.tools import review

NOTEBOOK = "09_explore_similarity.ipynb"
EXPLORED, EXPLORED_WORDS = "000000311303", "sandwich, cup, dining table, person"
REVIEWED = ("000000129054", "000000311303", "000000356387", "000000393226")
REVIEWED_WORDS = "person, zebra, bus, grass, sky, building, street, sandwich, cup, dining table"
PATIENCE = 120  # seconds for a server or a page to answer


@contextmanager
def voila(notebook: Path) -> Iterator[str]:
    """The address of the notebook as an app without code, as ``make app`` starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--no-browser", f"--port={port}", "--theme=light", "--TagRemovePreprocessor.remove_cell_tags=details")
    process = subprocess.Popen([sys.executable, "-m", "voila", notebook.name, *options], cwd=notebook.parent)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def opened(browser: Browser, address: str, height: int) -> Page:
    """The page at an address, which may not answer at once."""
    page = browser.new_page(viewport={"width": 1300, "height": height})
    page.set_default_timeout(PATIENCE * 1000)
    if address.startswith("http"):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"{address}/voila/api/kernels", timeout=5)
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
    page.goto(address)
    return page


def explorer(browser: Browser, pool: Path, folder: Path, out: Path) -> None:
    """A screen of the explorer on one image."""
    notebook = nbformat.read(files.project_root() / "notebooks" / NOTEBOOK, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    with Image.open(pool / f"{EXPLORED}.jpg") as image:
        image.save(folder / f"{EXPLORED}.png")  # other bytes: images to evaluate on are in no collection
    given = {"collection": str(folder), "words": EXPLORED_WORDS, "reference_images": 0, "results_dir": str(folder / "results")}
    cell.source = "\n".join(['profile = "embedded"', *(f"{name} = {value!r}" for name, value in given.items())])
    nbformat.write(notebook, folder / NOTEBOOK)
    with voila(folder / NOTEBOOK) as address:
        page = opened(browser, address, 1280)
        page.wait_for_selector(".fmbseg-panel img")
        page.wait_for_function("() => [...document.querySelectorAll('.fmbseg-note')].some(n => n.textContent.includes('Answered'))")
        page.locator(".fmbseg-panels:visible").first.scroll_into_view_if_needed()
        page.screenshot(path=out)


def reviewed(browser: Browser, pool: Path, folder: Path, out: Path) -> None:
    """A screen of the review page of a few results."""
    images = [str(pool / f"{name}.jpg") for name in REVIEWED]
    if status := cli.main(["segment", *images, "--classes", REVIEWED_WORDS, "--out", str(folder)]):
        raise SystemExit(status)
    page = opened(browser, review.write(folder).as_uri(), 1430)
    for image in page.locator("article img").all():
        image.scroll_into_view_if_needed()
    page.evaluate("window.scrollTo(0, 0)")
    page.evaluate("document.getElementById('folder').textContent = 'cut'")
    page.locator("article").nth(0).get_by_role("button", name="reject").click()
    page.locator("article").nth(2).get_by_role("button", name="accept").click()
    page.wait_for_timeout(500)
    page.screenshot(path=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=files.project_root() / "docs", help="folder to write to (default docs/)")
    parser.add_argument("--only", choices=("explorer", "review"), help="only this one")
    options = parser.parse_args()
    chromium = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if chromium is None:
        raise SystemExit("no chromium on the PATH; on Debian: apt-get install chromium")
    pool = fetch.require("coco_panoptic_20") / "images"
    with sync_playwright() as started, tempfile.TemporaryDirectory() as folder:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, make in {"explorer": explorer, "review": reviewed}.items():
            if options.only in (None, name):
                (place := Path(folder) / name).mkdir()
                make(browser, pool, place, options.out / f"{name}.png")
                print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
