"""Training: language models, their texts, and gated models made bilinear."""

from bilens.train.annealing import AnnealConfig, AnnealingResult, anneal
from bilens.train.data import load_texts
from bilens.train.language_model import TrainConfig, TrainingResult, Validation, train_lm

__all__ = [
    "AnnealConfig",
    "AnnealingResult",
    "TrainConfig",
    "TrainingResult",
    "Validation",
    "anneal",
    "load_texts",
    "train_lm",
]
