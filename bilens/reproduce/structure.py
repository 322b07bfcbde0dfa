"""Figures 17 and 18: mixtures of classes by importance; and beyond the paper, shared neurons and two layers."""

from dataclasses import replace

from bilens.draw import plots
from bilens.reproduce.image_runs import ran_on, trained
from bilens.reproduce.reproduction import NOT_IN_PAPER, Made, Settings
from bilens.vision import class_hosvd, shared_neurons, top_down, train_classifier


def structure(settings: Settings) -> Made:
    """Figures 17 and 18."""
    data, model, config = trained(settings)
    hosvd = class_hosvd(model)
    share = hosvd.output_values**2 / (hosvd.output_values**2).sum()
    ranks = (5, 10) if settings.reduced else (5, 10, 20, 40)
    shared = shared_neurons(model, data.test_images, data.test_labels, ranks, progress=False)
    deep = train_classifier(data, replace(config, n_layer=2, d_hidden=min(64, config.d_hidden)), progress=False)
    accuracy = model.accuracy(data.test_images, data.test_labels)
    rows = [
        (
            f"output direction {rank + 1}: classes with the largest weights, and its share of the squared norm",
            ("1, 4 and 7 against 5 (MNIST)", "by the top stroke's orientation (MNIST)")[rank],
            f"{like}, {share[rank]:.0%}",
        )
        for rank, like in enumerate(hosvd.to_frame().query("mode == 'output'").like[:2])
    ]
    rows.append(("test accuracy", "", f"{accuracy:.1%}"))
    rows += [
        (
            f"accuracy with {row.rank} shared neurons (CP, cosine of the tensors {row.cosine:.2f})",
            NOT_IN_PAPER,
            f"{row.accuracy:.1%}",
        )
        for row in shared.to_frame().itertuples()
    ]
    rows.append(("test accuracy of two layers", NOT_IN_PAPER, f"{deep.test_accuracy:.1%}"))
    names = [f"{rank + 1}" for rank in range(len(share))]
    order = list(range(1, len(share) + 1))
    figures = {
        "17, 18: output directions by importance, each with its leading eigenfeatures": hosvd.plot_outputs(),
        "17, 18: singular values": plots.line(
            order, {"": hosvd.output_values}, x_title="output direction", y_title="singular value"
        ),
        "17, 18: what every output direction contributes to the classes": plots.heatmap(
            hosvd.output_directions, names, list(data.class_names), row_title="output direction", col_title="class"
        ),
        "Input directions by importance (not in the paper)": hosvd.plot(),
        "Accuracy with shared neurons (not in the paper)": shared.plot(),
        "Two layers from the top down (not in the paper)": top_down(
            deep.model, [0, min(3, data.n_classes - 1)], k=3
        ).plot(),
    }
    likes = hosvd.to_frame().query("mode == 'output'").like
    words = [
        f"The first two of {len(share)} output directions hold {share[:2].sum():.0%} of the squared norm: "
        f"{likes.iloc[0]} and {likes.iloc[1]}, by their classes.",
        "The sign of an output direction is free. The paper's directions come from the matrices over the embedding, "
        "ours from those over the pixels, so singular values do not compare.",
    ]
    return Made(ran_on(data, config), rows, figures, words)
