"""Flip-books move in a browser, by keyboard and by mouse, with no kernel and no other host.

Needs playwright and a Chromium on the system; skipped with a reason where either is missing.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import execute
import numpy as np
import pytest

from ebm_lit.widgets import flipbook

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHAPTERS = [path for path in execute.notebooks() if path.stem[0].isdigit()]
SHADES = (40, 100, 160, 220)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this system")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@contextmanager
def opened(browser: "Browser", file: Path, **options: Any) -> Iterator["Page"]:
    """The file in a page of its own; afterwards nothing was asked for but that file, and no script failed."""
    context = browser.new_context(**options)
    context.set_default_timeout(10_000)
    page = context.new_page()
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    yield page
    assert [url for url in requests if url != file.as_uri() and not url.startswith(("data:", "blob:"))] == []
    assert errors == []
    context.close()


def write_page(file: Path, body: str) -> Path:
    file.write_text(f"<!doctype html><html><head><meta charset='utf-8'></head><body>{body}</body></html>")
    return file


def make_book(shades: tuple[int, ...] = SHADES) -> str:
    """A flip-book of grey squares, as HTML."""
    frames = [np.full((80, 120), shade, dtype=np.uint8) for shade in shades]
    labels = [f"shade {shade}" for shade in shades]
    return flipbook(frames, labels, title="Grey", alt="A grey square that grows lighter.")._repr_html_()


def players(page: "Page") -> list[tuple["Locator", "Locator"]]:
    """Slider and picture of every flip-book on the page."""
    found = []
    for slider in page.locator("input[type=range]").all():
        holder = slider.locator("xpath=ancestor::*[.//img][1]")
        found.append((slider, holder.locator("img:visible").first))
    return found


def look(picture: "Locator") -> bytes:
    """What the picture looks like now, once it has been decoded."""
    picture.evaluate("image => image.decode && image.decode()")
    return picture.screenshot()


def click_at(slider: "Locator", fraction: float) -> None:
    """Click on the slider, so far along from its left end."""
    box = slider.bounding_box()
    assert box is not None
    slider.click(position={"x": box["width"] * fraction, "y": box["height"] / 2})


def assert_moves(slider: "Locator", picture: "Locator") -> None:
    """By keyboard there and back, by mouse to the far end and back: the picture follows each time."""
    slider.scroll_into_view_if_needed()
    slider.focus()
    slider.press("Home")
    first, start = look(picture), slider.input_value()
    slider.press("ArrowRight")
    assert slider.input_value() != start
    assert look(picture) != first, "the arrow key moved the slider but not the picture"
    slider.press("ArrowLeft")
    assert look(picture) == first
    click_at(slider, 0.99)
    assert slider.input_value() == slider.get_attribute("max")
    last = look(picture)
    assert last != first, "the mouse moved the slider but not the picture"
    click_at(slider, 0.01)
    assert slider.input_value() == start and look(picture) == first
    slider.focus()
    slider.press("End")
    assert look(picture) == last


def test_flip_book_follows_keyboard_and_mouse(browser: "Browser", tmp_path: Path) -> None:
    with opened(browser, write_page(tmp_path / "one.html", make_book())) as page:
        ((slider, picture),) = players(page)
        assert_moves(slider, picture)
        seen = set()
        slider.focus()
        slider.press("Home")
        for shade in SHADES:
            assert page.get_by_text(f"shade {shade}").first.is_visible(), "the label says where we are"
            seen.add(look(picture))
            slider.press("ArrowRight")
        assert len(seen) == len(SHADES)


def test_flip_books_on_one_page_are_independent(browser: "Browser", tmp_path: Path) -> None:
    body = make_book() + make_book((10, 90, 250))
    with opened(browser, write_page(tmp_path / "two.html", body)) as page:
        (one, picture_one), (other, picture_other) = players(page)
        before = look(picture_other)
        assert_moves(one, picture_one)
        assert look(picture_other) == before
        assert_moves(other, picture_other)


def test_same_flip_book_twice_on_one_page_still_works(browser: "Browser", tmp_path: Path) -> None:
    with opened(browser, write_page(tmp_path / "twice.html", make_book() + make_book())) as page:
        for slider, picture in players(page):
            assert_moves(slider, picture)


def test_still_picture_where_scripts_do_not_run(browser: "Browser", tmp_path: Path) -> None:
    file = write_page(tmp_path / "still.html", make_book())
    with opened(browser, file, java_script_enabled=False) as page:
        picture = page.locator("img:visible").first
        assert picture.is_visible()
        assert "grey square" in (picture.get_attribute("alt") or "")
        box = picture.bounding_box()
        assert box is not None and box["width"] >= 100 and box["height"] >= 60


def test_slider_says_what_it_is(browser: "Browser", tmp_path: Path) -> None:
    """Somebody who cannot see the slider can find it by name."""
    with opened(browser, write_page(tmp_path / "name.html", make_book())) as page:
        assert page.get_by_role("slider", name=re.compile("Grey")).count() == 1


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in CHAPTERS])
def test_flip_books_of_the_chapter_move_in_its_exported_page(browser: "Browser", path: Path, tmp_path: Path) -> None:
    """The stored outputs, exported without the page furniture that nbconvert takes from other hosts."""
    if 'type=\\"range\\"' not in path.read_text():
        pytest.skip("this chapter has no flip-book")
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter(template_name="basic").from_filename(str(path))
    with opened(browser, write_page(tmp_path / "chapter.html", body)) as page:
        found = players(page)
        assert found
        for slider, picture in found:
            assert_moves(slider, picture)
