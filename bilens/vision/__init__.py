"""Bilinear image classifiers: train them, load them, read what they compute from their weights."""

from bilens.vision.config import ClassifierConfig
from bilens.vision.data import ImageDataset, load_images
from bilens.vision.loading import load_classifier, save_classifier
from bilens.vision.model import BilinearClassifier, class_layer, class_matrices, with_one
from bilens.vision.training import ImageTrainConfig, TrainedClassifier, train_classifier

__all__ = [
    "BilinearClassifier",
    "ClassifierConfig",
    "ImageDataset",
    "ImageTrainConfig",
    "TrainedClassifier",
    "class_layer",
    "class_matrices",
    "load_classifier",
    "load_images",
    "save_classifier",
    "train_classifier",
    "with_one",
]
