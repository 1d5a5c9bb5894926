"""Energy-based models: energies, Langevin sampling, contrastive divergence, training, evaluation, from the chapters."""

from ebm_lit.contrastive_divergence import ReplayBuffer, cd_loss
from ebm_lit.data import digits, mnist, toy
from ebm_lit.energy import EnergyCNN, EnergyMLP, energy_and_grad, score
from ebm_lit.evaluation import GaussianBase, UniformBase, ais, log_likelihood
from ebm_lit.langevin import Langevin, uniform_init
from ebm_lit.training import TrainConfig, generate, load_checkpoint, save_checkpoint, train

__version__ = "0.1.0"

__all__ = [
    "EnergyCNN",
    "EnergyMLP",
    "GaussianBase",
    "Langevin",
    "ReplayBuffer",
    "TrainConfig",
    "UniformBase",
    "ais",
    "cd_loss",
    "digits",
    "energy_and_grad",
    "generate",
    "load_checkpoint",
    "log_likelihood",
    "mnist",
    "save_checkpoint",
    "score",
    "toy",
    "train",
    "uniform_init",
]
