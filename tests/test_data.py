"""Toys agree with their densities, loaders with their files, and what is wrong is said in one line."""

import gzip
import hashlib
import http.server
import math
import pickle
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from ebm_lit import data
from ebm_lit.data import (
    TOYS,
    DataNotFoundError,
    Toy,
    as_image_tensor,
    check_images,
    data_root,
    digits,
    fashion_mnist,
    image_folder,
    kmnist,
    mnist,
    read_image,
    toy,
)

SMOOTH = [name for name in TOYS if name != "checkerboard"]
FAMILY = {"MNIST": mnist, "FashionMNIST": fashion_mnist, "KMNIST": kmnist}


def midpoints(n: int) -> tuple[Tensor, float]:
    """The n × n midpoints of [−4, 4]² and the area of a cell."""
    axis = -4 + 8 / n * (torch.arange(n, dtype=torch.float64) + 0.5)
    return torch.cartesian_prod(axis, axis), (8 / n) ** 2


def p_value(t: Toy, x: Tensor, cells: int = 40, fine: int = 10) -> float:
    """Pearson's chi-square test of samples against the density, cells that expect fewer than five pooled."""
    points, area = midpoints(cells * fine)
    p = (t.log_prob(points).exp() * area).reshape(cells, fine, cells, fine).sum((1, 3)).flatten()
    column, row = ((x.double() + 4) / 8 * cells).long().clamp(0, cells - 1).unbind(1)
    counts = torch.bincount(column * cells + row, minlength=cells**2).double()
    common = p * len(x) >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([p[common] * len(x), (len(x) - (p[common] * len(x)).sum())[None]]).clamp_min(1e-9)
    return float(stats.chi2.sf(((observed - expected) ** 2 / expected).sum().item(), len(observed) - 1))


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text, text
    return text


# Toys


def test_toys_are_those_of_the_book() -> None:
    assert TOYS == ("mixture", "mixture25", "moons", "rings", "checkerboard")
    assert all(toy(name).name == name and toy(name) is toy(name) for name in TOYS)


@pytest.mark.parametrize("name", TOYS)
def test_density_integrates_to_one(name: str) -> None:
    """All mass but 1e-6 lies in the box, and the midpoint sum finds it."""
    points, area = midpoints(400)
    assert toy(name).log_prob(points).exp().sum().item() * area == pytest.approx(1, abs=1e-6)
    assert toy(name).bounds == ((-4.0, 4.0), (-4.0, 4.0))


@pytest.mark.parametrize("name", TOYS)
def test_samples_follow_the_density(name: str, make_generator: Callable[..., torch.Generator]) -> None:
    """False alarm: 1e-6 a toy, over seeds. The same test rejects samples that are stretched by 3 %."""
    x = toy(name).sample(100_000, make_generator(11))
    assert p_value(toy(name), x) > 1e-6
    assert p_value(toy(name), 1.03 * x) < 1e-6


@pytest.mark.parametrize("name", SMOOTH)
def test_entropy_by_samples_and_by_grid(name: str, make_generator: Callable[..., torch.Generator]) -> None:
    """Five standard errors: a false alarm in two million seeds."""
    points, area = midpoints(400)
    log_p = toy(name).log_prob(points)
    entropy = -(log_p.exp() * log_p).sum().item() * area
    surprise = toy(name).energy(toy(name).sample(50_000, make_generator(5)).double())
    assert abs(surprise.mean().item() - entropy) < 5 * surprise.std().item() / math.sqrt(len(surprise))


@pytest.mark.parametrize("name", SMOOTH)
def test_log_prob_is_differentiable(name: str, make_generator: Callable[..., torch.Generator]) -> None:
    x = toy(name).sample(5, make_generator(1)).double().requires_grad_()
    assert torch.autograd.gradcheck(toy(name).log_prob, (x,))
    assert torch.equal(toy(name).energy(x), -toy(name).log_prob(x))


