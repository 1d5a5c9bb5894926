"""Fixtures that several test files share."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ledger import LEDGER

# The tests' problems are too small to share among cores: one thread is as fast on an idle machine and far faster on a
# busy one. Kernels and commands that tests start inherit the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent


SEED_STEP = 1_000_003  # seeds of one run differ by less than that


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed-offset",
        type=int,
        default=int(os.environ.get("EBM_LIT_SEED", "0")),
        help="0: the fixed seeds of every day; 1, 2, …: fresh seeds in all tests of ledger.py (also EBM_LIT_SEED)",
    )


def pytest_configure(config: pytest.Config) -> None:
    line = "statistical(alpha): its verdict depends on drawn numbers; a correct library fails it with chance alpha"
    config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the ledger are marked `statistical`; those marked `cuda` are skipped where there is no such device."""
    for item in items:
        name = getattr(item, "originalname", item.name)
        if (alpha := LEDGER.get(item.path.name, {}).get(name)) is not None:
            item.add_marker(pytest.mark.statistical(alpha))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


class FreshGenerator(torch.Generator):
    """A generator whose every seed is moved on by `offset`."""

    offset = 0

    def manual_seed(self, seed: int) -> torch.Generator:
        return super().manual_seed(seed + self.offset)


@pytest.fixture(autouse=True)
def fresh_seeds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a seed offset every generator that a statistical test makes, however it makes it, is seeded afresh."""
    if "statistical" in request.keywords and (run := request.config.getoption("--seed-offset")):
        monkeypatch.setattr(FreshGenerator, "offset", run * SEED_STEP)
        monkeypatch.setattr(torch, "Generator", FreshGenerator)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the test is to run on."""
    return torch.device(request.param)


@pytest.fixture
def make_generator() -> Callable[..., torch.Generator]:
    """A factory of generators: `make_generator(7)` or `make_generator(7, device)`."""

    def make(seed: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
        return torch.Generator(device=device).manual_seed(seed)

    return make


@pytest.fixture(scope="module")
def root() -> Path:
    """The top folder of the checkout."""
    return ROOT


@pytest.fixture(scope="module")
def copy_tree() -> Callable[[Path], Path]:
    """A function that copies what git tracks, and what it would track, to a new folder."""

    def copy(target: Path) -> Path:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if listed.returncode != 0:
            pytest.skip("needs a git checkout")
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name)
        return target

    return copy


@pytest.fixture
def tree(copy_tree: Callable[[Path], Path], tmp_path: Path) -> Path:
    """A copy of the checkout that a test may change."""
    return copy_tree(tmp_path / "tree")
