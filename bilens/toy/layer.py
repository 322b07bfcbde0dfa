"""A single trainable bilinear layer, and the loop that trains it: what all toy tasks have in common.

    y = W_out^T ((W_gate^T x + b_gate) * (W_in^T x + b_in)) + b_out

Its mathematics is that of `bilens.decompose`, which reads `layer.weights()`.
"""

from collections.abc import Callable, Iterable
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from bilens.errors import TrainingError
from bilens.layer.bilinear import BilinearLayer


class ToyLayer(nn.Module):
    """A bilinear layer with parameters in TransformerLens' shapes.

    Args:
        d_in, d_hidden, d_out: inputs, hidden units, outputs.
        bias: true gives both branches and the output biases.
        generator: the source of the initial weights: normal at `1 / sqrt(fan in)`, biases at zero.
    """

    def __init__(self, d_in: int, d_hidden: int, d_out: int, *, bias: bool, generator: torch.Generator):
        super().__init__()

        def normal(n_in: int, n_out: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(n_in, n_out, generator=generator) * n_in**-0.5)

        self.W_gate, self.W_in, self.W_out = normal(d_in, d_hidden), normal(d_in, d_hidden), normal(d_hidden, d_out)
        for name, size in (("b_gate", d_hidden), ("b_in", d_hidden), ("b_out", d_out)):
            if bias:
                self.register_parameter(name, nn.Parameter(torch.zeros(size)))
            else:
                self.register_buffer(name, torch.zeros(size))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return ((x @ self.W_gate + self.b_gate) * (x @ self.W_in + self.b_in)) @ self.W_out + self.b_out

    def weights(self) -> BilinearLayer:
        """What `bilens.decompose` reads, detached, in float64."""
        names = ("W_gate", "W_in", "W_out", "b_gate", "b_in", "b_out")
        return BilinearLayer(**{name: getattr(self, name).detach().double() for name in names})


def optimise(
    parameters: Iterable[nn.Parameter],
    loss_at: Callable[[int], Tensor],
    steps: int,
    *,
    lr: float,
    weight_decay: float = 0.0,
    after: Callable[[int], None] = lambda step: None,
    desc: str = "training",
    progress: bool = True,
) -> None:
    """AdamW on a loss.

    Args:
        parameters: the parameters to train.
        loss_at: the loss of a step, counted from 0.
        steps: the number of steps.
        lr: learning rate at the start; it falls to zero as a cosine.
        weight_decay: the weight decay of AdamW.
        after: called after every step with how many have been taken.
        desc: the title of the progress bar.
        progress: show it.

    Raises:
        TrainingError: the loss is no number any more.
    """
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with tqdm(total=steps, unit="step", desc=desc, disable=not progress, mininterval=0.5) as bar:
        for step in range(steps):
            loss = loss_at(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            after(step + 1)
            if step % 100 == 99 or step == steps - 1:
                now = loss.item()
                if not isfinite(now):
                    raise TrainingError(f"the loss is {now} at step {step}; lower the learning rate {lr}.")
                bar.set_postfix(loss=f"{now:.3g}")
