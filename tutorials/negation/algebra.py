"""A bilinear layer's difference of differences, split exactly.

With the four means of its input `mu = m + a n + b s + a b d`, `a, b = +-1/2` for negated and positive, and
`mlp(x) = B(x, x)`:

    (nP - nN) - (P - N) = 2 B(n, s) + 2 B(m, d) + spread

Every other product of the four means' parts depends on one of `a` and `b` at most, and goes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.layer.bilinear import BilinearLayer, biases_as_weights


def bilinear_form(
    layer: BilinearLayer, x: Float[Tensor, "*x d_model"], y: Float[Tensor, "*x d_model"]
) -> Float[Tensor, "*x d_out"]:
    """The symmetric `B(x, y)` with `B(x, x) = mlp(x)` of a layer without biases (or with its biases as weights)."""
    left, right = x @ layer.W_gate, x @ layer.W_in
    return 0.5 * (left * (y @ layer.W_in) + right * (y @ layer.W_gate)) @ layer.W_out


@dataclass(frozen=True)
class Split:
    """A layer's difference of differences `(nP - nN) - (P - N)`, in parts that add up to it.

    Attributes:
        valence: `P - N` of the layer's output on plain sentences.
        cross: `2 B(n, s)`: what the layer makes of negation and valence.
        passed_on: `2 B(m, d)`: of a difference of differences in its input.
        spread: of what varies around the means.
        n, s: the input's negation and valence.
    """

    valence: Float[Tensor, "*k d_model"]
    cross: Float[Tensor, "*k d_model"]
    passed_on: Float[Tensor, "*k d_model"]
    spread: Float[Tensor, "*k d_model"]
    n: Float[Tensor, "d_model"]
    s: Float[Tensor, "*k d_model"]

    @property
    def measured(self) -> Float[Tensor, "*k d_model"]:
        return self.cross + self.passed_on + self.spread

    def fade(self, part: Float[Tensor, "*k d_model"]) -> Float[Tensor, "*k"]:
        """How far a part takes the valence away: 1 all of it, 2 turned round."""
        return -(part * self.valence).sum(-1) / self.valence.square().sum(-1)


def split_difference(
    layer: BilinearLayer,
    x: Float[Tensor, "word 2 d_model"],
    y: Float[Tensor, "word 2 d_model"],
    valence: Float[Tensor, "*k word"],
) -> Split:
    """The parts of the difference of differences; see the module.

    Args:
        layer: its weights.
        x, y: means of its input and of its output for every word, plain and negated.
        valence: +1 and -1 for as many words each; several labellings give as many splits.
    """
    weights = valence / (valence.shape[-1] / 2)  # P - N of means
    means = x.mean((0, 1))
    n = (x[:, 1] - x[:, 0]).mean(0)
    s = weights @ x.mean(1)
    d = weights @ (x[:, 1] - x[:, 0])
    plain, difference = weights @ y[:, 0], weights @ (y[:, 1] - y[:, 0])
    over = biases_as_weights(layer)
    zero, one = x.new_zeros(1), x.new_ones(1)
    n1, m1 = torch.cat([n, zero]), torch.cat([means, one])
    s1, d1 = (torch.cat([part, part.new_zeros(*part.shape[:-1], 1)], -1) for part in (s, d))
    cross = 2 * bilinear_form(over, n1.expand_as(s1), s1)
    passed_on = 2 * bilinear_form(over, m1.expand_as(d1), d1)
    return Split(plain, cross, passed_on, difference - cross - passed_on, n, s)
