"""Appendix K: a layer rebuilt from the eigenvectors of its output features, through a pseudo-inverse.

With output directions u_k as the columns of U and u'_k the rows of its pseudo-inverse,

    B = sum_k u'_k (x) Q_k = sum_k sum_i lambda_ki u'_k (x) v_ki (x) v_ki            (paper, equations 5 and 6)

exactly, as long as the directions span the output. Each (k, i) is a hidden unit: both branches read v_ki, one of them
times lambda_ki, and it writes u'_k. Keeping the first r eigenvectors of every direction makes it an approximation.

The paper adds that `u_k . u'_l = delta_kl`. That holds for a complete set, d directions in d dimensions. Of an
over-complete one, as the features of an SAE, `U+ U` is a projection with fewer dimensions than directions; B is rebuilt
all the same, as `U U+` is the identity.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bilens.draw import plots
from bilens.layer.bilinear import BilinearLayer, biases_as_weights
from bilens.layer.eigen.solve import top_eigenpairs
from bilens.model.transformer import HookedBilinearTransformer
from bilens.reproduce.language_runs import model_and_texts, one_decomposer, ran_on
from bilens.reproduce.reproduction import NOT_IN_PAPER, Made, Settings
from bilens.sae.texts import text_starts
from bilens.train.data import TokenizedTexts
from bilens.train.language_model import validate

TOKENS_AT_ONCE, BATCH = 512, 16
MOST_TEXTS = 48


@torch.no_grad()
def reexpressed(layer: BilinearLayer, U: Float[Tensor, "m d_model"], r: int) -> BilinearLayer:
    """The layer as the `r` leading eigenvectors of each of the directions `U` (rows), by the pseudo-inverse.

    Biases of the branches take part, over `(x, 1)`. With all of the eigenvectors, and directions that span the output,
    it is the layer.

    Raises:
        OutOfRangeError: `r` is not in 1..d_model + 1.
    """
    over_one = biases_as_weights(layer)
    # A column of zeros, so that it writes as many dimensions as it reads, as the solver wants it.
    square = BilinearLayer(
        over_one.W_gate,
        over_one.W_in,
        F.pad(layer.W_out, (0, 1)),
        over_one.b_gate,
        over_one.b_in,
        F.pad(layer.b_out, (0, 1)),
    )
    found = top_eigenpairs(square, F.pad(U, (0, 1)), r, progress=False)
    reads = found.vectors.flatten(0, 1).T
    scaled = reads * found.values.flatten()
    writes = torch.linalg.pinv(U.double()).T.to(U).repeat_interleave(r, 0)
    return BilinearLayer(scaled[:-1], reads[:-1], writes, scaled[-1], reads[-1], layer.b_out)


def run_layer(layer: BilinearLayer, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
    """The layer on its input, some tokens at a time, as hidden units may be many."""
    return torch.cat([layer(part) for part in x.split(TOKENS_AT_ONCE)])


def explained(y: Float[Tensor, "token d_model"], guess: Float[Tensor, "token d_model"]) -> float:
    """The share of the variance of `y` around its mean that a guess explains."""
    return (1 - (guess - y).square().sum() / (y - y.mean(0)).square().sum()).item()


@torch.no_grad()
def loss_with(
    model: HookedBilinearTransformer, layer: int, weights: BilinearLayer | None, texts: Sequence[str]
) -> float:
    """Nats per token with other weights in place of one MLP's; `None` takes the MLP out."""
    read: list[Tensor] = []

    def remember(x: Tensor, hook: object) -> None:
        read.append(x)

    def replace_output(y: Tensor, hook: object) -> Tensor:
        x = read.pop()
        return torch.zeros_like(y) if weights is None else run_layer(weights, x.flatten(0, 1)).view(y.shape).to(y)

    hooks = [(f"blocks.{layer}.ln2.hook_normalized", remember), (f"blocks.{layer}.hook_mlp_out", replace_output)]
    tokens, mask = text_starts(model, texts)
    total = 0.0
    for rows, kept in zip(tokens.split(BATCH), mask[:, 1:].split(BATCH), strict=True):
        rows = rows.to(model.cfg.device)
        loss = model.run_with_hooks(rows, return_type="loss", loss_per_token=True, fwd_hooks=hooks)
        total += (loss * kept.to(loss)).sum().item()
    return total / int(mask[:, 1:].sum())


@torch.no_grad()
def reexpressed_layer(settings: Settings) -> Made:
    """Appendix K."""
    model, texts = model_and_texts(settings)
    d, texts = one_decomposer(settings, model), texts[:MOST_TEXTS]
    U = d.output_view.encoder.to(d.weights.W_out)
    x, y = (torch.cat(parts) for parts in zip(*d.run_texts(texts), strict=True))
    ranks = (1, 4) if settings.reduced else (1, 2, 4, 8, 16)
    inverted, plain, losses = [], [], []
    for r in ranks:
        rebuilt = reexpressed(d.weights, U, r)
        inverted.append(explained(y, run_layer(rebuilt, x)))
        guess = run_layer(replace(rebuilt, W_out=U.repeat_interleave(r, 0)), x)
        plain.append(explained(y, guess * ((guess * y).sum() / guess.square().sum())))
        losses.append(loss_with(model, d.layer, rebuilt, texts))
    clean = validate(model, TokenizedTexts.from_texts(texts, model.tokenizer)).nats_per_token
    without = loss_with(model, d.layer, None, texts)
    rank = int(torch.linalg.matrix_rank(U))
    rows = [("output features, and the dimensions they span", "", f"{len(U)}, {rank} of {model.cfg.d_model}")]
    rows += [
        (
            f"variance of the MLP's output explained, r = {r}: through the pseudo-inverse, without it",
            NOT_IN_PAPER,
            f"{a:.1%}, {b:.1%}",
        )
        for r, a, b in zip(ranks, inverted, plain, strict=True)
    ]
    rows += [
        (f"loss with the MLP rebuilt from {r} eigenvectors of every feature", NOT_IN_PAPER, f"{loss:.3f}")
        for r, loss in zip(ranks, losses, strict=True)
    ]
    rows.append(("loss of the model, and without this MLP", NOT_IN_PAPER, f"{clean:.3f}, {without:.3f}"))
    curves = {"through the pseudo-inverse": inverted, "features write along themselves": plain}
    against = {"rebuilt": losses, "the model": [clean] * len(ranks), "without the MLP": [without] * len(ranks)}
    x_title = "eigenvectors of every feature"
    figures = {
        "K: variance of the MLP's output explained": plots.line(
            ranks, curves, x_title=x_title, y_title="explained", log_x=True
        ),
        "K: loss with the MLP rebuilt": plots.line(
            ranks, against, x_title=x_title, y_title="nats per token", log_x=True
        ),
    }
    kept = losses[-1] - clean
    words = [
        "The paper gives the identity and no measurement. All eigenvectors rebuild the layer exactly, where features "
        f"span its output; here the first {ranks[-1]} of {model.cfg.d_model} of every feature leave the loss "
        f"{kept:+.3f} from the model's, where the whole MLP is worth {without - clean:.3f}.",
        "Of more features than dimensions, the paper's remark that u_k . u'_l is 1 for k = l and 0 else does not hold; "
        "the layer is rebuilt all the same.",
    ]
    return Made(ran_on(model, texts, d), rows, figures, words)
