"""Figures 23 and 24 and table 5: what SAEs add to the loss, and how low-rank features look by training time."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace

from bilens.decompose import Decomposer
from bilens.draw import plots
from bilens.reproduce.language_runs import decomposers, model_and_texts, one_layer, ran_on
from bilens.reproduce.reproduction import PICTURE, Made, Settings
from bilens.sae.train.evaluation import SAEScore, evaluate_saes
from bilens.sae.train.training import SAETrainConfig, train_saes

MOST_MEASURED = 100  # texts held out to measure on
MIN_ACTIVE = 10  # tokens; the paper's "features with less than 10 activations are considered dead"


def loss_added(score: SAEScore) -> float:
    """`(L_spliced - L_clean) / L_clean`, the paper's equation 4."""
    return (score.loss_spliced - score.loss_clean) / score.loss_clean


def sae_loss(settings: Settings) -> Made:
    """Figure 23."""
    model, texts = model_and_texts(settings)
    layers = decomposers(settings, model)
    saes = {
        f"{d.layer} {point}": sae
        for d in layers
        for point, sae in (("input", d.input_sae), ("output", d.output_sae))
        if sae is not None
    }
    scores = {score.name: score for score in evaluate_saes(model, saes, texts).scores}
    rows = [
        (
            f"loss added by the SAE on the MLP's {name.split()[1]}, layer {name.split()[0]}",
            PICTURE,
            f"{loss_added(score):.1%}",
        )
        for name, score in scores.items()
    ]
    curves = {
        f"MLP {point}": [loss_added(scores[f"{d.layer} {point}"]) for d in layers]
        for point in ("input", "output")
        if f"{layers[0].layer} {point}" in scores
    }
    across = plots.line([d.layer for d in layers], curves, x_title="layer", y_title="loss added, share of the model's")
    clean = next(iter(scores.values())).loss_clean
    words = [
        f"Spliced in one by one, these SAEs add at most {max(map(loss_added, scores.values())):.1%} to the model's "
        f"loss of {clean:.3f} nats per token. The paper's SAEs are on the MLP's output and on the "
        "stream before the MLP (resid_mid); ours are on the MLP's output and on its normalised input."
    ]
    return Made(ran_on(model, texts, *layers), rows, {"23: loss added across layers": across}, words)


CORRELATION = "mean correlation with two eigenvectors, active tokens"
PAPER = {  # table 5
    CORRELATION: (0.17, 0.28, 0.42, 0.52, 0.59),
    "normalised mean squared error": (0.17, 0.16, 0.16, 0.15, 0.15),
    "loss recovered": (0.60, 0.61, 0.65, 0.65, 0.66),
}
FIRST, DOUBLINGS = 8_192, 4  # tokens of the shortest training, and how often they are doubled
FULL = SAETrainConfig(tokens=FIRST, expansion=4, k=16, batch_size=256, bf16=False)


def training_time(settings: Settings) -> Made:
    """Figure 24 and table 5, on SAEs trained here, each twice as long as the last."""
    model, texts = model_and_texts(settings)
    layer = one_layer(settings, model)
    plain = Decomposer(model, layer)
    held = max(1, len(texts) // 4)
    train, measured = texts[held:], texts[:held][:MOST_MEASURED]
    config, doublings = replace(FULL, seed=settings.seed), DOUBLINGS
    if settings.reduced:
        config, doublings = replace(config, tokens=512, expansion=2, batch_size=128), 2
    scores, kept = [], []
    times = [2**i for i in range(doublings + 1)]
    for relative in times:
        with tempfile.TemporaryDirectory() as folder:
            longer = replace(config, tokens=config.tokens * relative)
            (sae,) = train_saes(model, train, folder, longer, hooks=[plain.out_hook]).values()
        scores.append(evaluate_saes(model, {"sae": sae}, measured).scores[0])
        found = Decomposer(model, layer, output_sae=sae).fidelity(measured, k=2)
        kept.append(found.correlation[found.eligible(MIN_ACTIVE), 1])
    columns = {
        CORRELATION: [values.mean().item() for values in kept],
        "normalised mean squared error": [1 - score.explained_variance for score in scores],
        "loss recovered": [score.loss_recovered for score in scores],
    }
    said = ", ".join(map(str, times))
    rows = [
        (f"{name}; {said} times the training", _numbers(PAPER[name]), _numbers(values))
        for name, values in columns.items()
    ]
    counts = ", ".join(str(len(values)) for values in kept)
    rows.append((f"features active on {MIN_ACTIVE} tokens or more; {said} times the training", "", counts))
    x_title = f"training, in units of {config.tokens:,} tokens"
    figures = {"Table 5, against training": plots.line(times, columns, x_title=x_title, log_x=True)}
    figures |= {
        f"24: features by correlation with two eigenvectors, {relative} times the training": plots.histogram(
            values, x_title="correlation, active tokens"
        )
        for relative, values in zip(times, kept, strict=True)
    }
    gain = columns[CORRELATION]
    words = [
        f"SAEs of {config.expansion} features per dimension, {config.k} of them active, on the output of layer "
        f"{layer}'s MLP, were trained on {config.tokens:,} to {config.tokens * times[-1]:,} tokens of {len(train)} "
        f"texts, which repeat where they are fewer, and measured on {len(measured)} others. In the paper they have 16 "
        "features per dimension, on layer 12 of fw-medium; by the authors' script they were trained for 2^13 to 2^17 "
        "steps.",
        f"The mean correlation goes from {gain[0]:.2f} to {gain[-1]:.2f} with {times[-1]} times the training; the "
        "paper's from 0.17 to 0.59 with 16 times.",
    ]
    return Made(ran_on(model, measured, plain), rows, figures, words)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
