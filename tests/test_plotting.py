"""Pictures: they land on the axes they were given, show what they were given, and change nothing else."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ebm_lit import plotting
from ebm_lit.plotting import (
    COLORS,
    filmstrip,
    histogram,
    history,
    image_grid,
    landscape,
    scatter,
    tidy,
    to_png,
    trace,
    trajectories,
)

BOX = [(-4.0, 4.0), (-2.0, 2.0)]


def bowl(x: Tensor) -> Tensor:
    return ((x - torch.tensor([2.0, -1.0]).to(x)) ** 2).sum(1)


@pytest.fixture(autouse=True)
def no_side_effects(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is shown, no global setting changes, no figure survives."""

    def shown(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a library must not show figures")

    monkeypatch.setattr(plt, "show", shown)
    plt.switch_backend("agg")
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    plt.close("all")


def new_axes() -> Axes:
    return Figure(figsize=(4, 3)).add_subplot()


OVERLAYS: dict[str, Callable[..., Axes]] = {
    "landscape": lambda ax=None: landscape(bowl, BOX, n=20, ax=ax),
    "scatter": lambda ax=None: scatter(torch.randn(5, 2), ax=ax, label="points"),
    "trajectories": lambda ax=None: trajectories(torch.randn(6, 3, 2), ax=ax, label="paths"),
    "histogram": lambda ax=None: histogram(torch.randn(50), torch.exp, ax=ax),
    "trace": lambda ax=None: trace(torch.randn(9, 4), ax=ax, label="energy"),
    "history": lambda ax=None: history({"step": [0, 1], "gap": [1.0, 2.0]}, ax=ax),
    "tidy": lambda ax=None: tidy(ax, "title", "x", "y"),
}
PICTURES: dict[str, Callable[..., Axes]] = {
    "image_grid": lambda ax=None: image_grid(torch.zeros(5, 1, 4, 4), ax=ax),
    "filmstrip": lambda ax=None: filmstrip(torch.zeros(3, 2, 1, 4, 4), labels=range(3), ax=ax),
}


@pytest.mark.parametrize("draw", [*OVERLAYS.values(), *PICTURES.values()], ids=[*OVERLAYS, *PICTURES])
def test_draws_onto_the_axes_it_was_given_and_returns_them(draw: Callable[..., Axes]) -> None:
    ax = new_axes()
    assert draw(ax=ax) is ax
    assert plt.get_fignums() == []
    to_png(ax.figure)


@pytest.mark.parametrize("draw", OVERLAYS.values(), ids=list(OVERLAYS))
def test_draws_onto_the_current_axes_without(draw: Callable[..., Axes]) -> None:
    _, axes = plt.subplots(1, 2)
    plt.sca(axes[0])
    assert draw() is axes[0]


@pytest.mark.parametrize("draw", PICTURES.values(), ids=list(PICTURES))
def test_images_make_a_figure_of_their_own(draw: Callable[..., Axes]) -> None:
    fig, _ = plt.subplots()
    assert draw().figure is not fig and len(plt.get_fignums()) == 2


def test_tensors_of_every_kind_are_drawn_and_not_changed(device: torch.device) -> None:
    x = torch.randn(5, 2, dtype=torch.float64, device=device, requires_grad=True)
    before = x.detach().clone()
    scatter(x, new_axes())
    histogram(x[:, 0], ax=new_axes())
    images = torch.randn(4, 3, 5, 5, device=device, dtype=torch.bfloat16)
    copy = images.clone()
    image_grid(images, ax=new_axes())
    image_grid(images.float().cpu().numpy(), ax=new_axes())
    assert torch.equal(x.detach(), before) and torch.equal(images, copy) and x.grad is None


def test_networks_get_points_of_their_dtype_and_device(device: torch.device) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == self.scale.dtype and x.device == self.scale.device
            assert not torch.is_grad_enabled()
            return self.scale * (x**2).sum(1)

    net = Net().to(device)
    landscape(net, BOX, n=10, ax=new_axes())
    assert net.scale.grad is None and net.training


# Images


def test_mosaic_by_hand() -> None:
    grey = np.array([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
    g = 0.8
    assert plotting._mosaic(grey, 2)[..., 0].tolist() == [[g] * 5, [g, 0, g, 0.5, g], [g] * 5, [g, 1, g, g, g], [g] * 5]
    colour = np.array([1.0, -1.0, 0.0]).reshape(1, 3, 1, 1)
    assert plotting._mosaic(colour, 1)[1, 1].tolist() == [1, 0, 0.5]
    beyond = np.array([-7.0, 7.0]).reshape(2, 1, 1, 1)
    assert plotting._mosaic(beyond, 2)[1, [1, 3], 0].tolist() == [0, 1]
    infinite = np.array([-np.inf, np.inf]).reshape(2, 1, 1, 1)
    assert plotting._mosaic(infinite, 2)[1, [1, 3], 0].tolist() == [0, 1]


def test_nan_is_seen() -> None:
    for channels in (1, 3):
        image = np.zeros((1, channels, 2, 2))
        image[0, -1, 0, 1] = np.nan
        mosaic = plotting._mosaic(image, 1)
        assert np.allclose(mosaic[1, 2], to_rgb(COLORS["negatives"])) and np.allclose(mosaic[2, 2], 0.5)


@pytest.mark.parametrize(
    ("n", "n_cols", "rows", "cols"), [(1, None, 1, 1), (5, 3, 2, 3), (5, 9, 1, 9), (50, None, 5, 10)]
)
def test_grid_has_rows_and_columns(n: int, n_cols: int | None, rows: int, cols: int) -> None:
    picture = image_grid(torch.zeros(n, 1, 4, 6), n_cols=n_cols).get_images()[0].get_array()
    assert picture.shape == (rows * 5 + 1, cols * 7 + 1, 3)


def test_filmstrip_has_a_chain_a_row() -> None:
    frames = torch.arange(6).reshape(3, 2, 1, 1, 1) / 5 * 2 - 1  # frame f of chain b is 2 f + b
    ax = filmstrip(frames, labels=["a", "b", "c"], title="chains")
    shades = ax.get_images()[0].get_array()[1::2, 1::2, 0] * 5
    assert np.allclose(shades, [[0, 2, 4], [1, 3, 5]])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
    assert ax.get_title() == "chains"


# Landscapes


def test_landscape_is_the_right_way_round() -> None:
    for energy in (bowl, bowl(torch.cartesian_prod(*[torch.linspace(*b, 41) for b in BOX])).reshape(41, 41)):
        for kind, level in (("energy", 0), ("density", -1)):
            contours = landscape(energy, BOX, n=41, ax=new_axes(), kind=kind).collections[0]
            centre = np.asarray(contours.get_paths()[level].vertices).mean(0)
            assert np.allclose(centre, (2, -1), atol=0.1), (kind, centre)


def test_landscape_of_values_that_are_not_square() -> None:
    ax = landscape(np.zeros((7, 3)) + np.arange(7)[:, None], BOX, ax=new_axes())
    assert ax.get_xlim() == (-4, 4) and ax.get_ylim() == (-2, 2)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$x_0$", "$x_1$")


def test_energies_are_clipped_in_units_of_the_temperature() -> None:
    ax = landscape(bowl, BOX, n=30, ax=new_axes(), temperature=0.5)
    levels = ax.collections[0].levels
    assert levels[-1] - levels[0] == pytest.approx(5) and ax.collections[0].extend == "max"
    shallow = landscape(lambda x: bowl(x) / 100, BOX, n=30, ax=new_axes()).collections[0]
    assert shallow.levels[-1] < 1 and shallow.extend == "neither"


def test_density_is_normalised() -> None:
    """A Gaussian of variance T: the peak of its density is 1/(2πT), to the accuracy of the grid."""
    for temperature in (0.1, 0.3):
        ax = landscape(
            lambda x: (x**2).sum(1) / 2, [(-4, 4)] * 2, n=161, ax=new_axes(), kind="density", temperature=temperature
        )
        assert ax.collections[0].levels[-1] == pytest.approx(1 / (2 * np.pi * temperature), rel=1e-3)


def test_impossible_places_and_flat_landscapes() -> None:
    def wall(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 0, torch.inf, 0.0)

    for kind in ("energy", "density"):
        to_png(landscape(wall, BOX, n=20, ax=new_axes(), kind=kind).figure)
        to_png(landscape(lambda x: 0 * x[:, 0] + 3, BOX, n=20, ax=new_axes(), kind=kind).figure)


# One-dimensional pictures


def test_bars_have_the_area_of_the_samples_inside() -> None:
    samples = torch.cat([torch.linspace(-0.9, 0.9, 75), torch.full((25,), 50.0)])
    ax = histogram(samples, ax=new_axes(), bins=10, bounds=(-1, 1))
    assert ax.patches[0].get_data().values.sum() * 0.2 == pytest.approx(0.75)
    assert histogram(torch.ones(3), ax=new_axes(), bins=5).patches[0].get_data().values.sum() * 0.2 == pytest.approx(1)


def test_trace_shows_mean_and_band() -> None:
    values = torch.arange(11.0) + torch.tensor([[0.0], [100.0]])  # two records of eleven chains
    ax = trace(values, steps=[0, 10], ax=new_axes(), label="energy")
    assert np.allclose(ax.lines[0].get_xydata(), [[0, 5], [10, 105]])
    band = ax.collections[0].get_paths()[0].vertices
    assert {(float(a), float(b)) for a, b in band} == {(0.0, 1.0), (0.0, 9.0), (10.0, 101.0), (10.0, 109.0)}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "value")


def test_labels_that_are_there_stay() -> None:
    ax = new_axes()
    ax.set(xlabel="time", ylabel="energy")
    trace([1.0, 2.0], ax=ax)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time", "energy")


def test_history_draws_every_key_in_its_own_style() -> None:
    record = {"step": [0, 5], **{name: [i, i + 1] for i, name in enumerate("abcdef")}}
    ax = history(record, ax=new_axes())
    assert [line.get_label() for line in ax.lines] == list("abcdef")
    assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in ax.lines}) == 6
    assert all(line.get_xdata().tolist() == [0, 5] for line in ax.lines)
    assert len(history(record, keys=["b"], ax=new_axes()).lines) == 1
    assert history({"a": [1, 2, 3]}, ax=new_axes()).lines[0].get_xdata().tolist() == [0, 1, 2]


