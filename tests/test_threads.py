"""PyTorch's threads work alone: those of NumPy's BLAS wait actively after each call, on the cores of others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ebm_lit

# What is asked for in chapters and widgets a thousand times over. The first time may prepare something, and is free.
CODE = """
import os
import time


def threads():
    return set(os.listdir("/proc/self/task"))


def ticks(tasks):
    "Time on a core that these threads had so far, in ticks of the clock."
    total = 0
    for task in tasks:
        with open(f"/proc/self/task/{task}/stat") as stat:
            total += sum(map(int, stat.read().rsplit(")", 1)[1].split()[11:13]))
    return total


before = threads()
import numpy as np

blas = threads() - before
import torch
from ebm_lit import EnergyMLP, Langevin, TrainConfig, toy, train
from ebm_lit.data import TOYS
from ebm_lit.langevin import MALA

EXTRA


def everything(seed):
    g = torch.Generator().manual_seed(seed)
    x, net = torch.randn(64, 2, generator=g), EnergyMLP(generator=g)
    for _ in range(30):
        Langevin(0.1, 2).sample(net, x, generator=g)
        MALA(0.1, 2).sample(net, x, generator=g)
        for name in set(TOYS) - {"checkerboard"}:  # whose energy is infinite outside
            Langevin(0.001, 2).sample(toy(name).energy, x, generator=g)
        extra()
    config = TrainConfig(n_iterations=20, bounds=None, init_range=(-4.0, 4.0), step_size=0.1)
    train(x.repeat(4, 1), config, progress=False)


everything(0)
time.sleep(0.5)
started = ticks(blas)
everything(1)
print(len(blas), ticks(blas) - started)
"""


def worked(extra: str) -> tuple[int, int]:
    """How many threads NumPy has, and how many ticks they had while chains ran."""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    code = CODE.replace("EXTRA", f"def extra():\n    {extra}")
    root = Path(ebm_lit.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True)
    n, t = map(int, done.stdout.split())
    return n, t


@pytest.mark.skipif(sys.platform != "linux", reason="reads the times of threads from /proc")
def test_numpys_threads_sleep_while_chains_run():
    n, noticed = worked("np.linalg.norm(np.ones(20_000))")
    if n == 0 or noticed == 0:
        pytest.skip("this NumPy has no threads that would wait actively")
    assert worked("pass") == (n, 0)
