"""The review page in a real browser: order, verdicts, and the CSV that is read back."""

import csv
import os

import numpy as np
import pytest
from PIL import Image
from test_browser import SCREENS, browser, pytestmark  # noqa: F401

from fmbseg import files
from fmbseg.errors import DataError
from fmbseg.stage2.segmenter import Confidence
from fmbseg.tools import review


@pytest.fixture
def folder(tmp_path):
    """Results of three images, of names that are hard to write into pages, links and tables."""
    for name, margin in {"sure": 0.2, 'sub/a "quoted", 100% <b>': 0.01, "猫 #1": 0.05}.items():
        place, image = tmp_path / "cut" / name, tmp_path / "in" / f"{name}.png"
        for path in (place, image):
            path.parent.mkdir(parents=True, exist_ok=True)
        for path in (image, place.with_name(place.name + ".overlay.png")):
            Image.fromarray(np.full((40, 60, 3), int(1000 * margin), np.uint8)).save(path)
        margins = np.full((40, 60), margin)
        Image.fromarray(Confidence(margins, margins).levels).save(place.with_name(place.name + ".margin.png"))
        classes = [{"name": "cat", "mean_margin": margin}, {"name": "</script>", "mean_margin": margin / 2}]
        said = {"image": str(image), "key": "k", "height": 40, "width": 60, "mean_margin": margin, "classes": classes}
        files.write_json(place.with_name(place.name + ".json"), said)
    return tmp_path / "cut"


def test_verdicts_are_kept_in_the_browser_and_saved_as_csv(folder, browser):  # noqa: F811
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.goto(review.write(folder).as_uri())
    names = ['sub/a "quoted", 100% <b>', "猫 #1", "sure"]
    assert page.eval_on_selector_all("article", "all => all.map((a) => a.dataset.result)") == names  # the least certain first
    links = page.eval_on_selector_all("article h2 a", "all => all.map((a) => decodeURIComponent(new URL(a.href).pathname))")
    assert links == [str(folder.parent / "in" / f"{name}.png") for name in names]
    assert page.locator("article p").first.text_content() == "margin 0.010: cat 0.010, </script> 0.005"
    for image in page.locator("article img").all():
        image.scroll_into_view_if_needed()
        page.wait_for_function("image => image.complete && image.naturalWidth === 60", arg=image.element_handle())
    page.locator("article").nth(0).get_by_role("button", name="reject").click()
    page.locator("article").nth(2).hover()
    page.keyboard.press("a")
    assert page.text_content("#count") == "2 of 3 reviewed."
    page.screenshot(path=SCREENS / "review.png")
    page.wait_for_timeout(500)  # the browser keeps it a moment later
    page.reload()
    assert page.eval_on_selector_all("article", "all => all.map((a) => a.className)") == ["reject", "", "accept"]
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == review.VERDICTS
    download.value.save_as(folder / review.VERDICTS)
    assert review.verdicts(folder) == {names[0]: "reject", "sure": "accept"}
    with open(folder / review.VERDICTS, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["image"] for row in rows] == [files.read_json(folder / f"{name}.json")["image"] for name in (names[0], "sure")]
    page.evaluate("localStorage.clear()")
    page.goto(review.write(folder).as_uri())  # begins with what was saved
    page.locator("article.accept").get_by_role("button", name="accept").click()  # again: taken back
    assert page.eval_on_selector_all("article", "all => all.map((a) => a.className)") == ["reject", "", ""]
    page.close()


def test_a_verdict_is_on_the_result_that_was_seen(folder, browser):  # noqa: F811
    def again(name, key):
        files.write_json(folder / f"{name}.json", files.read_json(folder / f"{name}.json") | {"key": key})

    def shown():
        page.goto(review.write(folder).as_uri())
        return page.eval_on_selector_all("article", "all => all.map((a) => a.className)")

    page = browser.new_page()
    shown()
    for k in (1, 2):
        page.locator("article").nth(k).get_by_role("button", name="accept").click()
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(folder / review.VERDICTS)
    again("sure", "of another threshold")
    assert review.verdicts(folder) == {"猫 #1": "accept"} and shown() == ["", "accept", ""]
    with open(folder / review.VERDICTS, "a") as stream:
        stream.write("sure,,reject,of another threshold\n")
    assert shown() == ["", "accept", "reject"]  # this browser has no verdict on it
    page.locator("article").nth(2).get_by_role("button", name="accept").click()
    assert shown() == ["", "accept", "accept"]  # now it has
    (folder / review.VERDICTS).write_text("result,image,verdict\nsure,,reject\n")
    assert review.verdicts(folder) == {"sure": "reject"}  # a file from before keys were written
    odd = os.fsdecode(b"caf\xe9\xe8")  # not UTF-8
    files.write_json(folder / f"{odd}.json", files.read_json(folder / "sure.json"))
    (folder / review.VERDICTS).unlink()
    shown()
    page.locator("article").nth(2).get_by_role("button", name="accept").click()
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(folder / review.VERDICTS)
    assert review.verdicts(folder)[odd] == "accept" and odd in review.results(folder)
    page.close()


def test_what_is_no_review_is_said(folder, tmp_path):
    os.makedirs(tmp_path / "empty")
    with pytest.raises(DataError, match="holds no result; give the folder that fmbseg segment"):
        review.write(tmp_path / "empty")
    (folder / review.VERDICTS).write_text("result,image,verdict\nsure,x,maybe\n")
    with pytest.raises(DataError, match="holds the verdict 'maybe'; it is accept or reject"):
        review.write(folder)
    (folder / review.VERDICTS).write_text("no table")
    with pytest.raises(DataError, match="no file of the review page"):
        review.write(folder)