@pytest.mark.parametrize("name", TOYS)
def test_points_and_dtypes(name: str, device: torch.device, make_generator: Callable[..., torch.Generator]) -> None:
    x = toy(name).sample(7, make_generator(3, device))
    assert x.shape == (7, 2) and x.dtype == torch.float32 and x.device.type == device.type
    assert torch.equal(x, toy(name).sample(7, make_generator(3, device)))
    assert torch.equal(x.cpu(), toy(name).sample(7, make_generator(3, device), device="cpu"))
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-12)):
        log_p = toy(name).log_prob(x.to(dtype))
        assert log_p.shape == (7,) and log_p.dtype == dtype and log_p.device.type == device.type
        torch.testing.assert_close(log_p.double().cpu(), toy(name).log_prob(x.double().cpu()), atol=tolerance, rtol=0)
    assert toy(name).sample(0).shape == (0, 2)
    assert toy(name).log_prob(torch.zeros(0, 2)).shape == (0,)


def test_sampling_leaves_the_global_generator_alone(make_generator: Callable[..., torch.Generator]) -> None:
    before = torch.get_rng_state()
    for name in TOYS:
        toy(name).sample(10, make_generator())
    assert torch.equal(before, torch.get_rng_state())


def test_moons_quadrature_has_converged() -> None:
    points, _ = midpoints(100)
    fine = data._log_moons(points, 2.0, 0.2, nodes=500)
    assert (toy("moons").log_prob(points) - fine).abs().max() < 1e-9


def test_rings_are_finite_at_the_origin() -> None:
    x = torch.zeros(1, 2, requires_grad=True)
    toy("rings").log_prob(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_rings_radius_has_the_stated_law(make_generator: Callable[..., torch.Generator]) -> None:
    """Kolmogorov-Smirnov against the exact law of the radius; false alarm 1e-6."""
    radius = toy("rings").sample(50_000, make_generator(8)).double().norm(dim=1).numpy()
    law = [(w, stats.norm(r, 0.12)) for w, r in ((1 / 6, 1), (2 / 6, 2), (3 / 6, 3))]
    assert stats.kstest(radius, lambda r: sum(w * ring.cdf(r) for w, ring in law)).pvalue > 1e-6


def test_checkerboard_is_uniform_on_half_of_the_board(make_generator: Callable[..., torch.Generator]) -> None:
    board = toy("checkerboard")
    assert (board.log_prob(board.sample(1_000_000, make_generator(9))) == -torch.tensor(32.0).log()).all()
    centres = torch.cartesian_prod(*[torch.tensor([-5.0, -3.0, -1.0, 1.0, 3.0, 5.0])] * 2)
    dark = board.log_prob(centres).isfinite().reshape(6, 6)
    assert dark.sum() == 8 and not dark[0].any() and not dark[:, -1].any()
    assert dark[1, 1] and not dark[1, 2]


def test_toys_can_be_pickled_and_not_changed(make_generator: Callable[..., torch.Generator]) -> None:
    again = pickle.loads(pickle.dumps(toy("moons")))
    assert torch.equal(again.sample(3, make_generator()), toy("moons").sample(3, make_generator()))
    with pytest.raises(AttributeError):
        toy("moons").name = "suns"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: toy("spiral"), "name: expected one of mixture, .* found 'spiral'"),
        (lambda: toy("moons").sample(-1), "n: .*found -1"),
        (lambda: toy("moons").log_prob(torch.zeros(5)), r"x: .*\(B, 2\).*\(5,\)"),
        (lambda: toy("moons").log_prob(torch.zeros(5, 3)), r"x: .*\(5, 3\)"),
        (lambda: toy("moons").log_prob(torch.zeros(5, 2, dtype=torch.int64)), "x: .*int64"),
        (lambda: toy("moons").log_prob([[0.0, 0.0]]), "x: .*list"),
    ],
)
def test_toys_refuse_in_one_line(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        call()
    one_line(caught.value)


# Images


def test_check_images_returns_what_it_was_given(device: torch.device) -> None:
    x = torch.rand(2, 3, 4, 5, device=device) * 2 - 1
    assert check_images(x) is x
    assert check_images(x.double()).dtype == torch.float64
    check_images(x * 0 + 1 + 5e-7)  # rounding is forgiven


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(2, 8, 8), r"\(2, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.zeros(0, 1, 8, 8), r"no pixels.*\(0, 1, 8, 8\)"),
        (torch.tensor([0.0, math.nan, math.inf, 1.0]).reshape(1, 1, 2, 2), "2 values that are NaN or infinite"),
        (torch.full((1, 1, 2, 2), 255.0), "from 255 to 255"),
        (torch.full((1, 1, 2, 2), -1.01), "from -1.01"),
        (np.zeros((1, 1, 2, 2), dtype=np.float32), "ndarray"),
        ("images", "str 'images'"),
        (None, "None"),
    ],
)
def test_check_images_says_what_it_found(x: Any, says: str) -> None:
    with pytest.raises(ValueError, match=rf"x_data: expected images \(N, C, H, W\).*found.*{says}") as caught:
        check_images(x, "x_data")
    one_line(caught.value)


