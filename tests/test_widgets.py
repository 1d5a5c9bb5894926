"""Flip-books hold what they were given and nothing that could hurt; figures are pure; sliders change the picture.

How a flip-book behaves in a browser is in test_flipbook_browser.py.
"""

import base64
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from ebm_lit.boltzmann import double_well, quadratic, thermodynamics
from ebm_lit.plotting import to_png
from ebm_lit.widgets import (
    Explorer,
    FlipBook,
    flipbook,
    langevin_figure,
    langevin_widget,
    run_report,
    temperature_figure,
    temperature_widget,
)

NASTY = "</script><img src=x onerror=alert(1)> & \"quotes\" 'single' $key ${label} \u2028 BOOK ζ"
WELL = [(-3.0, 3.0), (-3.0, 3.0)]


@pytest.fixture(autouse=True)
def no_figure_is_left() -> Iterator[None]:
    plt.switch_backend("agg")
    yield
    left = plt.get_fignums()
    plt.close("all")
    assert left == []


def squares(n: int = 4) -> list[np.ndarray]:
    return [np.full((6, 8), 40 * i, dtype=np.uint8) for i in range(n)]


def book_in(html: str) -> dict[str, Any]:
    """What the script of a player is given."""
    found = re.search(r"var book = (\{.*\});", html)
    assert found
    return json.loads(found[1])


