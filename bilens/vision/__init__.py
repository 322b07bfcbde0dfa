"""Bilinear image classifiers: train them, load them, read what they compute from their weights."""

from bilens.vision.config import ClassifierConfig
from bilens.vision.data import ImageDataset, load_images
from bilens.vision.explanation import Explanation, explain
from bilens.vision.from_the_top import TopDown, top_down
from bilens.vision.masks import Mask, MaskStudy, adversarial_mask, mask_study, pseudo_inverse_masks
from bilens.vision.model import BilinearClassifier, class_layer, class_matrices, with_one
from bilens.vision.regularisation import RegularisationStudy, regularisation_study
from bilens.vision.similarity import FeatureSimilarity, feature_similarity
from bilens.vision.spectral import Eigenfeatures, class_difference, eigenfeatures
from bilens.vision.structure import ClassHOSVD, SharedNeurons, class_hosvd, shared_neurons
from bilens.vision.training import ImageTrainConfig, TrainedClassifier, train_classifier
from bilens.vision.truncated import Truncation, truncation

__all__ = [
    "BilinearClassifier",
    "ClassHOSVD",
    "ClassifierConfig",
    "Eigenfeatures",
    "Explanation",
    "FeatureSimilarity",
    "ImageDataset",
    "ImageTrainConfig",
    "Mask",
    "MaskStudy",
    "RegularisationStudy",
    "SharedNeurons",
    "TopDown",
    "TrainedClassifier",
    "Truncation",
    "adversarial_mask",
    "class_difference",
    "class_hosvd",
    "class_layer",
    "class_matrices",
    "eigenfeatures",
    "explain",
    "feature_similarity",
    "load_images",
    "mask_study",
    "pseudo_inverse_masks",
    "regularisation_study",
    "shared_neurons",
    "top_down",
    "train_classifier",
    "truncation",
    "with_one",
]
