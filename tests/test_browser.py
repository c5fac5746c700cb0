"""The explorer in a real browser: JupyterLab and Voila, drawn images and random models (about a minute).

Screenshots go to ``build/screens/`` for people to look at. Skipped where no chromium is found; on Debian:
``apt-get install chromium``.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from fmbseg.models.encoders import load_encoder
from fmbseg.params import AlignParams, ModuleParams
from fmbseg.runs import modules
from fmbseg.runs.cache import Models
from fmbseg.schemas import ExploreRun
from fmbseg.stage2.alignment import Alignment

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
SCREENS = ROOT / "build" / "screens"
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NOTEBOOK = "09_explore_similarity.ipynb"
PANELS = """() => [...document.querySelectorAll(".fmbseg-panel")].filter((p) => p.offsetParent).map((p) => [
    p.closest("section").querySelector("h4").textContent, p.dataset.title, p.querySelector("img").src, p.getBoundingClientRect().toJSON()
])"""
PATIENCE = 90_000  # ms; machines differ

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH; on Debian: apt-get install chromium")


def write_module(smoke):
    """An untrained alignment module where the smoke profile's lies."""
    p, align = smoke(ExploreRun, profile="smoke"), smoke(AlignParams)
    width, out = load_encoder(align.encoder).width, Models.of(p).clip.encode_text(["word"]).shape[1]
    described = {"key": "untrained", "encoder": align.encoder, "clip": p.clip, "crop_input": p.crop_input, "templates": p.templates}
    return modules.save(modules.place("smoke"), Alignment(width, out, ModuleParams()), described)


