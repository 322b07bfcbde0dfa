"""Programs compiled into bilinear transformers by hand: models of which everything is known.

Every one reads tokens of a small vocabulary and is a polynomial: bilinear attention of one head, bilinear MLPs, no
norms, no biases. The residual stream is three slots of one entry for each token: the token itself, what attention
fetched, and what is unembedded. A head is made of three things:

1. where it looks: weights by distance, exact within the context: with rotary positions a query and a key of one plane
   make `a cos(theta d) + b sin(theta d)` of a distance `d`, and with some planes more than distances any weights can be
   made of small `a` and `b`
2. what it asks of what: pairs of a read of the query's stream and a read of the key's
3. what it moves: a matrix from the key's stream to the query's

The first two are the first score of bilinear attention; the second score is 1 everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.errors import ArgumentError, nearest
from bilens.model.config import BilinearTransformerConfig
from bilens.model.transformer import HookedBilinearTransformer

N_CTX, PLANES = 6, 16
Edge = tuple[int, ...]  # the token at each offset, 0 first, and the logit that they move together


@dataclass(frozen=True)
class Program:
    """A compiled program, and what its tokens do together.

    Attributes:
        name: its name.
        about: what it computes.
        vocabulary: its tokens.
        model: a model that computes it, in float64.
        offsets: the offsets of the tokens that the edges are of, 0 first.
        edges: every choice of tokens there, and logit (an `Edge`), that they move and no fewer of them do, and by how
            much.
    """

    name: str
    about: str
    vocabulary: Sequence[str]
    model: HookedBilinearTransformer = field(repr=False)
    offsets: tuple[int, ...]
    edges: Mapping[Any, float] = field(repr=False)


@dataclass
class _Head:
    """A head over slots of `(d_vocab,)` each: `weights` by distance, `asks` of what, `moves` what."""

    weights: Sequence[float]
    asks: list[tuple[Tensor, Tensor]]
    moves: Float[Tensor, "d_model d_model"]


@dataclass
class _Product:
    """A hidden unit: two reads multiplied, and where it writes."""

    left: Float[Tensor, "d_model"]
    right: Float[Tensor, "d_model"]
    out: Float[Tensor, "d_model"]


class _Compiler:
    """Slots of the stream, and a model of heads and products."""

    def __init__(self, vocabulary: Sequence[str]):
        self.vocabulary, self.v = vocabulary, len(vocabulary)
        self.d_model = 3 * self.v

    def at(self, slot: int, token: str) -> Float[Tensor, "d_model"]:
        """The direction of a token in slot 0 (itself), 1 (fetched) or 2 (unembedded)."""
        return torch.eye(self.d_model, dtype=torch.float64)[slot * self.v + self.vocabulary.index(token)]

    def there(self) -> Float[Tensor, "d_model"]:
        """1 wherever there is a token."""
        return torch.cat([torch.ones(self.v), torch.zeros(2 * self.v)]).double()

    def copy(self, source: int, to: int) -> Float[Tensor, "d_model d_model"]:
        """What moves one slot into another."""
        moves = torch.zeros(self.d_model, self.d_model, dtype=torch.float64)
        rows = torch.arange(self.v)
        moves[source * self.v + rows, to * self.v + rows] = 1.0
        return moves

    def moving(self, pairs: Mapping[str, str]) -> Float[Tensor, "d_model d_model"]:
        """What moves tokens to logits."""
        return sum(
            (torch.outer(self.at(0, a), self.at(2, b)) for a, b in pairs.items()),
            start=torch.zeros(self.d_model, self.d_model, dtype=torch.float64),
        )

    def model(self, layers: Sequence[tuple[_Head | None, Sequence[_Product]]]) -> HookedBilinearTransformer:
        """The model of these layers."""
        n_asks = max([1, *(len(head.asks) for head, _ in layers if head is not None)])
        cfg = BilinearTransformerConfig(
            d_model=self.d_model,
            d_head=2 * n_asks * PLANES,
            n_layers=len(layers),
            n_ctx=N_CTX,
            n_heads=1,
            d_mlp=max(1, *(len(products) for _, products in layers)),
            d_vocab=self.v,
            device="cpu",
            dtype=torch.float64,
            normalization_type=None,
            attention="bilinear",
            scale_attn=False,
            model_name="compiled",
        )
        model = HookedBilinearTransformer(cfg, init_weights=False)
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
            model.embed.weight[:, : self.v] = torch.eye(self.v)
            model.unembed.head.weight[:, 2 * self.v :] = torch.eye(self.v)
            for block, (head, products) in zip(model.blocks, layers, strict=True):
                for unit, product in enumerate(products):
                    block.mlp.W_gate[:, unit], block.mlp.W_in[:, unit] = product.left, product.right
                    block.mlp.W_out[unit] = product.out
                if head is not None:
                    self._set(block.attn, head)
        return model.eval()

    def _set(self, attn: HookedBilinearTransformer, head: _Head) -> None:
        d_head = attn.cfg.d_head
        everywhere = [1.0] * N_CTX
        factors = {1: (head.asks, head.weights), 2: ([(self.there(), self.there())], everywhere)}
        for factor, (asks, weights) in factors.items():
            query, key = (torch.zeros(self.d_model, d_head, dtype=torch.float64) for _ in "qk")
            for n, (asking, asked) in enumerate(asks):
                turn = _by_distance(weights, planes := torch.arange(PLANES) * (d_head // 2 // PLANES) + n, d_head)
                query[:, planes] += asking[:, None] * d_head**0.5
                key[:, planes] += asked[:, None] * turn[0]
                key[:, planes + d_head // 2] += asked[:, None] * turn[1]
            getattr(attn, f"W_Q{factor}")[0], getattr(attn, f"W_K{factor}")[0] = query, key
        left, size, right = torch.linalg.svd(head.moves)
        rank = int((size > 1e-9).sum())
        attn.W_V[0, :, :rank] = left[:, :rank] * size[:rank]
        attn.W_O[0, :rank] = right[:rank]


def _by_distance(weights: Sequence[float], planes: Tensor, d_head: int) -> Float[Tensor, "2 plane"]:
    """The keys `a + ib` of rotary planes that give these weights by distance to a query of 1 in each."""
    frequencies = 10_000.0 ** (-planes.double() / (d_head // 2))
    angles = torch.arange(len(weights)).double()[:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    wanted = torch.tensor(weights, dtype=torch.float64)[:, None]
    return torch.linalg.lstsq(waves, wanted, driver="gelsd").solution[:, 0].view(2, -1)


def _one(distance: int) -> list[float]:
    return [float(d == distance) for d in range(N_CTX)]


# --- the programs -----------------------------------------------------------------------------------------------------


def _copy() -> Program:
    c = _Compiler("abcdef")
    head = _Head(_one(1), [(c.there(), c.there())], c.copy(0, 2))
    edges = {(q, k, k): 1.0 for q in range(6) for k in range(6)}
    return Program("copy", "the token before the last comes again", c.vocabulary, c.model([(head, [])]), (0, 1), edges)


def _and() -> Program:
    c = _Compiler("abcxyz")
    head = _Head(_one(3), [(c.at(0, "x"), c.at(0, "a"))], c.moving({"a": "z"}))
    i = c.vocabulary.index
    return Program(
        "and",
        "a three before x: z",
        c.vocabulary,
        c.model([(head, [])]),
        (0, 3),
        {(i("x"), i("a"), i("z")): 1.0},
    )


def _gate(name: str, about: str, together: float) -> Program:
    """`z` from `a` two before and `x` now: the first alone and the second alone count 1, both `together` besides."""
    c = _Compiler("abxyz")
    fetch = _Head(_one(2), [(c.there(), c.there())], c.copy(0, 1))
    now, before, z = c.at(0, "x"), c.at(1, "a"), c.at(2, "z")
    products = [_Product(now, c.there(), z), _Product(before, c.there(), z), _Product(now, before, together * z)]
    i = c.vocabulary.index
    edges = {(q, i("a"), i("z")): 1.0 + (together if q == i("x") else 0.0) for q in range(5)}
    edges = {edge: value for edge, value in edges.items() if value}
    return Program(name, about, c.vocabulary, c.model([(fetch, products)]), (0, 2), edges)


def _skip() -> Program:
    c = _Compiler("abcxyz")
    rules = {("a", "x"): "c", ("b", "x"): "z", ("a", "y"): "z"}
    # One value for a head: what the earlier token is goes along, and the MLP knows both.
    fetch = _Head([0.0, 1, 1, 1, 1, 0], [(c.there(), c.there())], c.copy(0, 1))
    products = [_Product(c.at(0, now), c.at(1, before), c.at(2, to)) for (before, now), to in rules.items()]
    i = c.vocabulary.index
    edges = {(i(now), i(before), i(to)): 1.0 for (before, now), to in rules.items()}
    about = "three skip-trigrams within four tokens"
    return Program("skip-trigram", about, c.vocabulary, c.model([(fetch, products)]), (0, 4), edges)


def _induction() -> Program:
    c = _Compiler("abcdef")
    before = _Head(_one(1), [(c.there(), c.there())], c.copy(0, 1))
    match = _Head([1.0] * N_CTX, [(c.at(0, t), c.at(1, t)) for t in c.vocabulary], c.copy(0, 2))
    model = c.model([(before, []), (match, [])])
    edges = {(x, y, x, y): 1.0 for x in range(6) for y in range(6)}
    return Program("induction", "what followed this token before follows again", c.vocabulary, model, (0, 3, 4), edges)


def _negation() -> Program:
    c = _Compiler(["not", "very", "good", "bad", "+", "-"])
    fetch = _Head(_one(1), [(c.there(), c.there())], c.copy(0, 1))
    products = []
    edges: dict[Edge, float] = {}
    i = c.vocabulary.index
    for word, sign in (("good", 1.0), ("bad", -1.0)):
        mood = c.at(2, "+") - c.at(2, "-")
        products += [_Product(c.at(0, word), c.there(), sign * mood)]
        products += [_Product(c.at(0, word), c.at(1, "not"), -2 * sign * mood)]
        edges |= {(i(word), i("not"), i("+")): -2 * sign, (i(word), i("not"), i("-")): 2 * sign}
    about = "'not' before an adjective turns its mood around"
    return Program("negation", about, c.vocabulary, c.model([(fetch, products)]), (0, 1), edges)


def _brackets() -> Program:
    c = _Compiler(["(", ")", ".", "0", "1", "2"])
    nesting = torch.outer(c.at(0, "(") - c.at(0, ")"), c.at(1, "("))
    count = _Head([1.0] * N_CTX, [(c.there(), c.there())], nesting)
    depth, i = c.at(1, "("), c.vocabulary.index
    products = [_Product(depth, c.there(), 2 * d * c.at(2, str(d))) for d in (1, 2)]
    products += [_Product(c.there(), c.there(), -float(d * d) * c.at(2, str(d))) for d in (1, 2)]
    edges = {
        (q, i(bracket), i(str(d))): 2.0 * d * sign
        for q in range(6)
        for bracket, sign in (("(", 1.0), (")", -1.0))
        for d in (1, 2)
    }
    model = c.model([(count, products)])
    return Program("brackets", "how deep brackets are nested, to 2", c.vocabulary, model, (0, 3), edges)


_PROGRAMS: dict[str, Callable[[], Program]] = {
    "copy": _copy,
    "and": _and,
    "or": lambda: _gate("or", "a two before, or x now: z", -1.0),
    "xor": lambda: _gate("xor", "a two before, or x now, not both: z", -2.0),
    "skip-trigram": _skip,
    "induction": _induction,
    "negation": _negation,
    "brackets": _brackets,
}
PROGRAMS = tuple(_PROGRAMS)
"""The names of all programs."""


def compile_program(name: str) -> Program:
    """A program and a model that computes it exactly.

    Args:
        name: one of `PROGRAMS`.

    Raises:
        ArgumentError: no such program.
    """
    if name not in _PROGRAMS:
        raise ArgumentError(f"there is no program {name!r}; there are {', '.join(PROGRAMS)}." + nearest(name, PROGRAMS))
    return _PROGRAMS[name]()