def test_trajectories_mark_start_and_end() -> None:
    paths = torch.randn(5, 3, 2)
    ax = trajectories(paths, ax=new_axes())
    assert len(ax.lines) == 5
    assert np.allclose(ax.lines[0].get_xydata(), paths[:, 0])
    assert np.allclose(ax.lines[3].get_xydata(), paths[0]) and np.allclose(ax.lines[4].get_xydata(), paths[-1])


# PNG


def test_png_of_a_figure() -> None:
    fig = landscape(bowl, BOX, n=30, ax=new_axes()).figure
    png = to_png(fig, dpi=50)
    assert png == to_png(fig, dpi=50)
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG" and picture.size == (200, 150)
    few = to_png(fig, dpi=50, colors=16)
    assert len(few) < len(png) and len(Image.open(io.BytesIO(few)).convert("RGB").getcolors()) <= 16


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 3)])
def test_png_of_an_array_is_exact(shape: tuple[int, ...]) -> None:
    array = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    for picture in (array, array / 255, torch.as_tensor(array)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(to_png(picture)))), array)


# Refusals


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: image_grid(torch.zeros(1, 8, 8)), r"images: expected an array of 4 axes, found shape \(1, 8, 8\)"),
        (lambda: image_grid(torch.zeros(0, 1, 8, 8)), "images: expected at least one value"),
        (lambda: image_grid(torch.zeros(3, 2, 8, 8)), "images: expected 1 or 3 channels"),
        (lambda: image_grid(torch.zeros(3, 1, 8, 8), n_cols=0), "n_cols: expected at least 1, found 0"),
        (lambda: filmstrip(torch.zeros(3, 1, 8, 8)), "frames: expected an array of 5 axes"),
        (lambda: filmstrip(torch.zeros(3, 1, 1, 8, 8), labels=["a"]), "labels: expected 3, one a frame, found 1"),
        (lambda: landscape(bowl, BOX, kind="entropy"), "kind: expected 'energy' or 'density', found 'entropy'"),
        (lambda: landscape(bowl, BOX, temperature=0), "temperature and clip: expected numbers > 0, found 0 and 10"),
        (lambda: landscape(bowl, BOX, clip=-1), "temperature and clip: .* -1"),
        (lambda: landscape(bowl, [(-1, 1)]), r"bounds: expected \(\(low, high\), \(low, high\)\)"),
        (lambda: landscape(bowl, [(1, -1), (0, 1)]), "bounds: expected"),
        (lambda: landscape(bowl, BOX, n=1), "n: expected at least 2 points, found 1"),
        (lambda: landscape(np.zeros((1, 5)), BOX), "energy: expected at least 2 values along each axis"),
        (lambda: landscape(lambda x: x, BOX), "energy: expected an array of 1 axis"),
        (lambda: landscape(lambda x: x[:3, 0], BOX), "energy: expected 10000 values, one a point, found 3"),
        (lambda: landscape(np.full((3, 3), np.nan), BOX), "energy: expected a finite minimum and no NaN"),
        (lambda: landscape(np.full((3, 3), np.inf), BOX), "energy: expected a finite minimum and no NaN"),
        (lambda: landscape(lambda x: -1 / (x[:, 0] * 0), BOX), "energy: expected a finite minimum and no NaN"),
        (lambda: scatter(torch.zeros(5, 3)), r"x: expected points \(B, 2\), found shape \(5, 3\)"),
        (lambda: scatter(torch.zeros(5)), "x: expected an array of 2 axes"),
        (lambda: trajectories(torch.zeros(5, 2)), "paths: expected an array of 3 axes"),
        (lambda: trajectories(torch.zeros(5, 4, 3)), r"paths: expected points \(F, B, 2\)"),
        (lambda: histogram(torch.zeros(5, 1)), "samples: expected an array of 1 axis"),
        (lambda: histogram([0.0, np.nan, np.inf]), "samples: expected finite values, found 2 that are not"),
        (lambda: trace([[[1.0]]]), "values: expected an array of 1 or 2 axes"),
        (lambda: trace([1.0, 2.0], steps=[1]), "steps: expected 2, one a record, found 1"),
        (lambda: to_png(np.zeros((2, 2, 4))), r"picture: .* found shape \(2, 2, 4\)"),
        (lambda: to_png(np.zeros((0, 2))), r"picture: .* found shape \(0, 2\)"),
        (lambda: to_png(np.full((2, 2), 2.0)), "picture: expected floats in .* found 2 to 2"),
        (lambda: to_png(np.full((2, 2), np.nan)), "picture: expected floats in .* found nan"),
        (lambda: to_png(np.zeros((2, 2), dtype=np.int64) + 7), "picture: expected floats in .* found 7 to 7"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert plt.get_fignums() == [], "no empty figure is left behind"


def test_history_names_what_there_is() -> None:
    with pytest.raises(KeyError, match="no 'loss' in the history; there is step, gap"):
        history({"step": [0], "gap": [1.0]}, keys=["loss"])
