"""Write a trained network and its card into the package: what `--ship` of the other scripts calls."""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ebm_lit import __version__
from ebm_lit.training import hash_data, write_atomically

WEIGHTS = Path(__file__).resolve().parent.parent / "ebm_lit" / "weights"

SOURCES = {
    "digits": {
        "name": "Optical Recognition of Handwritten Digits (test set), as scikit-learn's load_digits holds it",
        "authors": "E. Alpaydin and C. Kaynak, 1998; UCI Machine Learning Repository",
        "licence": "CC BY 4.0",
    },
    "mnist": {
        "name": "MNIST, training images",
        "authors": "Y. LeCun, C. Cortes and C. J. C. Burges, 1998, from data of NIST",
        "licence": "CC BY-SA 3.0",
    },
}


def about(data: str, x: Tensor) -> dict[str, Any]:
    """The entries of a card that say what a network saw, and where it was trained."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "ebm_lit": __version__}
    machine = {"device": "cpu", "threads": torch.get_num_threads(), **versions}
    return {"data": {**SOURCES[data], "examples": len(x), "hash": hash_data(x)}, "machine": machine}


def ship(name: str, network: nn.Module, card: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Write `ebm_lit/weights/NAME.safetensors` and the card that pins it."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    content = save(tensors)
    WEIGHTS.mkdir(exist_ok=True)
    write_atomically(WEIGHTS / f"{name}.safetensors", content)
    card = {"name": name, **card, "metrics": metrics, "sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(WEIGHTS / f"{name}.json", json.dumps(card, indent=1, ensure_ascii=False).encode() + b"\n")
    print(f"{WEIGHTS / name}.safetensors: {len(content)} bytes")