@pytest.fixture(scope="module")
def project(tmp_path_factory, smoke):
    """A copy of the project in which the notebook's own cell names the smoke profile, and an untrained module."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "params", root / "params")
    (root / "notebooks").mkdir()
    text = (ROOT / "notebooks" / NOTEBOOK).read_text()
    assert 'profile = \\"embedded\\"' in text
    (root / "notebooks" / NOTEBOOK).write_text(text.replace('profile = \\"embedded\\"', 'profile = \\"smoke\\"'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMBSEG_HOME", str(root / "home"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"):
            patch.setenv(name, str(root / name.lower()))
        write_module(smoke)
        yield root


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    SCREENS.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield launched
        launched.close()


@pytest.fixture
def serve(project):
    """serve(command words with {port}) -> address of a server that answers; it is ended with the test."""
    running = []

    def start(*words):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = project / f"server-{port}.log"
        command = [sys.executable, "-m", *(word.format(port=port) for word in words)]
        running.append(subprocess.Popen(command, cwd=project / "notebooks", stdout=log.open("w"), stderr=subprocess.STDOUT))
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5)
                return address
            except urllib.error.HTTPError:
                return address
            except OSError:
                assert running[-1].poll() is None, log.read_text()
                time.sleep(0.2)
        raise AssertionError(log.read_text())

    yield start
    for process in running:
        process.terminate()
        process.wait(timeout=30)


def open_page(browser, address):
    page = browser.new_page(viewport={"width": 1500, "height": 1250})
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    return page


def open_lab(browser, serve, dark):
    settings = os.path.join(os.environ["JUPYTERLAB_SETTINGS_DIR"], "@jupyterlab", "apputils-extension")
    os.makedirs(settings, exist_ok=True)
    with open(os.path.join(settings, "themes.jupyterlab-settings"), "w") as stream:
        stream.write('{"theme": "JupyterLab Dark"}' if dark else '{"theme": "JupyterLab Light"}')
    with open(os.path.join(settings, "notification.jupyterlab-settings"), "w") as stream:
        stream.write('{"fetchNews": "false", "checkForUpdates": false}')
    address = serve(
        *("jupyterlab", "--no-browser", "--allow-root", "--port={port}", "--IdentityProvider.token=", "--expose-app-in-browser"),
        "--ServerApp.port_retries=0",
    )
    page = open_page(browser, f"{address}/lab/tree/{NOTEBOOK}")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.connectionStatus === 'connected'")
    page.evaluate("window.jupyterapp.shell.collapseLeft()")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")  # not waited for: there is no end in time
    return page


def open_voila(browser, serve, dark):
    address = serve("voila", NOTEBOOK, "--no-browser", "--port={port}", "--theme=" + ("dark" if dark else "light"), *voila_options())
    return open_page(browser, address)


def voila_options():
    """What ``make app`` gives Voila beside the notebook."""
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "/voila " in line]
    return [word.replace("'", "") for word in line.split()[1:] if word.startswith("--")]


def upload(page, path):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload an image").click()
    chooser.value.set_files(path)


class Screen:
    """What a person sees of the explorer and does to it."""

    def __init__(self, page, name):
        self.page, self.name = page, name
        page.wait_for_selector(".fmbseg-panel img")
        self.settle()

    def settle(self):
        """Wait until the explorer has answered."""
        self.page.wait_for_function("() => [...document.querySelectorAll('.fmbseg-note')].some(n => n.textContent.includes('Answered'))")

    def images(self):
        """{(section, panel): address of its image} of the open tab, in which no two images overlap."""
        panels = self.page.evaluate(PANELS)  # in one go: between two questions the page may change
        for i, (_, _, _, a) in enumerate(panels):
            for _, _, _, b in panels[:i]:
                assert a["right"] <= b["left"] or b["right"] <= a["left"] or a["bottom"] <= b["top"] or b["bottom"] <= a["top"]
        return {(section, panel): source for section, panel, source, _ in panels}

    def notice(self):
        return self.page.locator(".fmbseg-note, .fmbseg-error").first.text_content()

    def type(self, label, text):
        field = self.page.get_by_label(label, exact=True)
        field.fill(text)
        field.press("Enter")

    def slide(self, label, key, times=1):
        handle = self.page.locator(f".widget-slider:has(label:text-is('{label}')) .noUi-handle")
        for _ in range(times):
            handle.press(key)

    def readout(self, label):
        return float(self.page.locator(f".widget-slider:has(label:text-is('{label}')) .widget-readout").text_content())

    def changed(self, before):
        """Wait until an image is another than before; returns {key: address} now and the keys that changed."""
        for _ in range(PATIENCE // 100):
            now = self.images()
            differing = {key for key in now if now[key] != before.get(key)}
            self.page.wait_for_timeout(100)
            if differing:
                self.settle()
                while (later := self.images()) != now:  # a slider's move is several changes
                    now = later
                    self.page.wait_for_timeout(500)
                return now, {key for key in now if now[key] != before.get(key)}
        raise AssertionError("no image changed")

    def shoot(self, what):
        self.page.locator(".fmbseg-panels:visible").first.scroll_into_view_if_needed()
        path = SCREENS / f"{self.name}-{what}.png"
        self.page.screenshot(path=path)
        with Image.open(path) as shot:
            assert np.asarray(shot.convert("L")).std() > 10


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("place", ["lab", "voila"])
def test_words_sliders_and_points_change_the_images(browser, serve, place, dark):
    page = (open_lab if place == "lab" else open_voila)(browser, serve, dark)
    screen = Screen(page, f"{place}-{'dark' if dark else 'light'}")
    start = screen.images()
    both = {"CLIP dense", "aligned encoder"}
    assert set(start) == {("Image", "image"), ("Image", "segmentation")} | {
        (section, model) for section in ("Similar to the point", "sky", "grass", "sun", "house") for model in both
    }
    screen.shoot("1-start")

    screen.type("Words", "sky, house, dragon")
    now, changed = screen.changed(start)
    assert {section for section, _ in now} == {"Image", "Similar to the point", "sky", "house", "dragon"}
    assert ("dragon", "CLIP dense") in changed and ("Image", "image") not in changed
    screen.shoot("2-words")

    screen.slide("Threshold", "ArrowRight", 60)
    before, (now, changed) = now, screen.changed(now)
    assert screen.readout("Threshold") == 0.6
    assert {("sky", m) for m in both} | {("Image", "segmentation")} <= changed and ("Image", "image") not in changed
    screen.shoot("3-threshold")
    screen.slide("Threshold", "Home")
    now, _ = screen.changed(now)
    assert now["sky", "CLIP dense"] == before["sky", "CLIP dense"]

    shown = page.locator(".fmbseg-panel[data-title=image] .fmbseg-frame")
    box = shown.bounding_box()
    shown.click(position={"x": box["width"] * 0.2, "y": box["height"] * 0.9})
    now, changed = screen.changed(now)
    assert changed == {("Similar to the point", m) for m in both}
    assert abs(screen.readout("Point across") - 0.2) < 0.02 and abs(screen.readout("Point down") - 0.9) < 0.02
    cross = page.locator(".fmbseg-panel[data-title=image] .fmbseg-cross").bounding_box()
    assert abs(cross["x"] + cross["width"] / 2 - box["x"] - box["width"] * 0.2) < 3
    screen.shoot("4-point")
    screen.slide("Point across", "End")
    now, changed = screen.changed(now)
    assert changed == {("Similar to the point", m) for m in both}

    for words, sentence in (("sky, sky", "given more than once: sky"), (" , ", "no word given")):
        screen.type("Words", words)
        page.wait_for_selector(f".fmbseg-error:has-text('{sentence}')")
        assert screen.images() == now and "Traceback" not in page.text_content("body")
    screen.shoot("5-bad-words")
    screen.type("Words", "sky, grass, sun, house")
    now, _ = screen.changed(now)
    assert "Answered" in screen.notice()

    page.get_by_role("tab", name="Stage 1").click()
    page.wait_for_selector(".fmbseg-panel[data-title^=confidence]")
    screen.settle()
    now = screen.images()
    titles = [panel for _, panel in now]
    assert titles[0] == "votes" and "query points" in titles and page.locator(".fmbseg-chosen:visible").count() == 1
    assert page.locator(".fmbseg-box:visible").count() == 2
    assert page.locator(".fmbseg-panel[data-title='query points'] .fmbseg-star").count() == 5
    screen.slide("Query points", "ArrowRight", 3)
    now, changed = screen.changed(now)
    assert page.locator(".fmbseg-panel[data-title='query points'] .fmbseg-star").count() == 8
    page.get_by_role("button", name="Find automatic masks").click()
    page.wait_for_selector(".fmbseg-panel[data-title=labelled] .fmbseg-legend li")
    screen.images()
    screen.shoot("6-stage-1")

    errors = page.locator(
        ".jp-RenderedText[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']"
    )
    assert [text for text in errors.all_text_contents() if re.search("Traceback|Error", text)] == []
    page.close()


def test_own_images_and_no_module(browser, serve, project, tmp_path):
    """An image is uploaded; a file that is none says so; without a module one sentence says how to get one."""
    module = modules.place("smoke")
    module.rename(module.with_suffix(".away"))
    try:
        page = open_voila(browser, serve, False)
        screen = Screen(page, "voila-no-module")
        assert set(screen.images()) == {
            ("Image", "image"),
            ("Image", "segmentation"),
            ("Similar to the point", "aligned encoder"),
        } | {(section, "CLIP dense") for section in ("Similar to the point", "sky", "grass", "sun", "house")}
        assert page.text_content("body").count("run notebook 04, or: fmbseg train --profile smoke") == 1
        screen.shoot("start")
        own = tmp_path / "own.png"
        Image.fromarray(np.random.RandomState(0).randint(0, 255, (150, 300, 3), dtype=np.uint8)).save(own)
        start = screen.images()
        upload(page, own)
        _, changed = screen.changed(start)
        assert ("Image", "image") in changed
        assert page.get_by_label("Image", exact=True).input_value().replace("\xa0", " ") == "own.png (uploaded)"
        page.wait_for_selector(".fmbseg-note:has-text('300 x 150 pixels')")
        screen.shoot("uploaded")
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        upload(page, broken)
        page.wait_for_selector(".fmbseg-error:has-text('broken.png: cannot be read as an image')")
        page.close()
    finally:
        module.with_suffix(".away").rename(module)
