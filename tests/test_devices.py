"""Every public call with model and SAEs on another device than the CPU: nothing mixes, and the numbers are the same.

On a machine with a GPU that is the device; elsewhere it is `tests.far_device`, which refuses what CUDA refuses.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from bilens import Decomposer, evaluate_saes
from bilens.attribute import (
    Circuit,
    Target,
    attribute_tokens,
    check_circuit,
    check_edges,
    compare_tokens,
    feature_means,
    freeze,
    split,
    trace_chain,
)
from bilens.decompose.feature import feature_circuit, rank_features
from bilens.decompose.gallery import motif_gallery
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.features.examples import feature_activations
from tests.conftest import make_model
from tests.far_device import far_device, far_mode, to_far
from tests.random_saes import make_sae

TEXT = "Mira found a red kite and then went home, very happy."
FAR = far_device()


@dataclasses.dataclass
class Setting:
    """A small model with biases, an SAE on the input and output of each MLP, texts, all on one device."""

    model: HookedBilinearTransformer
    saes: list[Any]
    texts: list[str]
    device: torch.device

    @property
    def tokens(self) -> Tensor:
        return self.model.to_tokens(self.texts[0])

    @property
    def decomposer(self) -> Decomposer:
        return Decomposer(self.model, 1, *self.saes[2:4])

    @property
    def frozen(self) -> Any:
        return freeze(self.model, self.texts[0], self.saes)


@pytest.fixture(scope="module")
def near(tokenizer: Any, texts: list[str]) -> Setting:
    model = make_model(tokenizer=tokenizer, bias=True, seed=3)
    points = [(layer, point) for layer in range(2) for point in ("ln2.hook_normalized", "hook_mlp_out")]
    kinds = ["topk", "gated", "jumprelu", "topk-rescaled"]
    norms = ["none", "layer_norm", "none", "constant_norm_rescale"]
    saes = [
        make_sae(kind, f"blocks.{layer}.{point}", seed=n, normalize_activations=norm)
        for n, (kind, norm, (layer, point)) in enumerate(zip(kinds, norms, points, strict=True))
    ]
    return Setting(model, saes, [TEXT, *texts[::100]], torch.device("cpu"))


@pytest.fixture(scope="module")
def far(near: Setting) -> Setting:
    model, saes = copy.deepcopy((near.model, near.saes))
    return Setting(to_far(model), [to_far(sae) for sae in saes], near.texts, FAR)


# --- the model --------------------------------------------------------------------------------------------------------


def forward(s: Setting) -> Any:
    logits, loss = s.model(s.texts, return_type="both")
    assert logits.device == s.device
    padded = s.model.to_tokens(s.texts[:2], padding_side="left")
    near_tokens = s.model(padded.cpu(), padding_side="left")
    return logits, loss, s.model(padded, padding_side="left", loss_per_token=True, return_type="loss"), near_tokens


def hooks(s: Setting) -> Any:
    names = ("blocks.0.hook_resid_mid", lambda value, hook: value * 0.5), ("blocks.1.attn.hook_z", lambda v, hook: v)
    logits = s.model.run_with_hooks(s.tokens, fwd_hooks=list(names))
    _, cache = s.model.run_with_cache(s.tokens)
    assert {value.device for value in cache.values()} == {s.device}
    _, near_cache = s.model.run_with_cache(s.tokens, device="cpu")
    assert {value.device.type for value in near_cache.values()} == {"cpu"}
    return logits, dict(cache.items()), cache.accumulated_resid(), near_cache["hook_embed"]


def attached(s: Setting) -> Any:
    with s.model.saes(s.saes, use_error_term=False):
        logits, cache = s.model.run_with_cache(s.tokens)
    return logits, dict(cache.items()), s.model.run_with_saes(s.tokens, saes=s.saes)


def generate(s: Setting) -> Any:
    greedy = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
    tokens = s.model.to_tokens(s.texts[:2], padding_side="left")[:, :12]
    s.model.generate(s.tokens[:, :4], max_new_tokens=2, verbose=False, top_k=5, top_p=0.9)
    return s.model.generate(tokens, **greedy), s.model.generate("Mira found", use_past_kv_cache=False, **greedy)


def gradients(s: Setting) -> Any:
    s.model(s.tokens, return_type="loss").backward()
    found = {name: weight.grad for name, weight in s.model.named_parameters()}
    s.model.zero_grad()
    assert {gradient.device for gradient in found.values()} == {s.device}
    return found


def weights(s: Setting) -> Any:
    m = s.model
    return m.W_E, m.W_U, m.W_O, m.W_V, m.OV.AB, m.tokens_to_residual_directions("mira"), m.accumulated_bias(2)


# --- one layer --------------------------------------------------------------------------------------------------------


def interaction(s: Setting) -> Any:
    d, direction = s.decomposer, torch.linspace(-1, 1, 16)
    features = torch.tensor([3, 5])
    return (
        d.interaction(3),
        d.interaction([3, 5], basis="features"),
        d.interaction(features.to(s.device)),
        d.interaction(direction),
        d.interaction(direction.to(s.device), basis="features"),
        d.linear(features),
        d.constant(features),
    )


def eigen(s: Setting) -> Any:
    d = s.decomposer
    found = [d.eigen(3), d.eigen([3, 5], k=4, order="positive"), d.eigen(range(40), k=1, order="negative")]
    projected = [each.activations(torch.linspace(-1, 1, 16, device=s.device)) for each in found[:1]]
    return *(each.values for each in found), *projected, *map(shown, found)


def pairs(s: Setting) -> Any:
    d, typical = s.decomposer, torch.linspace(0.1, 1, 40)
    found = d.top_interactions([3, 5], n=20)
    left, right = s.model.W_E.detach()[:9], torch.linspace(-1, 1, 48).view(3, 16)
    return (
        shown(found),
        shown(d.top_interactions(3, n=20, activations=typical)),
        shown(d.between(3, left, n=5)),
        shown(d.between([3, 5], left.cpu(), right, n=5)),
        shown(d.strongest_interactions(n=30, progress=False)),
    )


def structure(s: Setting) -> Any:
    d, typical = s.decomposer, torch.linspace(0.1, 1, 40)
    return (
        shown(d.sparsity(progress=False)),
        shown(d.sparsity([3, 5], progress=False)),
        shown(d.outliers([3, 5], n=50, progress=False)),
        shown(d.outliers(torch.tensor([3, 5]), n=None, progress=False)),
        shown(d.motifs(n=10, activations=typical, progress=False)),
        shown(d.motifs([3, 5], kind="and", n=10, together=typical[:, None] * typical, progress=False)),
    )


def spectra(s: Setting) -> Any:
    return shown(s.decomposer.spectra(progress=False, full=True)), shown(s.decomposer.spectra([3, 5], progress=False))


def between_outputs(s: Setting) -> Any:
    d = s.decomposer
    return (
        d.inner_products([3, 5, 7]),
        d.inner_products([3, 5, 7], basis="features"),
        shown(d.neighbours(k=3)),
        shown(d.neighbours([3, 5], k=3, basis="features", against="decoder")),
        shown(d.clusters(threshold=0.2)),
        shown(d.clusters([3, 5, 7, 9], threshold=0.2)),
    )


def hosvd(s: Setting) -> Any:
    found, bare = s.decomposer.hosvd(k=4), Decomposer(s.model, 0).hosvd(k=2)
    return found.output_values, found.input_values, shown(found), shown(bare)


def cp(s: Setting) -> Any:
    fit = s.decomposer.cp(3, max_sweeps=2, progress=False)
    return fit.explained, shown(fit)


def attribute(s: Setting) -> Any:
    d = s.decomposer
    return (
        shown(d.attribute(s.texts[0], 3, -1)),
        shown(d.attribute(s.tokens, 5, 4)),
        shown(d.attribute(s.tokens[0].tolist(), 5, 4)),
    )


def fidelity(s: Setting) -> Any:
    found = s.decomposer.fidelity(s.texts, k=3)
    return found.correlation, found.shares(min_active=1), s.decomposer.fidelity(s.texts, output=[3, 5], k=2).correlation


def texts_of_features(s: Setting) -> Any:
    d = s.decomposer
    inputs, outputs = (feature_activations(s.model, [sae], s.texts)[0] for sae in s.saes[2:4])
    gallery = motif_gallery([d], [inputs], [outputs], n=2, min_tokens=10, progress=False)
    circuit = feature_circuit(d, s.texts[0], 3, inputs=inputs, outputs=outputs)
    weights = inputs.cofiring()
    assert inputs.values.device.type == weights.device.type == "cpu"
    return (
        inputs.values,
        weights,
        shown(gallery),
        shown(circuit),
        shown(rank_features(d, outputs, min_active=25, density=(0.0, 1.0))),
        shown(d.strongest_interactions(5, weights=weights, progress=False)),
    )


# --- every layer ------------------------------------------------------------------------------------------------------


def targets(s: Setting) -> list[Target]:
    direction = torch.linspace(-1, 1, 16, device=s.device)
    return [
        Target.feature("1-mlp-out", 3),
        Target.feature("0-mlp-in", 5, position=3),
        Target.logit("mira"),
        Target.logit("mira", minus="red"),
        Target.direction(direction, "blocks.1.hook_resid_mid"),
        Target.direction(direction.cpu(), "blocks.1.hook_attn_out"),
    ]


def splits(s: Setting) -> Any:
    frozen = s.frozen
    return (
        [
            split(frozen, target, attention=attention, mlps=mlps).values
            for target in targets(s)
            for attention in ("heads", "paths")
            for mlps in ("whole", "features", "pairs")
        ],
        shown(split(frozen, targets(s)[0])),
        shown(split(frozen, targets(s)[0], mlps="pairs").folded()),
        split(frozen, targets(s)[2]).heads(),
    )


def tokens(s: Setting) -> Any:
    found = attribute_tokens(s.frozen, targets(s), pairs=True)
    return [
        (
            each.values,
            each.pairs,
            each.heads,
            shown(each),
            each.head_frame(),
            each.plot_pairs() and None,
            each.heads_view()._repr_html_() and None,
        )
        for each in found
    ]


def gradient_attributions(s: Setting) -> Any:
    frozen = s.frozen
    return [compare_tokens(frozen, target) for target in targets(s)[::5]]


def circuits(s: Setting) -> Any:
    frozen = s.frozen
    one = Circuit.trace(s.model, s.saes, s.texts[0], Target.logit("mira"), max_nodes=30)
    several = Circuit.trace(s.model, s.saes, s.texts[0], max_n_logits=3, max_nodes=30)
    feature = Circuit.trace(s.model, s.saes, s.texts[0], Target.feature("1-mlp-out", 3), max_nodes=30)
    partly = Circuit.trace(s.model, [s.saes[0]], s.texts[0], Target.logit("mira"), max_nodes=30)
    means = feature_means(s.model, s.saes, s.texts)
    kept = [
        check_circuit(frozen, one, Target.logit("mira"), means=given, errors=errors).frame
        for given, errors in ((None, "circuit"), (means, "all"))
    ]
    edges = [check_edges(frozen, one, Target.logit("mira"), attention=mode).frame for mode in ("frozen", "real")]
    one.to_attribution_graph()
    return [shown(each) for each in (one, several, feature, partly)], one.edges, one.hyperedges, one.heads, kept, edges


def chains(s: Setting) -> Any:
    direction = s.saes[3].W_enc.detach()[:, 3]
    return shown(trace_chain(s.model, 1, direction, texts=s.texts[:2])), shown(trace_chain(s.model, 1, direction.cpu()))


def measures(s: Setting) -> Any:
    return shown(evaluate_saes(s.model, {str(n): sae for n, sae in enumerate(s.saes)}, s.texts))


CASES: list[Callable[[Setting], Any]] = [
    *(forward, hooks, attached, generate, gradients, weights),
    *(
        interaction,
        eigen,
        pairs,
        structure,
        spectra,
        between_outputs,
        hosvd,
        cp,
        attribute,
        fidelity,
        texts_of_features,
    ),
    *(splits, tokens, gradient_attributions, circuits, chains, measures),
]


def shown(result: Any) -> Any:
    """Everything that a user looks at, drawn; and its table."""
    text = str(result)
    repr(result)
    for name in ("plot", "_repr_html_", "to_page"):
        if hasattr(result, name):
            getattr(result, name)()
    return result.to_frame() if hasattr(result, "to_frame") else text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nothing_mixes_on_another_device(case: Callable[[Setting], Any], near: Setting, far: Setting) -> None:
    expected = case(near)
    with far_mode():
        found = case(far)
    same(found, expected)


def same(found: Any, expected: Any) -> None:
    """Equal but for sums in another order."""
    if isinstance(expected, pd.DataFrame):
        assert list(found) == list(expected)
        assert len(found) == len(expected)
        for column in expected:
            if pd.api.types.is_float_dtype(expected[column]):
                same(found[column].to_numpy(), expected[column].to_numpy())
            elif FAR.type != "cuda":  # of nearly equal numbers another may come first there
                assert found[column].tolist() == expected[column].tolist()
    elif isinstance(expected, Tensor | np.ndarray):
        found, expected = (
            x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(x) for x in (found, expected)
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        same(list(found.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            same(one, other)


def test_the_far_device_refuses_what_cuda_refuses() -> None:
    with far_mode() as device:
        x, near = torch.ones(3, 2, device=device), torch.ones(3, 2)
        rows = torch.tensor([0, 2])
        for mixes in (
            lambda: x + near,
            lambda: torch.cat([x, near]),
            lambda: x @ near.T,
            lambda: near[rows.to(device)],
            lambda: x.index_add_(0, rows, near[rows]),
            lambda: x.gather(0, rows[:, None]),
            lambda: x.numpy(),
            lambda: torch.where(near > 0, x, near),
            lambda: torch.randn(2, device=device, generator=torch.Generator()),
            lambda: np.asarray(x),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                mixes()
        assert (x * torch.tensor(2.0)).device == x[rows].device == x.new_zeros(2).device == device
        assert x.cpu().device.type == x.to(near).device.type == "cpu"
        near.copy_(x)
        x[rows] = 5.0
        assert x.tolist() == [[5.0, 5.0], [1.0, 1.0], [5.0, 5.0]]