def test_as_image_tensor_scales_bytes_and_moves_channels() -> None:
    grey = np.array([[[0, 255], [51, 204]]], dtype=np.uint8)
    expected = torch.tensor([[[[-1, 1], [-0.6, 0.6]]]])
    torch.testing.assert_close(as_image_tensor(grey), expected)
    torch.testing.assert_close(as_image_tensor(torch.as_tensor(grey)[:, None]), expected)
    colour = np.random.RandomState(0).randint(0, 256, (2, 5, 7, 3)).astype(np.uint8)
    x = as_image_tensor(colour)
    assert x.shape == (2, 3, 5, 7) and x.is_contiguous() and x.dtype == torch.float32
    torch.testing.assert_close(((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1), torch.as_tensor(colour))
    assert as_image_tensor(colour[:, ::-1]).shape == (2, 3, 5, 7)  # negative strides
    already = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(as_image_tensor(already), already.float())


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8)),
        np.zeros((1, 8, 8), dtype=np.int32),
        np.full((1, 8, 8), 255.0),
        np.zeros((0, 8, 8)),
        "images",
        [[0.0]],
    ],
)
def test_as_image_tensor_does_not_guess(array: Any) -> None:
    with pytest.raises(ValueError, match="pictures: expected") as caught:
        as_image_tensor(array, "pictures")
    one_line(caught.value)


# Digits


def test_digits_are_split_once_and_for_all() -> None:
    (x, y), (x_test, y_test), (x_all, y_all) = digits(), digits("test"), digits("all")
    assert x.shape == (1297, 1, 8, 8) and x_test.shape == (500, 1, 8, 8) and x_all.shape == (1797, 1, 8, 8)
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and y.shape == (1297,)
    assert (check_images(x_all).min(), x_all.max()) == (-1, 1)
    assert ((x_all + 1) * 8 == ((x_all + 1) * 8).round()).all()
    assert (y_test.bincount() - y_all.bincount() * 500 / 1797).abs().max() <= 1
    assert torch.equal(torch.cat([y, y_test]).bincount(), y_all.bincount())
    rows = torch.cat([x, x_test]).flatten(1)
    assert torch.equal(rows[np.lexsort(rows.T.numpy())], x_all.flatten(1)[np.lexsort(x_all.flatten(1).T.numpy())])
    pixels = ((x_test + 1) * 8).to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(pixels).hexdigest()[:16] == "3df4fd345799d2bf"


def test_digits_refuse_another_split() -> None:
    with pytest.raises(ValueError, match=r"split: .*found 'validation'"):
        digits("validation")


# MNIST and its siblings


