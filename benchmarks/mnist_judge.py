"""Train the judge of digits: the classifier whose features and confidence measure samples of MNIST.

    python benchmarks/mnist_judge.py            a minute on one core; prints the test accuracy
    python benchmarks/mnist_judge.py --ship     and writes ebm_lit/weights/mnist_judge.*

It sees the first 50,000 training images, shifted by up to two pixels and with a little noise: samples of an
energy-based model carry the noise of their last step, and a judge that has never met noise would hold that against
them. The other 10,000 training images and the test set stay unseen.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from shipping import about, ship
from torch import Tensor

from ebm_lit.data import mnist
from ebm_lit.energy import count_parameters
from ebm_lit.pretrained import DigitClassifier

N_SEEN = 50_000  # training images that the judge sees


def fit(x: Tensor, labels: Tensor, epochs: int = 14, batch: int = 128, rate: float = 3e-3, seed: int = 0):
    """AdamW with a one-cycle schedule; every batch is moved by its own shift and gets noise of its own strength."""
    g = torch.Generator().manual_seed(seed)
    judge, per_epoch = DigitClassifier(g).to(memory_format=torch.channels_last), len(x) // batch
    optimizer = torch.optim.AdamW(judge.parameters(), lr=rate, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * per_epoch, pct_start=0.15)
    framed = F.pad(x, (2, 2, 2, 2), value=-1.0)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=g)[: per_epoch * batch].split(batch):
            top, left = torch.randint(0, 5, (2,), generator=g).tolist()
            some = framed[index, :, top : top + x.shape[2], left : left + x.shape[3]]
            some = some + 0.1 * torch.rand((), generator=g) * torch.randn(some.shape, generator=g)
            loss = F.cross_entropy(judge(some), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.to(memory_format=torch.contiguous_format).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ship", action="store_true", help="write the weights and their card into the package")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same bits on any number of cores
    (x, labels), (x_test, y_test) = mnist("train"), mnist("test")
    began = time.perf_counter()
    judge = fit(x[:N_SEEN], labels[:N_SEEN])
    seconds = time.perf_counter() - began
    found = {}
    for name, images, truth in (("test", x_test, y_test), ("unseen training", x[N_SEEN:], labels[N_SEEN:])):
        with torch.no_grad():
            p = torch.cat([judge(part).softmax(1) for part in images.split(1000)])
        found[f"{name} accuracy"] = round(float((p.argmax(1) == truth).float().mean()), 4)
        found[f"{name} images with confidence >= 0.9"] = round(float((p.max(1).values >= 0.9).float().mean()), 4)
    print(f"{seconds:.0f} s", found)
    if args.ship:
        network = {"class": "DigitClassifier", "shape": [1, 28, 28], "parameters": count_parameters(judge)}
        command = "python benchmarks/mnist_judge.py --ship"
        ship(
            "mnist_judge",
            judge,
            {"network": network, "seed": 0, "command": command, **about("mnist", x[:N_SEEN])},
            found,
        )


if __name__ == "__main__":
    main()
