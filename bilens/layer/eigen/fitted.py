"""The few squares that follow a quadratic form best where a feature fires.

Looked for are `k` squares `P = sum_j s_j w_j w_j^T` such that what is left of `Q`, `R = Q - P`, varies least

    on the inputs x_t themselves, about its mean        1/n sum_t (x_t^T R x_t - mean)^2
    on Gaussian inputs of second moment M, times rho    2 ||M^1/2 R M^1/2||_F^2

The second alone gives the eigenpairs in the metric (`metric`), the first alone learns the inputs by heart: the second
counts as `PRIOR` inputs do, `rho = PRIOR / n`. For the same reason, and because it is faster, they are looked for
among combinations of the `SPAN` leading pairs in the metric. One square after the other: the pair in the metric of what
is left that helps most, then all of them together by L-BFGS from there. What is left is kept, so that

    x^T Q x = sum_j s_j (w_j . x)^2 + x^T R x

is exact whatever the squares are, and `R` is again a sum of squares.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.layer.bilinear import double
from bilens.layer.eigen.metric import as_unit, roots
from bilens.layer.eigen.pairs import eigh, sorted_eigenpairs

PRIOR = 300  # inputs
SPAN = 64  # pairs
MOST = 2048  # inputs looked at, evenly spaced
CANDIDATES = 16
ITERATIONS = 40


@torch.no_grad()
def best_squares(
    Q: Float[Tensor, "d_model d_model"],
    x: Float[Tensor, "p d_model"],
    M: Float[Tensor, "d_model d_model"],
    k: int,
) -> tuple[Float[Tensor, "k"], Float[Tensor, "k d_model"]]:
    """Values and unit vectors of the `k` squares, in the order in which they were added.

    Args:
        Q: symmetric.
        x: the inputs to fit; there may be none.
        M: their second moment, positive definite.
        k: how many.
    """
    return squares_by_number(Q, x, M, k)[-1]


@torch.no_grad()
def squares_by_number(
    Q: Float[Tensor, "d_model d_model"],
    x: Float[Tensor, "p d_model"],
    M: Float[Tensor, "d_model d_model"],
    k: int,
) -> list[tuple[Float[Tensor, "j"], Float[Tensor, "j d_model"]]]:
    """The best square, the best two, and so on up to `k`: `best_squares` with every smaller number on its way."""
    root, inverse = roots(double(M))
    Q, dtype = double(Q), torch.promote_types(x.dtype, torch.float32)
    kept = double(x[torch.linspace(0, len(x) - 1, MOST).long()] if len(x) > MOST else x)
    mu, y = sorted_eigenpairs(root @ Q @ root, min(max(SPAN, k), len(Q)))
    back = y @ inverse
    target = ((kept @ Q) * kept).sum(1)
    scale = target.std(correction=0) if len(x) > 1 else mu.norm()
    scale = torch.where(scale > 0, scale, mu.norm()).clamp_min(torch.finfo(dtype).tiny)
    white = (kept @ back.T).to(dtype)
    problem = _Problem(white, (target / scale).to(dtype), torch.diag(mu / scale).to(dtype))
    signs, rows, found = white.new_zeros(0), white.new_zeros(0, len(mu)), []
    for _ in range(k):
        sign, row = problem.next(signs, rows)
        signs, rows = torch.cat([signs, sign]), torch.cat([rows, row])
        rows = problem.descend(signs, rows)
        found.append(as_unit(double(signs) * scale, double(rows) @ back))
    return found


class _Problem:
    """The objective in the leading pairs of the metric, of a form whose values on the inputs have variance one."""

    def __init__(self, x: Float[Tensor, "p d"], target: Float[Tensor, "p"], form: Float[Tensor, "d d"]):
        self.x, self.form = x, form
        self.target = target - target.mean() if len(x) else target
        self.n = max(len(x), 1)
        self.rho = PRIOR / self.n

    def squares(self, rows: Float[Tensor, "k d"]) -> tuple[Float[Tensor, "p k"], Float[Tensor, "p k"]]:
        read = self.x @ rows.T
        return read, read**2

    def next(self, signs: Float[Tensor, "j"], rows: Float[Tensor, "j d"]) -> tuple[Tensor, Tensor]:
        """The pair in the metric, of what is left, whose square lowers the objective most."""
        left = self.form - (rows.T * signs) @ rows
        values, columns = eigh(left)
        first = values.abs().topk(min(CANDIDATES, len(values))).indices
        values, pairs = values[first], columns[:, first].T * values[first].abs().sqrt()[:, None]
        gain = 2 * self.rho * values**2
        if len(self.x):
            _, of_rows = self.squares(rows)
            residual = self.target - _centred(of_rows) @ signs
            terms = _centred(self.squares(pairs)[1]) * values.sign()
            gain += (2 * terms * residual[:, None] - terms**2).mean(0)
        best = gain.argmax()[None]
        return values[best].sign(), pairs[best]

    def descend(self, signs: Float[Tensor, "k"], rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        start, rows = rows, rows.clone()
        search = torch.optim.LBFGS([rows], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            value, rows.grad = self.value_and_gradient(signs, rows)
            return value

        before = search.step(closure)
        after, _ = self.value_and_gradient(signs, rows)
        return rows if after <= before else start  # a line search may leave the numbers that float32 has

    def value_and_gradient(
        self, signs: Float[Tensor, "k"], rows: Float[Tensor, "k d"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "k d"]]:
        """The objective up to a constant."""
        image, cosines = rows @ self.form, rows @ rows.T
        both = signs[:, None] * signs
        value = 2 * self.rho * ((both * cosines**2).sum() - 2 * (signs * (image * rows).sum(1)).sum())
        gradient = 8 * self.rho * ((both * cosines) @ rows - signs[:, None] * image)
        if len(self.x):
            read, squares = self.squares(rows)
            residual = _centred(squares) @ signs - self.target
            value = value + residual.square().mean()
            gradient = gradient + 4 / self.n * ((read * residual[:, None]).T @ self.x) * signs[:, None]
        return value, gradient


def _centred(columns: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
    return columns - columns.mean(0)
