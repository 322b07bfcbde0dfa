"""The image figures, on whatever `Settings.images` names: digits that come along, MNIST where it is."""

from dataclasses import replace
from typing import TYPE_CHECKING

from bilens.reproduce.reproduction import PEARCE_2025, Made, Make, Recipe, Settings

if TYPE_CHECKING:
    from bilens.vision import BilinearClassifier, ImageDataset, ImageTrainConfig

SMALLER = "8 x 8 digits (or what --images names) in place of MNIST and Fashion-MNIST; up to 256 hidden units, not 512"


def _data(settings: Settings) -> "tuple[ImageDataset, ImageTrainConfig]":
    from bilens.vision import ImageTrainConfig, load_images

    config = ImageTrainConfig(seed=settings.seed)
    return load_images(settings.images), replace(config, d_hidden=32, epochs=5) if settings.reduced else config


def _trained(settings: Settings) -> "tuple[ImageDataset, BilinearClassifier, float]":
    from bilens.vision import train_classifier

    data, config = _data(settings)
    found = train_classifier(data, config)
    return data, found.model, found.test_accuracy


def _eigenfeatures(settings: Settings) -> Made:
    from bilens.vision import eigenfeatures, explain

    data, model, accuracy = _trained(settings)
    found = eigenfeatures(model)
    size = found.circuits.values.abs()
    share = (size[:, :10].sum(1) / size.sum(1)).mean()
    rows = [
        ("test accuracy", "about 98 % (MNIST)", f"{accuracy:.1%}"),
        (
            "share of the ten largest |eigenvalues|, mean over classes",
            "few stand out",
            f"{share:.0%} of {size.shape[1]}",
        ),
    ]
    figures = {
        "Eigenfeatures of every class": found.plot(),
        "Spectrum of one class, with its leading eigenfeatures": found.plot_spectrum(),
        "What made one prediction: the parts add up to the logit": explain(model, data.test_images[0]).plot(),
    }
    return Made(rows, figures)


def _regularisation(settings: Settings) -> Made:
    from bilens.vision import regularisation_study

    data, config = _data(settings)
    noises = (0.0, 0.3) if settings.reduced else (0.0, 0.15, 0.3, 0.6, 1.0)
    found = regularisation_study(data, noises, config)
    frame = found.to_frame()
    rows = [
        (f"test accuracy with noise {row.noise:g}", "falls slowly with noise", f"{row.test_accuracy:.1%}")
        for row in frame.itertuples()
    ]
    return Made(rows, {"Eigenfeatures of one class against input noise": found.plot()})


def _stability(settings: Settings) -> Made:
    from bilens.vision import feature_similarity, train_classifier, truncation

    data, config = _data(settings)
    seeds, sizes = (2, (16, 32)) if settings.reduced else (3, (32, 128, 256))
    models = {
        str(size): [
            train_classifier(data, replace(config, d_hidden=size, seed=settings.seed + seed)).model
            for seed in range(seeds)
        ]
        for size in sizes
    }
    alike = feature_similarity(models, k=5)
    first = alike.to_frame().query("rank == 0").set_index("comparison")
    cut = truncation(models[str(sizes[-1])][0], data.test_images, data.test_labels)
    rows = [
        (
            f"cosine of the leading eigenfeature with its best match, {name} hidden units",
            "high, and higher for larger models",
            f"{row.best:.2f} (with other classes' {row.other_class:.2f})",
        )
        for name, row in first.iterrows()
    ]
    rows.append(
        ("eigenfeatures of a class that keep the accuracy within a point", "10 or fewer (MNIST)", str(cut.enough()))
    )
    figures = {
        "5A: similarity of eigenfeatures across seeds and sizes": alike.plot(),
        "5B: accuracy against eigenfeatures kept": cut.plot(),
    }
    return Made(rows, figures)


def _masks(settings: Settings) -> Made:
    from bilens.vision import adversarial_mask, mask_study

    data, model, _ = _trained(settings)
    masks = [adversarial_mask(model, target) for target in range(model.cfg.d_output)]
    scale = data.test_images.flatten(1).norm(dim=1).mean().item()
    strengths = [round(part * scale, 2) for part in (0.1, 0.25, 0.5, 0.75, 1.0)]
    n_random = 3 if settings.reduced else 20
    found = mask_study(masks, data.test_images, data.test_labels, strengths, n_random=n_random)
    rows = [
        (
            f"accuracy under a mask {row.strength / scale:.0%} as long as the mean image",
            "falls; random masks do little",
            f"{row.accuracy:.1%} (random masks {row.random_accuracy:.1%})",
        )
        for row in found.by_strength().itertuples()
    ]
    return Made(rows, {"Accuracy against strength": found.plot(), "The masks": found.plot_masks()})


def _structure(settings: Settings) -> Made:
    from bilens.vision import class_hosvd, shared_neurons, top_down, train_classifier

    data, config = _data(settings)
    _, model, accuracy = _trained(settings)
    hosvd = class_hosvd(model)
    ranks = (5, 10) if settings.reduced else (5, 10, 20, 40)
    shared = shared_neurons(model, data.test_images, data.test_labels, ranks)
    deep = train_classifier(data, replace(config, n_layer=2, d_hidden=min(64, config.d_hidden)))
    rows = [("test accuracy of one layer", "", f"{accuracy:.1%}")]
    rows += [
        (f"accuracy with {row.rank} shared neurons (CP, cosine of tensors {row.cosine:.2f})", "", f"{row.accuracy:.1%}")
        for row in shared.to_frame().itertuples()
    ]
    rows.append(("test accuracy of two layers", "", f"{deep.test_accuracy:.1%}"))
    figures = {
        "HOSVD: input directions by importance": hosvd.plot(),
        "Accuracy with shared neurons": shared.plot(),
        "Two layers from the top down": top_down(deep.model, [0, 3], k=3).plot(),
    }
    return Made(rows, figures)


def _recipe(name: str, where: str, about: str, make: Make) -> Recipe:
    return Recipe(name, f"{PEARCE_2025}, {where}", about, SMALLER, make)


IMAGES = [
    _recipe("eigenfeatures", "figures 2 and 3", "what every class of an image classifier looks for", _eigenfeatures),
    _recipe("regularisation", "figure 4", "eigenfeatures under more and more input noise", _regularisation),
    _recipe("stability", "figure 5", "eigenfeatures across seeds and sizes, and how few are enough", _stability),
    _recipe("masks", "figure 6", "images that change predictions, from the weights alone", _masks),
    _recipe("structure", "appendices", "HOSVD, shared neurons, and a deeper model from the top down", _structure),
]