class Elements(HTMLParser):
    """Every element of a page with its attributes, and what stands open at the end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in {"img", "input", "meta"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# Flip-books


def test_player_holds_every_frame_once() -> None:
    html = flipbook(squares(), "abcd", title="Squares", alt="They grow lighter.", start=1).html()
    pngs = [to_png(square) for square in squares()]
    for png in pngs:
        assert html.count(base64.b64encode(png).decode()) == 1
    book = book_in(html)
    assert book["labels"] == list("abcd") and book["start"] == 1 and book["frames"][1] == ""
    assert [base64.b64decode(frame) for i, frame in enumerate(book["frames"]) if i != 1] == [pngs[0], *pngs[2:]]


def test_player_is_sound_and_speaks() -> None:
    page = Elements(flipbook(squares(), "abcd", title="Squares", alt="They grow lighter.", start=1).html())
    assert page.open == []
    tags = [tag for tag, _ in page.found]
    assert tags == [
        "figure",
        "img",
        "figcaption",
        "span",
        "div",
        "input",
        "span",
        "button",
        "button",
        "button",
        "script",
    ]
    elements = dict(reversed([(tag, attributes) for tag, attributes in page.found]))
    assert elements["img"]["alt"] == "They grow lighter. Frame 2 of 4: b"
    assert elements["input"] | {"type": "range", "aria-label": "Squares", "max": "3", "value": "1"} == elements["input"]
    assert elements["figure"]["role"] == "group" and elements["figure"]["aria-label"] == "Squares"
    assert elements["span"]["aria-live"] == "polite"
    assert "display:none" in (elements["div"]["style"] or "")


def test_player_asks_nobody_and_survives_markdown() -> None:
    html = flipbook(squares(), "abcd", title="Squares").html()
    assert not re.search(
        r"https?:|//\w|@import|url\(|\bfetch\b|XMLHttpRequest|\beval\b", re.sub(r"base64,[^\"]*", "", html)
    )
    assert "\n\n" not in html and not re.search(r"^(\t| {4})", html, re.MULTILINE)
    assert " id=" not in html, "ids would clash when a page shows a flip-book twice"


def test_jupyterlab_leaves_the_keys_to_the_controls() -> None:
    """Without the mark on the focused element itself its shortcuts swallow the arrow keys."""
    page = Elements(flipbook(squares(), "abcd").html())
    controls = [attributes for tag, attributes in page.found if tag in {"input", "button"}]
    assert len(controls) == 4 and all("data-lm-suppress-shortcuts" in attributes for attributes in controls)


def test_same_content_same_bytes() -> None:
    def make(labels: str = "abcd", **options: Any) -> FlipBook:
        return flipbook(squares(), labels, **options)

    assert make().html() == make().html()
    others = [make("abce"), make(title="t"), make(alt="a"), make(start=1), flipbook(squares()[::-1], "abcd")]
    assert len({book.key for book in [make(), *others]}) == 6


def test_texts_cannot_break_out() -> None:
    html = flipbook(squares(2), [NASTY, NASTY + "!"], title=NASTY, alt=NASTY).html()
    page = Elements(html)
    assert page.open == [] and [tag for tag, _ in page.found].count("img") == 1
    assert html.count("</script") == 1
    image = next(attributes for tag, attributes in page.found if tag == "img")
    assert image["alt"] == f"{NASTY} Frame 1 of 2: {NASTY}" and "onerror" not in image
    book = book_in(html)
    assert book["labels"] == [NASTY, NASTY + "!"] and book["alt"] == NASTY


def test_without_title_and_alt_it_still_has_names() -> None:
    page = Elements(flipbook(squares(), range(4)).html())
    assert page.found[0][1]["aria-label"] == "Flip-book"
    assert (page.found[1][1]["alt"] or "").strip() == "Frame 1 of 4: 0"


def test_figures_are_drawn_with_few_colours_and_closed() -> None:
    figures = []
    for i in range(3):
        fig, ax = plt.subplots(figsize=(2, 1))
        ax.imshow(np.random.RandomState(i).rand(20, 40))
        figures.append(fig)
    rich, poor = flipbook(figures, "abc", dpi=50, colors=None), flipbook(figures, "abc", dpi=50)
    assert plt.get_fignums() == []
    picture = Image.open(io.BytesIO(poor.frames[0]))
    assert picture.size == (100, 50) and len(picture.convert("RGB").getcolors()) <= 64
    assert sum(map(len, poor.frames)) < sum(map(len, rich.frames)) / 2


def test_frames_may_be_bytes_and_small_arrays_are_enlarged() -> None:
    png = to_png(squares()[1])
    assert flipbook([png], ["a"]).frames == (png,) and flipbook([png], ["a"]).width == 8
    small = flipbook(squares(), "abcd")
    assert small.width == 320 and 'width="320" height="240"' in small.html() and "pixelated" in small.html()
    assert 'width="80" height="60"' in flipbook(squares(), "abcd", width=80).html()
    assert flipbook([np.zeros((3, 400))], ["a"]).width == 400
    tensors = flipbook([torch.rand(4, 4, requires_grad=True) for _ in range(2)], "ab")
    assert len(tensors.frames) == 2


def test_negative_start_counts_from_the_end() -> None:
    assert flipbook(squares(), "abcd", start=-1).start == 3


def test_saved_page_stands_alone(tmp_path: Path) -> None:
    book = flipbook(squares(), "abcd", title="A < B")
    path = book.save(str(tmp_path / "book.html"))
    text = path.read_text(encoding="utf-8")
    page = Elements(text)
    assert page.open == [] and book.html() in text and "<title>A &lt; B</title>" in text
    assert text.startswith("<!doctype html>\n")
    assert book.save(path) == path and path.read_text(encoding="utf-8") == text


def test_notebooks_show_the_player() -> None:
    book = flipbook(squares(), "abcd")
    assert book._repr_html_() == book.html()
    assert repr(book) == "FlipBook(4 frames, 'a' to 'd')"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: flipbook([], []), "at least one frame, found 0 for 0"),
        (lambda: flipbook(squares(), "abc"), "labels: expected one a frame .* found 3 for 4"),
        (lambda: flipbook(squares(), "abcd", start=4), "start: .* one of 4 frames, found 4"),
        (lambda: flipbook(squares(), "abcd", start=-5), "start: .* found -5"),
        (
            lambda: flipbook([np.zeros((2, 2)), np.zeros((2, 3))], "ab"),
            "frames: expected one size, found 2x2, 3x2 pixels",
        ),
        (lambda: flipbook([b"GIF89a"], "a"), "frames: expected figures, arrays or the bytes of PNG files"),
        (lambda: flipbook([b"\x89PNG\r\n\x1a\n"], "a"), "frames: expected figures"),
        (lambda: flipbook([np.zeros((2, 2, 2))], "a"), "picture: expected a figure or an array"),
        (lambda: flipbook([np.full((2, 2), -1.0)], "a"), "picture: expected floats in"),
        (lambda: temperature_figure(quadratic, WELL, 0.0), "temperature must be positive"),
        (lambda: temperature_figure(quadratic, [(-1, 1)] * 3), "bounds: expected 1 or 2 pairs .*, found 3"),
        (lambda: temperature_figure(lambda x: x, WELL), "energy: expected an array of 1 axis"),
        (lambda: langevin_figure(quadratic, step_size=0.0), "step_size"),
        (lambda: langevin_figure(quadratic, temperature=1.0, noise_scale=1.0), "temperature or noise_scale"),
    ],
)
def test_refusals_are_one_line(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


# Pure figures


@pytest.mark.parametrize("dimension", [1, 2])
def test_temperature_figure_says_what_quadrature_says(dimension: int) -> None:
    for t in (0.3, 1.0, 4.0):
        fig = temperature_figure(double_well, [(-10.0, 10.0)] * dimension, t, n=200)
        exact = thermodynamics(double_well, [(-12.0, 12.0)] * dimension, t)
        numbers = re.findall(r"-?\d+\.\d+", fig.get_suptitle())
        assert float(numbers[0]) == pytest.approx(exact.mean_energy, abs=2e-3)
        assert float(numbers[1]) == pytest.approx(exact.entropy, abs=2e-3)


def test_figures_are_pure() -> None:
    state = torch.get_rng_state()
    for draw in (
        lambda: temperature_figure(double_well, WELL, 0.5),
        lambda: langevin_figure(double_well, 0.02, temperature=0.5, n_steps=20, bounds=WELL, n_chains=16),
    ):
        assert to_png(draw()) == to_png(draw())
    assert torch.equal(state, torch.get_rng_state())
    one, other = (langevin_figure(double_well, 0.02, n_steps=20, seed=seed, n_chains=16) for seed in (0, 1))
    assert to_png(one) != to_png(other)


def test_figures_show_themselves_in_a_notebook() -> None:
    fig = temperature_figure(double_well, WELL)
    assert isinstance(fig, Figure) and fig._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_networks_of_any_kind_can_be_drawn(device: torch.device) -> None:
    class Bowl(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.k * (x**2).sum(1)

    net = Bowl().to(device)
    to_png(temperature_figure(net, WELL))
    to_png(langevin_figure(net, 0.05, n_steps=5, n_chains=8))
    assert net.k.grad is None and net.k.requires_grad


def lines_of(fig: Figure) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in fig.axes[1].lines}


def test_langevin_figure_compares_chains_with_the_exact_mean() -> None:
    """⟨E⟩ = T for a spring in the plane; the mean over 4,000 chains is within 5 standard errors of it."""
    fig = langevin_figure(quadratic, 0.02, temperature=0.5, n_steps=400, n_chains=4000, bounds=[(-4, 4), (-4, 4)])
    lines = lines_of(fig)
    assert lines["exact mean at $T$"][0] == pytest.approx(0.5, abs=1e-3)
    biased = 0.5 / (1 - 0.02 / 2)  # the chain's own law at this step size
    chains = next(values for label, values in lines.items() if "4000 chains" in label)
    assert abs(chains[-1] - biased) < 5 * 0.5 / math.sqrt(4000)
    assert "$T$ = 0.5" in fig.get_suptitle()


def test_langevin_figure_at_zero_temperature_descends() -> None:
    fig = langevin_figure(quadratic, 0.1, noise_scale=0.0, n_steps=100, n_chains=8)
    lines = lines_of(fig)
    assert lines["exact mean at $T$"][0] < 1e-2
    assert next(values for label, values in lines.items() if "8 chains" in label)[-1] < 1e-3


def test_chains_that_overflow_are_reported_in_the_picture() -> None:
    fig = langevin_figure(double_well, 1.0, n_steps=100, n_chains=8)
    said = " ".join(text.get_text() for text in fig.axes[1].texts).replace("\n", " ")
    assert "step" in said and "step_size" in said
    to_png(fig)


def test_impossible_places_are_drawn() -> None:
    def wall(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, 0].abs() > 2, torch.inf, (x**2).sum(1))

    to_png(temperature_figure(wall, WELL))
    to_png(langevin_figure(wall, 0.01, n_steps=5, n_chains=8, bounds=[(-1, 1), (-1, 1)]))


# Sliders


def test_moving_the_temperature_changes_the_picture() -> None:
    explorer = temperature_widget(double_well, [(-3, 3)], temperature=1.0)
    slider = explorer.sliders["temperature"]
    first = explorer.image.value
    assert first == to_png(temperature_figure(double_well, [(-3, 3)], 1.0))
    slider.value = 2.0
    assert explorer.image.value == to_png(temperature_figure(double_well, [(-3, 3)], 2.0)) != first
    slider.value = 1.0
    assert explorer.image.value == first
    slider.value = 1e9
    assert slider.value == pytest.approx(10.0), "the slider keeps its range"


def test_moving_step_size_or_noise_changes_the_picture() -> None:
    explorer = langevin_widget(double_well, step_size=0.02, noise_scale=0.1, n_steps=10, bounds=WELL)
    pictures = {explorer.image.value}
    explorer.sliders["step_size"].value = 0.05
    pictures.add(explorer.image.value)
    explorer.sliders["noise_scale"].value = 0.5
    pictures.add(explorer.image.value)
    assert len(pictures) == 3
    explorer.sliders["step_size"].value = 10.0  # beyond the stability limit: the widget goes on
    assert explorer.image.value not in pictures


def test_explorer_shows_a_still_where_there_is_no_kernel() -> None:
    import ipywidgets

    calls: list[float] = []

    def draw(phase: float) -> Figure:
        calls.append(phase)
        fig = Figure(figsize=(1, 1))
        fig.add_subplot().plot([0, phase])
        return fig

    explorer = Explorer(draw, {"phase": ipywidgets.FloatSlider(1.0, min=0, max=2)})
    explorer.sliders["phase"].value = 2.0
    bundle = explorer._repr_mimebundle_()
    assert calls == [1.0, 2.0]
    assert base64.b64decode(bundle["image/png"]) == explorer.image.value == to_png(draw(2.0))
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == repr(explorer) == "Explorer(phase=2)"


def test_import_does_not_load_ipywidgets() -> None:
    code = "import sys, ebm_lit.widgets; print('ipywidgets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Report


def test_run_report_is_one_line_with_versions_and_time() -> None:
    import time

    line = run_report(time.perf_counter() - 12.3)
    assert "\n" not in line and line.endswith("12.3 s")
    assert f"Python {sys.version.split()[0]}" in line and f"PyTorch {torch.__version__}" in line and "thread" in line