def write_idx(file: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    file.write_bytes(header + array.astype(np.uint8).tobytes())


def write_family(root: Path, name: str, n: int = 5) -> Path:
    """A tiny data set in torchvision's layout; the pixels of image i are all i."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, size in (("train", n), ("t10k", n - 2)):
        write_idx(raw / f"{part}-images-idx3-ubyte", np.arange(size)[:, None, None] * np.ones((1, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(size) % 10)
    return root


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every attempt to open an address fails at once and is noted."""
    asked: list[str] = []

    def refuse(request: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(getattr(request, "full_url", request))
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return asked


@pytest.mark.parametrize("name", FAMILY)
def test_family_is_read_through_torchvision(name: str, tmp_path: Path, no_network: list[str]) -> None:
    load = FAMILY[name]
    x, y = load("train", root=write_family(tmp_path, name))
    assert check_images(x).shape == (5, 1, 28, 28) and x.dtype == torch.float32
    torch.testing.assert_close(x[:, 0, 3, 4], torch.arange(5) / 127.5 - 1)
    assert torch.equal(y, torch.arange(5)) and y.dtype == torch.int64
    assert len(load("test", root=str(tmp_path))[0]) == 3
    assert no_network == []


def test_lookup_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument, then EBM_LIT_DATA, then the cache folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("EBM_LIT_DATA", raising=False)
    assert data_root() == tmp_path / ".cache" / "ebm_lit"
    monkeypatch.setenv("EBM_LIT_DATA", "")
    assert data_root() == tmp_path / ".cache" / "ebm_lit"
    monkeypatch.setenv("EBM_LIT_DATA", str(write_family(tmp_path / "a", "MNIST", n=4)))
    assert data_root() == tmp_path / "a" and len(mnist(download=False)[0]) == 4
    assert len(mnist(root=write_family(tmp_path / "b", "MNIST", n=6), download=False)[0]) == 6
    assert data_root("~/c") == tmp_path / "c"


@pytest.mark.parametrize("name", FAMILY)
def test_without_network_and_data(name: str, tmp_path: Path, no_network: list[str]) -> None:
    root = tmp_path / "nothing"
    for download in (False, True):
        with pytest.raises(DataNotFoundError, match=f"{name} is not in {root}") as caught:
            FAMILY[name](root=root, download=download)
        text = one_line(caught.value)
        assert "EBM_LIT_DATA" in text and f"{name}/raw" in text and "root=" in text
    assert no_network and isinstance(caught.value, FileNotFoundError)
    assert not root.exists(), "a failed look-up leaves nothing behind"


def test_download_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers, but what it sends is not the file."""
    from torchvision import datasets

    def broken(self: Any) -> None:
        raise RuntimeError("Error downloading train-images:\nTried somewhere, got:\nhash mismatch")

    monkeypatch.setattr(data, "_reachable", lambda urls: True)
    monkeypatch.setattr(datasets.MNIST, "download", broken)
    with pytest.raises(DataNotFoundError, match=r"could not be downloaded.*hash mismatch") as caught:
        mnist(root=tmp_path)
    one_line(caught.value)


def truncated(raw: Path) -> None:
    file = raw / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])


def foreign(raw: Path) -> None:
    (raw / "train-images-idx3-ubyte").write_bytes(b"not an idx file, but long enough to look like one")


def compressed(raw: Path) -> None:
    (raw / "train-labels-idx1-ubyte").write_bytes(gzip.compress(b"1234"))


def empty(raw: Path) -> None:
    (raw / "train-labels-idx1-ubyte").write_bytes(b"")


def short_of_labels(raw: Path) -> None:
    write_idx(raw / "train-labels-idx1-ubyte", np.arange(3))


@pytest.mark.parametrize("damage", [truncated, foreign, compressed, empty, short_of_labels], ids=lambda f: f.__name__)
def test_damaged_files_are_named(damage: Callable[[Path], None], tmp_path: Path, no_network: list[str]) -> None:
    damage(write_family(tmp_path, "MNIST") / "MNIST" / "raw")
    with pytest.raises(ValueError, match=f"MNIST in {tmp_path} is damaged") as caught:
        mnist(root=tmp_path)
    one_line(caught.value)
    assert len(mnist("test", root=tmp_path)[0]) == 3  # the other half is whole


@pytest.mark.parametrize("load", FAMILY.values())
def test_family_refuses_another_split(load: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', found 'all'"):
        load("all", root=tmp_path)


@pytest.fixture
def server() -> Iterator[str]:
    """A server on this machine that has nothing."""

    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    running = http.server.HTTPServer(("127.0.0.1", 0), Nothing)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/"
    running.shutdown()
    running.server_close()


def test_a_server_that_has_nothing_still_answers(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert data._reachable([server])
    assert data._reachable(["http://127.0.0.1:1/", "not an address", server])
    assert not data._reachable(["http://127.0.0.1:1/", "not an address"])
    assert not data._reachable([])


def test_mnist_where_it_is_at_hand() -> None:
    try:
        (x, y), (x_test, _) = mnist("train", download=False), mnist("test", download=False)
    except DataNotFoundError:
        pytest.skip("MNIST is not on this machine")
    assert x.shape == (60_000, 1, 28, 28) and x_test.shape == (10_000, 1, 28, 28)
    assert y[:5].tolist() == [5, 0, 4, 1, 9]
    assert x.mean().item() == pytest.approx(2 * 0.1307 - 1, abs=1e-3)  # the well-known mean


# A folder of images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with 3, 1 and 2 images of 6×4 pixels; the grey level is 100 · class + number."""
    for label, (name, count) in enumerate((("ant", 3), ("bee", 1), ("cat", 2))):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (6, 4), 100 * label + i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def levels(x: Tensor) -> list[int]:
    return ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_folder_with_classes(folder: Path) -> None:
    x, y, classes = image_folder(folder)
    assert check_images(x).shape == (6, 1, 4, 6) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert classes == ["ant", "bee", "cat"] and y.tolist() == [0, 0, 0, 1, 2, 2]
    assert levels(x) == [0, 1, 2, 100, 200, 201]


def test_folder_without_classes(folder: Path) -> None:
    x, y, classes = image_folder(str(folder / "ant"))
    assert levels(x) == [0, 1, 2] and y.tolist() == [0, 0, 0] and classes == ["ant"]


def test_limit_takes_from_the_classes_by_turns(folder: Path) -> None:
    for limit, expected in ((1, [0]), (3, [0, 100, 200]), (4, [0, 1, 100, 200]), (99, [0, 1, 2, 100, 200, 201])):
        x, y, classes = image_folder(folder, limit=limit)
        assert levels(x) == expected and len(y) == len(expected) and len(classes) == 3


def test_hidden_files_are_passed_over(folder: Path) -> None:
    (folder / ".DS_Store").write_text("noise")
    (folder / "ant" / ".thumbs").mkdir()
    (folder / "ant" / ".thumbs" / "x.txt").write_text("noise")
    (folder / ".cache").mkdir()
    assert len(image_folder(folder)[0]) == 6


def test_folders_inside_a_class_belong_to_it(folder: Path) -> None:
    (folder / "bee" / "more").mkdir()
    Image.new("L", (6, 4), 107).save(folder / "bee" / "more" / "z.png")
    x, y, _ = image_folder(folder)
    assert y.bincount().tolist() == [3, 2, 2] and 107 in levels(x)


def test_shape_converts_crops_and_scales(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = (255, 0, 0)  # red in the middle, black on both sides
    Image.fromarray(wide).save(tmp_path / "a.png")
    x, _, _ = image_folder(tmp_path, shape=(3, 5, 5))
    assert x.shape == (1, 3, 5, 5)
    assert (x[0, 0, :, 1:4] > 0.99).all() and (x[0, 0] > 0.5).all() and (x[0, 1:] < -0.99).all()  # the red middle
    grey, _, _ = image_folder(tmp_path, shape=(1, 5, 5))
    assert grey.shape == (1, 1, 5, 5) and ((grey[0, 0, 2, 2] + 1) * 127.5).round() == 76  # 0.299 · 255 (ITU-R 601)
    assert image_folder(tmp_path)[0].shape == (1, 3, 10, 30)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 3), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (image_folder(tmp_path)[0] == 1).all()
    Image.new("LA", (3, 3), (0, 0)).save(tmp_path / "b.png")
    assert (image_folder(tmp_path, shape=(1, 3, 3))[0] == 1).all()


def test_deep_grey_and_rotated_photographs(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((2, 2), 65535, dtype=np.uint16)).save(tmp_path / "deep" / "a.png")
    assert (image_folder(tmp_path / "deep", shape=(1, 2, 2))[0] == 1).all()
    assert image_folder(tmp_path / "deep")[0].shape == (1, 1, 2, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    (tmp_path / "photo").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "photo" / "a.jpg", exif=exif)
    assert image_folder(tmp_path / "photo")[0].shape == (1, 3, 6, 4)


def test_a_single_picture(folder: Path) -> None:
    x = read_image(folder / "cat" / "1.png")
    assert x.shape == (1, 4, 6) and x.dtype == torch.float32
    torch.testing.assert_close(x, image_folder(folder / "cat")[0][1])
    assert read_image(str(folder / "cat" / "1.png"), shape=(3, 8, 8)).shape == (3, 8, 8)
    for path, says in (
        (folder / "cat" / "9.png", "9.png"),
        (folder / "cat", "cat"),
        (folder / "cat" / "1.png", "shape"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            read_image(path, shape=(2, 8, 8) if says == "shape" else None)
        one_line(caught.value)


def empty_file(folder: Path) -> None:
    (folder / "bee" / "broken.png").write_bytes(b"")


def text_file(folder: Path) -> None:
    (folder / "bee" / "broken.png").write_text("this is no picture")


def cut_off(folder: Path) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (40, 40)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "bee" / "broken.png")
    whole = (folder / "bee" / "broken.png").read_bytes()
    (folder / "bee" / "broken.png").write_bytes(whole[: len(whole) // 2])


def floats(folder: Path) -> None:
    Image.fromarray(np.ones((4, 6), dtype=np.float32)).save(folder / "bee" / "broken.png", format="TIFF")


def other_size(folder: Path) -> None:
    Image.new("L", (7, 4)).save(folder / "bee" / "broken.png")


def other_channels(folder: Path) -> None:
    Image.new("RGB", (6, 4)).save(folder / "bee" / "broken.png")


DAMAGES = {
    empty_file: "it is empty",
    text_file: "cannot identify",
    cut_off: "truncated",
    floats: "mode F",
    other_size: r"\(1, 4, 7\)",
    other_channels: r"\(3, 4, 6\)",
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.items(), ids=[f.__name__ for f in DAMAGES])
def test_a_file_that_does_not_fit_is_named(damage: Callable[[Path], None], says: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=f"broken.png.*{says}") as caught:
        image_folder(folder)
    one_line(caught.value)


def test_folders_that_hold_no_images(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataNotFoundError, match="missing is not there"):
        image_folder(tmp_path / "missing")
    with pytest.raises(DataNotFoundError, match=r"0\.png is a file"):
        image_folder(folder / "ant" / "0.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataNotFoundError, match=r"no image in .*dog"):
        image_folder(tmp_path / "dog")
    with pytest.raises(DataNotFoundError, match=r"no image in .*dog"):
        image_folder(folder)
    (tmp_path / "dog").rmdir()
    Image.new("L", (6, 4)).save(folder / "loose.png")
    with pytest.raises(ValueError, match=r"mixes class folders and loose files \(loose.png\)"):
        image_folder(folder)


@pytest.mark.parametrize("shape", [(8, 8), (2, 8, 8), (1, 0, 8), (1, 8, 8, 8)])
def test_folder_refuses_shapes(shape: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="shape: expected"):
        image_folder(folder, shape=shape)
    with pytest.raises(ValueError, match="limit: expected at least 1, found 0"):
        image_folder(folder, limit=0)
