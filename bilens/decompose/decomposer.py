"""One bilinear layer, read through SAE features.

    1. an output is a direction u in the layer's output space: an output feature's encoder row (what makes it fire), its
       decoder row (what it writes), or any vector
    2. the layer's weights turn u into a symmetric matrix Q_u over its input space (`interaction`)
    3. Q_u is read by its eigenvectors (`eigen`) or between input features (`interaction(basis="features")`,
       `top_interactions`)
    4. on a text, the same numbers times the active features' activations give the output feature's pre-activation,
       nothing left out (`attribute`)

Source: Pearce et al. 2025 (arXiv 2410.08417), sections 3 and 5; the expansion is in docs/concepts/mathematics.md.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, SupportsIndex, get_args, overload

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.bare import require_bare
from bilens._core.checks import MEMORY, check_budget, check_index, check_sizes, how_many_fit
from bilens._core.typing import typed
from bilens.decompose.comparison import FidelityComparison, compare_methods
from bilens.decompose.explanation import explain
from bilens.decompose.fidelity import Fidelity, measure_fidelity
from bilens.decompose.firing import Firing, FiringSpectra, Fit, circuits_where_it_fires, spectra_where_they_fire
from bilens.decompose.interactions import Interactions, PairNames, unequal_rows
from bilens.decompose.motifs import Motifs, find_motifs
from bilens.decompose.outputs import Output, check_feature, read_output
from bilens.decompose.results import Attribution
from bilens.decompose.similarity import (
    FeatureClusters,
    FeatureCosines,
    Linkage,
    Neighbours,
    cluster,
    feature_cosines,
    nearest_others,
)
from bilens.decompose.sparsity import Sparsity, find_outliers, measure_sparsity
from bilens.decompose.spectra import Spectra, find_spectra
from bilens.errors import ArgumentError, MissingSAEError, OutOfRangeError, SAEMismatchError
from bilens.layer.bilinear import (
    BilinearLayer,
    branches,
    check_bilinear,
    constant_term,
    double,
    in_basis,
    interaction_matrix,
    linear_term,
    pair_products,
    triple_coefficients,
)
from bilens.layer.cp import CPCurve, CPDecomposition, cp_decompose
from bilens.layer.eigen.circuits import Eigencircuits, Metric
from bilens.layer.eigen.metric import Ranking
from bilens.layer.eigen.pairs import Order, check_pairs, sorted_eigenpairs
from bilens.layer.eigen.solve import Method, top_eigenpairs
from bilens.layer.hosvd import HOSVD, input_gram, output_gram, singular
from bilens.layer.inner import inner_products
from bilens.layer.pairs import top_pairs
from bilens.layer.reading import Lexicon
from bilens.layer.triples import top_triples
from bilens.model.loading import load_model
from bilens.model.tokenization import token_strings
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.features.examples import names_from_texts
from bilens.sae.features.names import FeatureNames
from bilens.sae.loading import HUB_OPTIONS, load_saes, sae_source, saes_on_layer
from bilens.sae.passes import SAEPass
from bilens.sae.texts import example_texts, text_starts
from bilens.sae.view import SAEView

Side = Literal["encoder", "decoder"]
Basis = Literal["residual", "features"]
OUTSIDE = "layer {} is outside the model's {} layers"


class Decomposer:
    """Interaction matrices, eigencircuits and exact attributions of one bilinear layer.

    Args:
        model: a bilinear model.
        layer: the layer of the MLP; a negative one counts from the end.
        input_sae: an SAE on the layer's `ln2.hook_normalized`. One on `hook_resid_mid` differs by each token's norm
            scale: `attribute` takes that exactly, weight-only analyses in its basis are refused.
        output_sae: an SAE on the layer's `hook_mlp_out`.
        input_names, output_names: labels of the features, one each, for tables and plots.

    Wherever an `output` is taken, integers (one, or several) mean features of the output SAE and floats, of shape
    `(d_model,)` or `(n, d_model)`, mean directions in the layer's output space, used as they are.

    The shapes of answers: `directions`, `interaction`, `linear`, `constant` and `eigen` are indexed as the `output` is.
    Several outputs put an axis in front of what is found of each; one does not. All other answers are tables, with rows
    for each output also where there is one, and `inner_products` is outputs by outputs.

    SAEs in half precision are read in float32 at least: the expansion is exact only where the SAE's own rounding is.

    Model and SAEs are read anew at every call, so what is done to their weights, and where they are moved to, counts
    from then on. The numbers that a call returns are of the weights at that time; the directions that they are named
    after are the SAE's or model's own.

    Raises:
        ArgumentError: no model of bilens; as many names as features are needed, and an integer for the layer.
        CheckpointError: weights that are not finite.
        NotBilinearError: a gated or one-branch model.
        SAEMismatchError: an SAE of another width, hook or layer.
        OutOfRangeError: no such layer.
    """

    def __init__(
        self,
        model: HookedBilinearTransformer,
        layer: SupportsIndex,
        input_sae: SAE[Any] | None = None,
        output_sae: SAE[Any] | None = None,
        *,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
    ):
        check_bilinear(model)
        n_layers = model.cfg.n_layers
        self.model = model
        self.layer = check_index(layer, n_layers, OUTSIDE, negative=True)
        BilinearLayer.of(model, self.layer)  # refuses what cannot be read
        at = f"blocks.{self.layer}"
        self.normalized_hook, self.resid_mid_hook = f"{at}.ln2.hook_normalized", f"{at}.hook_resid_mid"
        self.scale_hook, self.out_hook = f"{at}.ln2.hook_scale", f"{at}.hook_mlp_out"
        self._input = self._view(input_sae, "input", (self.normalized_hook, self.resid_mid_hook))
        self._output = self._view(output_sae, "output", (self.out_hook,))
        self.input_names = self._check_names(input_names, self._input, "input")
        self.output_names = self._check_names(output_names, self._output, "output")

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | HookedBilinearTransformer | None = None,
        layer: SupportsIndex = 0,
        *,
        saes: str | os.PathLike[str] | Sequence[SAE[Any] | str | os.PathLike[str]] | None = None,
        expansion: int | None = None,
        k: int | None = None,
        tag: str | None = None,
        texts: Sequence[str] | None = None,
        **options: Any,
    ) -> "Decomposer":
        """A model, the SAEs on one MLP's input and output, and names of their features, from where they are published.

        Features have the names that are kept beside the SAEs (`names.json`), or else are named after what they fire on;
        then the texts run when a name is first asked for: by a table, a plot or a page, not by numbers.

        Args:
            source: a bundled name, a folder or a hub id, as for `bilens.load_model`; or a model.
            layer: the layer of the MLP; a negative one counts from the end.
            saes: the source of the SAEs for `bilens.load_saes`; `None` is the bundled model's, or `<source>-scope`.
                Or a list of SAEs, or of folders of one SAE each, of which those on this layer's MLP are taken.
            expansion, k, tag: the SAEs to take, if the source holds several.
            texts: texts to see what features fire on; `None` takes those that come with a bundled model, or has the
                model write some.
            options: the keyword arguments of `bilens.load_model`.

        Raises:
            ModelNotFoundError: no such model, or no SAEs of it.
            NotBilinearError: a gated or one-branch model.
            SAEMismatchError: several SAEs that fit.
            others: the same as for `Decomposer`, `bilens.load_model` and `bilens.load_sae`.
        """
        model = source if isinstance(source, HookedBilinearTransformer) else load_model(source, **options)
        check_bilinear(model)  # no SAEs would help
        layer = check_index(layer, model.cfg.n_layers, OUTSIDE, negative=True)
        place = sae_source(model.cfg.model_name) if saes is None else saes
        if isinstance(place, str | os.PathLike):
            hub = {name: value for name, value in options.items() if name in HUB_OPTIONS and name != "revision"}
            points = ("mlp-in", "mlp-out")
            pair = load_saes(place, points, [layer], expansion, k, tag, device=model.cfg.device, **hub)
        else:
            pair = list(saes_on_layer(place, layer, device=model.cfg.device))
        names = names_from_texts(model, pair, texts) if model.tokenizer is not None else (None, None)
        return cls(model, layer, *pair, input_names=names[0], output_names=names[1])

    def __repr__(self) -> str:
        views = {"input_sae": self._input, "output_sae": self._output}
        saes = [f"{name} of {v.d_sae} features on {v.hook_name!r}" for name, v in views.items() if v is not None]
        return f"Decomposer({', '.join([str(self.model.cfg.model_name), f'layer {self.layer}', *saes])})"

    @property
    def weights(self) -> BilinearLayer:
        """The layer's weights as they are in the model now, in float32 at least."""
        return BilinearLayer.of(self.model, self.layer)

    @property
    def input_sae(self) -> SAE[Any] | None:
        return None if self._input is None else self.input_view.sae

    @property
    def output_sae(self) -> SAE[Any] | None:
        return None if self._output is None else self.output_view.sae

    @property
    def input_view(self) -> SAEView:
        """The input SAE as directions, as it is now; raises `MissingSAEError` where there is none."""
        self._input = self._need("input").current()
        return self._input

    @property
    def output_view(self) -> SAEView:
        """The output SAE as directions, as it is now; raises `MissingSAEError` where there is none."""
        self._output = self._need("output").current()
        return self._output

    # --- from the weights alone ---------------------------------------------------------------------------------------

    @typed
    def interaction(
        self, output: Output, basis: Basis = "residual", side: Side = "encoder", *, memory: int = 2**32
    ) -> Float[Tensor, "*n d d"]:
        """The symmetric interaction matrix of each output: `u . mlp(x) = x^T Q_u x` (plus bias terms).

        Args:
            output: features or directions (see the class).
            basis: `"residual"` (d = d_model) or `"features"` (d = the input SAE's d_sae: `D Q D^T` with its decoder).
            side: the encoder or decoder direction of an output feature; does not matter for directions.
            memory: bytes to work in, and at most as many for the result; 4 GiB by default.

        Raises:
            ArgumentError: the output is neither features nor directions, there is no such basis or side, or `memory` is
                less than that.
            MissingSAEError: features without an output SAE, or the feature basis without an input SAE.
            OutOfRangeError: no such feature.
            SAEMismatchError: directions of another width, the feature basis of an SAE on `hook_resid_mid`, or the
                encoder side of an SAE that has no encoder directions.
        """
        u, directions = self.directions(output, side), None if basis == "residual" else self.input_directions()
        width, count = u.shape[-1] if directions is None else len(directions), u.shape[:-1].numel()
        (d_model, d_mlp), size = self.weights.W_gate.shape, u.element_size()
        call = f"interaction of {count:,} outputs ({width:,} x {width:,} each)"
        check_budget(call, count * width**2 * size, memory, "ask for fewer outputs at a time")
        at_once = how_many_fit(call, size * (d_model * d_mlp + 3 * d_model**2 + 3 * width**2), memory)
        found = u.new_empty(*u.shape[:-1], width, width)
        for rows, made in zip(
            u.view(-1, d_model).split(at_once), found.view(-1, width, width).split(at_once), strict=True
        ):
            matrix = interaction_matrix(self.weights, rows)
            made.copy_(matrix if directions is None else in_basis(matrix, directions))
        return found

    @typed
    def linear(self, output: Output, side: Side = "encoder") -> Float[Tensor, "*n d_model"]:
        """The part of each output linear in the layer's input; zeros for a model without MLP biases."""
        return linear_term(self.weights, self.directions(output, side))

    @typed
    def constant(self, output: Output, side: Side = "encoder") -> Float[Tensor, "*n"]:
        """The part of each output that does not depend on the layer's input."""
        return constant_term(self.weights, self.directions(output, side))

    @typed
    def eigen(
        self,
        output: Output,
        k: int | None = None,
        side: Side = "encoder",
        *,
        order: Order | Ranking | None = None,
        metric: Metric | None = None,
        fit: Fit | None = None,
        memory: int = MEMORY,
    ) -> Eigencircuits:
        """The squares `lambda (v . x)^2` that each output is a sum of: by the weights alone, or where it fires.

        For what a feature does, run texts once and give them along: `d.eigen(101, k=2, fit=d.firing())` finds the two
        squares that follow the feature best on the tokens where it fires. Without texts the answer is of the weights:
        eigenpairs by falling `|lambda|`, the first of which are often silent where the feature fires.

        Whatever the metric, `x^T Q x` is exactly the squares and what is left, `R = Q - sum lambda v v^T`:

        - `"weights"`: eigenpairs of `Q`; all of them leave nothing. A few pairs of many outputs are found without
          forming their matrices, to a relative 1e-4 of each value, as `spectra` finds them, which also says how exact
          each is; otherwise each matrix is solved whole, in float64.
        - `"firing"`: eigenpairs of `M^1/2 Q M^1/2`, mapped back, with `M` the second moment of the layer's input where
          the feature fires, shrunk towards that of all tokens; all of them leave nothing.
        - `"mean"`: the same around the mean there, `m^T Q m + 2 (Q m) . (x - m)` and squares of `x - m`; all of them
          leave nothing.
        - `"fitted"`: the `k` squares after which least is left where the feature fires; see
          `bilens.layer.eigen.fitted`. The best two are not the best one and another.

        Args:
            output: the same as for `interaction`; features if texts are used.
            k: the number of squares; `None` gives all `d_model`.
            side: the same as for `interaction`.
            order: `"size"`; `"positive"`, the most positive first; `"negative"`, the most negative first; on texts also
                `"variance"` and `"mean"`, by the variance and the mean of each square where the feature fires. `None`
                is by size without texts and by variance with them.
            metric: `None` is `"weights"` without texts, or with another order than `None`; otherwise `"fitted"`.
            fit: what `firing` gives, or texts for it; `None` is its example texts, if the metric or order needs any.
            memory: bytes to work in, and at most as many for the result; 1 GiB by default. For the texts see `firing`.

        Raises:
            ArgumentError: less memory than that, or directions that are not finite; directions, where texts are used;
                no such metric or order; `"fitted"` without a number; and as for `interaction`.
            OutOfRangeError: `k` is not in 1..d_model; no such feature.
            SAEMismatchError: `fit` is of another layer or SAE.
        """
        u, d_model = self.directions(output, side), self.model.cfg.d_model
        on_texts = fit is not None or metric not in (None, "weights") or order in get_args(Ranking)
        if metric is None:
            metric = "fitted" if on_texts and order is None else "weights"
        order = order or ("variance" if on_texts else "size")
        check_pairs(d_model, k, "size" if order in get_args(Ranking) else order)
        if metric == "fitted" and k is None:
            raise ArgumentError(
                'k is None: expected how many squares to fit, such as 2. All squares of Q are those of metric="firing".'
            )
        batch, pairs = u.shape[:-1], d_model if k is None else k
        check_budget(
            f"eigen ({pairs} pairs of {batch.numel():,} outputs)",
            batch.numel() * pairs * (d_model + 4) * self.weights.W_out.element_size(),
            memory,
            "ask for fewer pairs (`k`) or for fewer outputs at a time",
        )
        rows, note = u.reshape(-1, d_model), ""
        if on_texts:
            features, firing = self._features(output), self._firing(fit)
            parts = circuits_where_it_fires(self.weights, rows, features, firing, pairs, metric, order)  # type: ignore[arg-type]
            silent = features[firing.n_active[features] == 0].tolist()
            if silent:
                note = f"Not firing on the texts, and so by all tokens: {', '.join(map(str, silent[:8]))}."
        else:
            found = top_eigenpairs(self.weights, rows, pairs, order=order, memory=memory, progress=False)  # type: ignore[arg-type]
            parts = {name: getattr(found, name) for name in ("values", "vectors", "norms")}
            if not self._read(output).is_floating_point():
                note = "By the weights alone: some may be silent where the feature fires. See fit=d.firing()."
        parts = {name: part.view(batch + part.shape[1:]) for name, part in parts.items()}
        decoder = None if self._input is None else self.input_view.decoder.to(u)
        return Eigencircuits(
            **parts,
            outputs=self._numbers(output),
            decoder=decoder,
            names=self.input_names,
            metric=metric,
            note=note,
        )

    def _firing(self, fit: Fit | None, **options: int) -> Firing:
        """What `fit` stands for, checked.

        Raises:
            SAEMismatchError: of another layer or SAE.
        """
        if not isinstance(fit, Firing):
            return self.firing(fit, **options)
        d_sae, d_model = self.output_view.d_sae, self.model.cfg.d_model
        if (fit.layer, len(fit.n_active), fit.inputs.shape[1]) != (self.layer, d_sae, d_model):
            raise SAEMismatchError(
                f"fit is of layer {fit.layer}, with {len(fit.n_active)} output features and d_model "
                f"{fit.inputs.shape[1]}; this is layer {self.layer}, with {d_sae} and {d_model}. Make it with this "
                "Decomposer's own firing()."
            )
        return fit

    @typed
    def top_interactions(
        self,
        output: Output,
        n: int = 50,
        side: Side = "encoder",
        *,
        activations: Float[Tensor, "d_sae"] | None = None,
        memory: int = MEMORY,
    ) -> Interactions:
        """The `n` largest interactions of each output between input features, self and cross together.

        The matrix of all pairs is never held whole: see `bilens.layer.pairs`.

        Args:
            output: the same as for `interaction`.
            n: the number of pairs for each output, at most `d_sae (d_sae + 1) / 2`.
            side: the same as for `interaction`.
            activations: typical activation of each input feature, such as `FeatureActivations.typical_activations`
                gives: ranks by `|coefficient * f_i * f_j|`. Without, by `|coefficient|`, which is per unit of
                activation; where the decoder rows are not of one length, that says more of the SAE's units than of the
                layer, and the result says so.
            memory: bytes to work in, and at most as many for the result; 1 GiB by default.

        Raises:
            ArgumentError: less memory than the smallest blocks take; and as for `interaction`.
        """
        directions, u = self.input_directions(), torch.atleast_2d(self.directions(output, side))
        if activations is not None and activations.shape != (len(directions),):
            raise ArgumentError(
                f"activations of shape {tuple(activations.shape)}, expected one for each of the {len(directions)} "
                "input features."
            )
        fires = None if activations is None else activations.to(u)
        scaled = directions if fires is None else directions * fires[:, None]
        found = [top_pairs(self.weights, one, scaled, None, n, memory=memory) for one in u]
        i, j, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        row = torch.arange(len(u), device=i.device).repeat_interleave(n)
        return self._interactions(
            output,
            row,
            i,
            j,
            scores if fires is None else triple_coefficients(self.weights, u, directions, row, i, j),
            weight=None if fires is None else fires[i] * fires[j],
            note=unequal_rows(directions) if fires is None else "",
        )

    @typed
    def between(
        self,
        output: Output,
        left: Float[Tensor, "l _"],
        right: Float[Tensor, "r _"] | None = None,
        n: int = 50,
        side: Side = "encoder",
        *,
        left_names: Sequence[str] | None = None,
        right_names: Sequence[str] | None = None,
        memory: int = MEMORY,
    ) -> Interactions:
        """The `n` largest interactions of each output between any two sets of input directions.

        Such as tokens with tokens, or with what a head moves here: `bilens.decompose.directions`. The matrix of all
        pairs is never held whole, so both sets may be a vocabulary.

        Args:
            output: the same as for `interaction`.
            left: directions in the layer's input: the `i` of the pairs.
            right: the directions or features of the other set, the `j`; `None` is pairs within `left`.
            n: the number of pairs for each output.
            side: the same as for `interaction`.
            left_names, right_names: one each, for tables and plots.
            memory: bytes to work in, and at most as many for the result; 1 GiB by default.

        Raises:
            ArgumentError: there are not as many names as directions, or less memory than the smallest blocks take.
            OutOfRangeError: fewer than `n` pairs.
            SAEMismatchError: directions of another width.
        """
        sides = {"left": (left, left_names), "right": (right, right_names)}
        for name, (rows, names) in sides.items():
            if rows is not None and rows.shape[1] != self.model.cfg.d_model:
                raise SAEMismatchError(
                    f"{name} directions of shape {tuple(rows.shape)}: the layer reads {self.model.cfg.d_model} "
                    "dimensions."
                )
            if names is not None and len(names) != (0 if rows is None else len(rows)):
                raise ArgumentError(
                    f"{len(names)} {name}_names for {0 if rows is None else len(rows)} {name} directions."
                )
        layer, u = self.weights, torch.atleast_2d(self.directions(output, side))
        others = None if right is None else right.to(u)
        found = [top_pairs(layer, direction, left.to(u), others, n, memory=memory) for direction in u]
        i, j, coefficients = (torch.cat(parts) for parts in zip(*found, strict=True))
        row = torch.arange(len(u)).repeat_interleave(n)
        ends = left_names, left_names if right is None else right_names
        return self._interactions(output, row, i, j, coefficients, ends=ends, one_set=right is None)

    @overload
    def spectra(
        self,
        output: Output | None = None,
        k: int = 2,
        side: Side = "encoder",
        *,
        fit: None = None,
        full: bool = False,
        memory: int = MEMORY,
        method: Method = "auto",
        progress: bool = True,
    ) -> Spectra: ...

    @overload
    def spectra(
        self, output: Output | None = None, k: int = 2, side: Side = "encoder", *, fit: Fit, memory: int = MEMORY
    ) -> FiringSpectra: ...

    @typed
    def spectra(
        self,
        output: Output | None = None,
        k: int = 2,
        side: Side = "encoder",
        *,
        fit: Fit | None = None,
        full: bool = False,
        memory: int = MEMORY,
        method: Method = "auto",
        progress: bool = True,
    ) -> Spectra | FiringSpectra:
        """Leading eigenpairs, shares, norms and traces of outputs, all features at once by default.

        With `fit`, the leading squares of features in the metric of the tokens on which they fire, as
        `eigen(metric="firing", order="size")` gives them one by one, faster.

        Args:
            output: the same as for `interaction`; `None` is every output feature.
            k: leading eigenpairs of each.
            side: the same as for `interaction`.
            fit: what `firing` gives, or texts for it; of what follows it takes only `memory`.
            full: also the effective rank, from all eigenvalues: the cost of forming and solving each matrix.
            memory: bytes to work in, and at most as many for the result; 1 GiB by default.
            method: the method that finds the leading pairs; see `bilens.layer.eigen.solve.top_eigenpairs`.
            progress: show a bar.

        Raises:
            ArgumentError: directions, where texts are used; less memory than it takes.
            MissingSAEError: features, or all of them, without an output SAE.
            OutOfRangeError: no such feature, or `k` is not in 1..d_model.
            SAEMismatchError: `fit` is of another layer or SAE.
        """
        output = self._every(output)
        u = torch.atleast_2d(self.directions(output, side))
        if fit is not None:
            check_pairs(self.model.cfg.d_model, k, "size")
            features, firing = self._features(output), self._firing(fit)
            of_layer = spectra_where_they_fire(self.weights, u, features, firing, k, memory)
            return replace(of_layer, names=self.output_names)
        inputs = self.input_directions() if self._reads_layer_input else None
        options = {"full": full, "memory": memory, "method": method, "progress": progress}
        found = find_spectra(self.weights, u, k, inputs=inputs, **options)  # type: ignore[arg-type]
        return replace(found, outputs=self._numbers(output), names=self._output_names_of(output))

    @overload
    def fidelity(
        self,
        texts: Iterable[str],
        output: Output | None = None,
        k: int = 10,
        *,
        fit: None = None,
        batch_size: int = 16,
        memory: int = MEMORY,
    ) -> Fidelity: ...

    @overload
    def fidelity(
        self,
        texts: Fit,
        output: Output | None = None,
        k: int = 10,
        *,
        fit: Fit,
        batch_size: int = 16,
        memory: int = MEMORY,
    ) -> FidelityComparison: ...

    @torch.no_grad()
    def fidelity(
        self,
        texts: Fit,
        output: Output | None = None,
        k: int = 10,
        *,
        fit: Fit | None = None,
        batch_size: int = 16,
        memory: int = MEMORY,
    ) -> Fidelity | FidelityComparison:
        """How well the `k` leading eigencircuits, and every smaller number of them, reproduce features on texts.

        With `fit`, other texts, the ways to choose or find eigencircuits by what they do there are compared: by
        variance, by mean, in the firing metric, with a linear term, and fitted (see `eigen`). That takes a tenth of a
        second or more for each feature.

        Args:
            texts: each is run from its `[BOS]`, cut to the context; with `fit` also what `firing` gave.
            output: output features; `None` is all of them.
            k: the largest number of eigenpairs.
            fit: other texts, or what `firing` gave of them.
            batch_size: texts at a time.
            memory: bytes to work in besides the model's pass, and at most as many for the result; 1 GiB by default.

        Raises:
            AlteredModelError: SAEs are attached to the model, or there are hooks on it or on the SAE.
            ArgumentError: a batch size that is no positive whole number; directions instead of features; less memory
                than the eigenvectors and one token take.
            EmptyTextError: no texts, or one with nothing in it.
            MissingSAEError: no output SAE.
            OutOfRangeError: no such feature, or more eigenpairs than `d_model`.
            SAEMismatchError: `fit` is of another layer or SAE.
        """
        view = self.output_view
        require_bare(self.model, view.sae)
        features = self._features(self._every(output))
        if fit is not None:
            check_pairs(self.model.cfg.d_model, k, "size")
            measured, fitted = (self._firing(given, batch_size=batch_size, memory=memory) for given in (texts, fit))
            return compare_methods(self.weights, self.directions(features), features, measured, fitted, k)
        if isinstance(texts, Firing):
            raise ArgumentError(
                "texts is what firing gave, which only a comparison takes: give `fit` besides, or texts."
            )
        run = self.run_texts(texts, batch_size)
        tokens = max(1, memory // (4 * view.d_sae * 24))  # a quarter of it for the activations of all features
        parts = (part for x, y in run for part in zip(x.split(tokens), y.split(tokens), strict=True))
        batches = ((x, y, view.activations(y)[:, features]) for x, y in parts)
        found = measure_fidelity(self.weights, self.directions(features), batches, k, 3 * memory // 4)
        return replace(found, features=features, names=self.output_names)

    # --- sparse structure ---------------------------------------------------------------------------------------------

    @typed
    def strongest_interactions(
        self,
        n: int = 1000,
        output: Output | None = None,
        side: Side = "encoder",
        *,
        inputs: Output | None = None,
        weights: Float[Tensor, "d_sae d_sae"] | None = None,
        memory: int = MEMORY,
        progress: bool = True,
    ) -> Interactions:
        """The `n` largest interactions over all (output, input, input) triples of the layer, exactly.

        Of several layers: `bilens.decompose.strongest_interactions`.

        Args:
            n: the number of interactions.
            output: the same as for `interaction`; `None` is every output feature.
            side: the same as for `interaction`.
            inputs: between these input features only.
            weights: the weight of every pair of input features, as `FeatureActivations.cofiring` gives it: ranks by
                `|coefficient * weight|`.
            memory: bytes to work in, and at most as many for the result; 1 GiB by default.
            progress: show a bar.

        Raises:
            ArgumentError: weights that are not finite or not symmetric, or less memory than the smallest step takes.
            OutOfRangeError: no such feature, or fewer than `n` triples.
            SAEMismatchError: weights of another size than there are input features.
        """
        found = self._strongest(n, output, side, inputs, weights, memory=memory, progress=progress)
        note = unequal_rows(self.input_directions()) if weights is None else ""
        return replace(found, note=note)

    def _strongest(
        self,
        n: int,
        output: Output | None,
        side: Side,
        inputs: Output | None,
        weights: Float[Tensor, "d_sae d_sae"] | None,
        *,
        floor: float = 0.0,
        at_most: bool = False,
        **options: Any,
    ) -> Interactions:
        """Those of `|score|` of at least `floor`; with `at_most`, fewer where there are fewer triples than `n`."""
        output = self._every(output)
        u, directions = torch.atleast_2d(self.directions(output, side)), self.input_directions()
        features = torch.arange(len(directions))
        if inputs is not None:
            features = self._input_features(inputs).unique()
            weights = None if weights is None else weights[features][:, features]
        if at_most:
            n = min(n, len(u) * len(features) * (len(features) + 1) // 2)
        found = top_triples(self.weights, u, directions[features], n, weights=weights, floor=floor, **options)
        weight = None if weights is None else weights.cpu().double()[found.i, found.j]
        pairs = found.outputs, features[found.i], features[found.j], found.coefficients
        return self._interactions(output, *pairs, weight=weight, method=found.method)

    @typed
    def sparsity(
        self,
        output: Output | None = None,
        side: Side = "encoder",
        *,
        fence: float = 1.5,
        memory: int = MEMORY,
        progress: bool = True,
    ) -> Sparsity:
        """Outlier counts, quartiles and excess kurtosis of each output's interactions between input features.

        Args:
            output: the same as for `interaction`; `None` is every output feature.
            side: the same as for `interaction`.
            fence: outliers are beyond `q1 - fence iqr` or `q3 + fence iqr`.
            memory: bytes to work in, and at most as many for the result; 1 GiB by default.
            progress: show a bar.

        Raises:
            ArgumentError: a negative fence, or less memory than the smallest blocks take; and as for `interaction`.
        """
        output = self._every(output)
        u, inputs = torch.atleast_2d(self.directions(output, side)), self.input_directions()
        found = measure_sparsity(self.weights, u, inputs, fence=fence, memory=memory, progress=progress)
        return replace(found, outputs=self._numbers(output), output_names=self._output_names_of(output))

    @typed
    def outliers(
        self,
        output: Output,
        n: int | None = 1000,
        side: Side = "encoder",
        *,
        fence: float = 1.5,
        memory: int = MEMORY,
        progress: bool = True,
    ) -> Interactions:
        """The outlier interactions of each output, the largest first.

        Args:
            output: the same as for `interaction`.
            n: the largest number of outliers for each output; `None` is all.
            side: the same as for `interaction`.
            fence: the same as for `sparsity`.
            memory: bytes to work in, and at most as many for the result; 1 GiB by default.
            progress: show a bar.

        Raises:
            ArgumentError: the same cases as for `sparsity`, or more outliers than fit the memory.
            OutOfRangeError: `n` below 1.
        """
        u, inputs = torch.atleast_2d(self.directions(output, side)), self.input_directions()
        found = find_outliers(self.weights, u, inputs, n, fence=fence, memory=memory, progress=progress)
        return self._interactions(output, *found)

    @typed
    def motifs(
        self,
        output: Output | None = None,
        kind: str | None = None,
        n: int = 100,
        side: Side = "encoder",
        *,
        activations: Float[Tensor, "d_sae"] | None = None,
        together: Float[Tensor, "d_sae d_sae"] | None = None,
        fence: float = 1.5,
        memory: int = MEMORY,
        progress: bool = True,
    ) -> Motifs:
        """The strongest AND, XOR, negation and inhibition motifs among the outlier pairs (`bilens.decompose.motifs`).

        Args:
            output: the same as for `interaction`; `None` is every output feature.
            kind: one of them alone: `"and"`, `"xor"`, `"negation"` or `"inhibition"`.
            n: the number of motifs to list, over all outputs.
            side: the same as for `interaction`.
            activations: typical activation of each input feature, such as
                `FeatureActivations.typical_activations` gives.
            together: only pairs where this is not zero, such as `FeatureActivations.cofiring` gives.
            fence: the same as for `sparsity`.
            memory: bytes to work in, and at most as many for the result; 1 GiB by default.
            progress: show a bar.

        Raises:
            ArgumentError: the same cases as for `sparsity` and `bilens.decompose.motifs.find_motifs`.
        """
        output = self._every(output)
        u, inputs = torch.atleast_2d(self.directions(output, side)), self.input_directions()
        found = find_motifs(
            self.weights,
            u,
            inputs,
            n,
            kind=kind,
            activations=activations,
            together=together,
            fence=fence,
            memory=memory,
            progress=progress,
        )
        return replace(
            found,
            outputs=self._numbers(output)[found.outputs.cpu()],
            input_names=self.input_names,
            output_names=self._output_names_of(output),
        )

    # --- between outputs ----------------------------------------------------------------------------------------------

    @typed
    def inner_products(
        self, output: Output, basis: Basis = "residual", side: Side = "encoder", *, memory: int = MEMORY
    ) -> Float[Tensor, "n n"]:
        """`<Q_u, Q_w>` of every two outputs, exact from the factors, in float64.

        Of two layers or models: `bilens.layer.inner`.

        Args:
            output: the same as for `interaction`.
            basis: whose entries are multiplied: `"residual"`, or `"features"` for `D Q D^T`.
            side: the same as for `interaction`.
            memory: bytes to work in, and at most as many for the result; 1 GiB by default.

        Raises:
            ArgumentError: less memory than the result or the smallest step takes; and as for `interaction`.
        """
        u = torch.atleast_2d(self.directions(output, side))
        return inner_products(self.weights, u, metric=self._metric(basis), memory=memory)

    @typed
    def neighbours(
        self,
        output: Output | None = None,
        k: int = 8,
        basis: Basis = "residual",
        side: Side = "encoder",
        against: Side | None = None,
        *,
        memory: int = MEMORY,
    ) -> Neighbours:
        """The features nearest to each output feature by interaction matrix, and those nearest by direction.

        Args:
            output: features; `None` is all. Their neighbours are sought among all.
            k: neighbours of each.
            basis: the basis in which interaction matrices are compared.
            side: whose interaction matrices.
            against: whose directions are compared; `None` is `side`.
            memory: bytes to work in, and at most as many for the result; 1 GiB by default.

        Raises:
            ArgumentError: directions instead of features, or less memory than the cosines of all features take.
            MissingSAEError: no output SAE.
            OutOfRangeError: no such feature, or fewer than `k` others.
        """
        everything = torch.arange(self.output_view.d_sae)
        chosen = everything if output is None else self._features(output)
        both = self._feature_cosines(everything, basis, side, against, memory)
        return Neighbours(
            outputs=chosen,
            by_interaction=nearest_others(both.interaction, chosen, k),
            by_direction=nearest_others(both.direction, chosen, k),
            cosines=both,
            features=everything,
            names=self.output_names,
        )

    @typed
    def clusters(
        self,
        output: Output | None = None,
        threshold: float | int = 0.3,
        basis: Basis = "residual",
        side: Side = "encoder",
        against: Side | None = None,
        linkage: Linkage = "average",
        *,
        memory: int = MEMORY,
    ) -> FeatureClusters:
        """Output features that do alike with their inputs: clusters of their interaction matrices.

        Args:
            output: features; `None` is all.
            threshold: the cosine of interaction matrices at which clusters are cut.
            basis, side, against: the same as for `neighbours`.
            linkage: the cosine of two clusters: that of their `"average"` pair, their least (`"complete"`) or most
                (`"single"`) similar one.
            memory: bytes to work in, and at most as many for the result; 1 GiB by default.

        Raises:
            ArgumentError: directions instead of features, or less memory than their cosines take.
            MissingSAEError: no output SAE.
            OutOfRangeError: no such feature, or a threshold outside -1..1.
        """
        if not -1 <= threshold <= 1:
            raise OutOfRangeError(f"threshold is {threshold}, expected a cosine, -1 to 1.")
        features = torch.arange(self.output_view.d_sae) if output is None else self._features(output)
        both = self._feature_cosines(features, basis, side, against, memory)
        return FeatureClusters(
            features, cluster(both.interaction, threshold, linkage), threshold, both, self.output_names
        )

    # --- without an output --------------------------------------------------------------------------------------------

    @typed
    def hosvd(self, k: int = 16, *, memory: int = MEMORY) -> HOSVD:
        """The layer's output and input directions by importance, and what the first `k` read.

        Args:
            k: output directions whose eigencircuits are computed.
            memory: bytes to work in, and at most as many for the result; 1 GiB by default.

        Raises:
            ArgumentError: less memory than the smallest step takes.
            OutOfRangeError: `k` is not in 1..d_model.
        """
        d_model = self.model.cfg.d_model
        if not 1 <= k <= d_model:
            raise OutOfRangeError(f"k is {k}, expected 1 to {d_model} directions.")
        output_values, output_directions = singular(output_gram(self.weights, memory))
        input_values, input_directions = singular(input_gram(self.weights, memory))
        return HOSVD(
            output_values=output_values,
            output_directions=output_directions,
            input_values=input_values,
            input_directions=input_directions,
            layer=self.weights.copy(),
            circuits=self.eigen(output_directions[:k].to(self.weights.W_out), memory=memory),
            outputs=self._lexicon("output"),
            inputs=self._lexicon("input"),
        )

    @typed
    def cp(
        self,
        rank: int,
        start: BilinearLayer | int | None = None,
        *,
        max_sweeps: int = 200,
        tolerance: float | int = 1e-5,
        memory: int = MEMORY,
        progress: bool = True,
    ) -> CPDecomposition:
        """The layer as `rank` hidden units that all outputs share; see `bilens.layer.cp.cp_decompose`."""
        options = {"max_sweeps": max_sweeps, "tolerance": tolerance, "memory": memory, "progress": progress}
        fit = cp_decompose(self.weights, rank, start, **options)  # type: ignore[arg-type]
        return replace(fit, outputs=self._lexicon("output"), inputs=self._lexicon("input"))

    @typed
    def cp_curve(
        self,
        ranks: Sequence[int],
        *,
        max_sweeps: int = 200,
        tolerance: float | int = 1e-5,
        memory: int = MEMORY,
        progress: bool = True,
    ) -> CPCurve:
        """`cp` at several ranks: how the fit grows with the number of hidden units."""
        if not ranks:
            raise ArgumentError("ranks is empty, expected numbers of hidden units.")
        options = {"max_sweeps": max_sweeps, "tolerance": tolerance, "memory": memory, "progress": progress}
        return CPCurve([self.cp(rank, **options) for rank in ranks])  # type: ignore[arg-type]

    # --- on texts -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self, tokens: Int[Tensor, "text pos"]
    ) -> tuple[Float[Tensor, "text pos d_model"], Float[Tensor, "text pos d_model"]]:
        """What the layer reads (`ln2.hook_normalized`) and what it writes (`hook_mlp_out`) on every token."""
        require_bare(self.model)
        if not isinstance(tokens, Tensor):
            raise ArgumentError(f"tokens is {tokens!r:.80}, expected a tensor of them; run_texts takes texts.")
        hooks = [self.normalized_hook, self.out_hook]
        tokens = tokens.to(self.model.cfg.device)
        _, cache = self.model.run_with_cache(
            tokens, names_filter=hooks, stop_at_layer=self.layer + 1, return_cache_object=False
        )
        return cache[hooks[0]], cache[hooks[1]]

    @torch.no_grad()
    def run_texts(
        self, texts: Iterable[str], batch_size: int = 16
    ) -> Iterator[tuple[Float[Tensor, "token d_model"], Float[Tensor, "token d_model"]]]:
        """`run` on all tokens of texts but their `[BOS]`, in batches of texts; in the dtype of `weights`.

        Raises:
            AlteredModelError: SAEs are attached to the model, or there are hooks on it.
            EmptyTextError: no texts, or one with nothing in it.
        """
        check_sizes(batch_size=batch_size)
        require_bare(self.model)
        tokens, mask = text_starts(self.model, texts)
        mask[:, : self.model.n_bos] = 0
        batch_size = min(batch_size, len(tokens))
        rows = list(zip(tokens.split(batch_size), mask.bool().split(batch_size), strict=True))
        for batch, kept in tqdm(rows, desc="texts", unit="batch"):
            x, y = (part[kept.to(part.device)].to(self.weights.W_out) for part in self.run(batch))
            yield x, y

    @torch.no_grad()
    def firing(self, texts: Iterable[str] | None = None, *, batch_size: int = 16, memory: int = MEMORY) -> Firing:
        """What the layer reads on texts, and where every output feature fires: what `fit` takes; the texts run once.

        Args:
            texts: each is run from its `[BOS]`, cut to the context; `None` takes those that come with a bundled model,
                or has the model write some.
            batch_size: texts at a time.
            memory: bytes that the result may take: `4 d_model` for each token, and 12 each time a feature fires.

        Raises:
            AlteredModelError: SAEs are attached to the model, or there are hooks on it or on the SAE.
            ArgumentError: less memory than that; a batch size that is no positive whole number.
            EmptyTextError: no texts, or one with nothing in it.
            MissingSAEError: no output SAE.
        """
        view = self.output_view
        require_bare(self.model, view.sae)
        inputs, entries, n, size = [], [], 0, 0
        for x, y in self.run_texts(example_texts(self.model) if texts is None else texts, batch_size):
            activations = view.activations(y)
            token, feature = activations.nonzero(as_tuple=True)
            inputs.append(x)
            entries.append((token.int() + n, feature.int(), activations[token, feature]))
            n, size = n + len(x), size + x.element_size() * x.numel() + 12 * len(token)
            check_budget(f"firing of the first {n:,} tokens", size, memory, "give fewer texts")
        token, feature, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
        order = feature.argsort(stable=True)
        counts = torch.bincount(feature, minlength=view.d_sae)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).cpu()
        return Firing(self.layer, torch.cat(inputs), token[order], value[order], offsets, self.output_names)

    @typed
    @torch.no_grad()
    def attribute(
        self,
        text_or_tokens: str | Sequence[int] | Int[Tensor, "p"] | Int[Tensor, "1 p"],
        feature: SupportsIndex,
        position: SupportsIndex,
        *,
        circuits: Eigencircuits | None = None,
        fit: Fit | None = None,
    ) -> Attribution:
        """The exact expansion of one output feature's pre-activation at one token: by eigencircuits, and by pairs.

        Args:
            text_or_tokens: one text (`[BOS]` is prepended), or its tokens as they are.
            feature: a feature of the output SAE, active there or not.
            position: `[BOS]` counted; negative counts from the end.
            circuits: the sum of squares to tell it by; all of it, for the parts have to add up. `None` takes those of
                `fit`, or the eigenpairs of the interaction matrix, from the weights alone.
            fit: what `firing` gives, or texts for it: the squares of `eigen(feature, metric="firing")` are taken, of
                which fewest are needed.

        Raises:
            AlteredModelError: SAEs are attached to the model, or there are hooks on it or on an SAE.
            ArgumentError: several texts, a feature or position that is no integer, circuits that do not add up, or
                both circuits and `fit`.
            EmptyTextError, ContextLengthError: the text does not fit.
            MissingSAEError: it needs both SAEs.
            OutOfRangeError: no such feature or position.
            SAEMismatchError: `fit` is of another layer or SAE.
        """
        view_in, view_out = self.input_view, self.output_view
        require_bare(self.model, view_in.sae, view_out.sae)
        feature = check_feature(feature, view_out.d_sae)
        if fit is not None:
            if circuits is not None:
                raise ArgumentError("there are both circuits and fit, which finds others: expected one of them.")
            circuits = self.eigen(feature, metric="firing", fit=fit)
        if not isinstance(text_or_tokens, str | Tensor):
            text_or_tokens = torch.tensor(text_or_tokens)
        tokens = self.model.input_to_tokens(text_or_tokens)
        position = check_index(
            position, tokens.shape[1], "position {} is outside the text's {} tokens (with [BOS])", negative=True
        )
        names = [self.normalized_hook, self.resid_mid_hook, self.scale_hook, self.out_hook]
        _, cache = self.model.run_with_cache(
            tokens, names_filter=names, stop_at_layer=self.layer + 1, return_cache_object=False
        )
        # In float64: only the model's own rounding remains.
        site = self.resid_mid_hook if self._on_resid_mid(view_in) else self.normalized_hook
        x, y = cache[site][0, [position]], cache[self.out_hook][0, [position]]
        read = SAEPass.of(view_in, site, x, torch.float64)
        written = SAEPass.of(view_out, self.out_hook, y, torch.float64)
        sources, ones = read.sources(cache[self.scale_hook][0, position].double(), 0)
        here = torch.zeros(1, dtype=torch.long, device=sources.device)
        u, output_bias = written.reads(here, here + feature)
        weights = self.weights.to(torch.float64)
        contributions = pair_products(weights, u[0], branches(weights, sources, ones), ones)
        inputs, activations = read.features[0], read.values[0]
        pairs = contributions[: len(inputs), : len(inputs)]
        common: dict[str, Any] = {
            "layer": self.layer,
            "feature": feature,
            "position": position,
            "tokens": token_strings(self.model.tokenizer, tokens[0]),
            "inputs": inputs,
            "activations": activations,
            "actual": view_out.pre_activations(y)[0, feature].item(),
            "active": bool(view_out.activations(y)[0, feature] != 0),
            "input_names": self.input_names,
            "output_names": self.output_names,
            "dtype": self.model.cfg.dtype,
        }
        if circuits is None:
            values, vectors = sorted_eigenpairs(interaction_matrix(weights, u[0]))
        else:  # they are of the encoder's own direction: the SAE's scale on this token is in `u`
            values, vectors = circuits.values.to(u) * written.scale_in[0], circuits.vectors.to(u)
        explanation = explain(weights, u[0], sources[:-1], values, vectors, output_bias=output_bias[0].item(), **common)
        return Attribution(
            interactions=(pairs / (activations[:, None].double() * activations)).float(),
            contributions=contributions.float(),
            output_bias=output_bias[0].float().item(),
            explanation=explanation,
            **common,
        )

    # --- directions ---------------------------------------------------------------------------------------------------

    @typed
    def directions(self, output: Output, side: Side = "encoder") -> Float[Tensor, "*n d_model"]:
        """The output direction(s) `u` that an `output` stands for."""
        like, read = self.weights.W_out, self._read(output)
        if read.is_floating_point():
            return read.to(like)
        directions = self.output_view.directions(side).to(like)
        for feature in read.flatten().tolist():
            check_feature(feature, len(directions))
        return directions[read.long().to(like.device)]

    def _read(self, output: Output) -> Tensor:
        return read_output(output, self.model.cfg.d_model)

    def _numbers(self, output: Output) -> Int[Tensor, "n"]:
        """What to call the outputs: features by their numbers, directions by their places."""
        read = self._read(output)
        return torch.arange(read[..., 0].numel()) if read.is_floating_point() else read.reshape(-1)

    def _every(self, output: Output | None) -> Output:
        """`output` itself, or every output feature for `None`."""
        return torch.arange(self.output_view.d_sae) if output is None else output

    def _output_names_of(self, output: Output) -> Sequence[str] | None:
        """The names that `_numbers` are of; `None` for directions, and where there are none."""
        return None if self._read(output).is_floating_point() else self.output_names

    def _features(self, output: Output) -> Int[Tensor, "n"]:
        """Output features as a tensor of their numbers.

        Raises:
            ArgumentError: directions instead of features.
            OutOfRangeError: no such feature.
        """
        read = self._read(output)
        if read.is_floating_point():
            raise ArgumentError("these are directions; this needs output features, as integers.")
        n = self._need("output").d_sae
        return torch.tensor([check_feature(feature, n) for feature in read.reshape(-1).tolist()], dtype=torch.long)

    def _input_features(self, inputs: Output) -> Int[Tensor, "n"]:
        """Input features as a tensor of their numbers; raises as `_features` does."""
        read, n = self._read(inputs), self.input_view.d_sae
        if read.is_floating_point():
            raise ArgumentError("these are directions; this needs input features, as integers.")
        what = "feature {} is outside the input SAE's {}"
        return torch.tensor([check_index(feature, n, what) for feature in read.reshape(-1).tolist()], dtype=torch.long)

    def _interactions(
        self,
        output: Output,
        row: Int[Tensor, "n"],
        i: Int[Tensor, "n"],
        j: Int[Tensor, "n"],
        coefficient: Float[Tensor, "n"],
        ends: tuple[Sequence[str] | None, Sequence[str] | None] | None = None,
        **facts: Any,
    ) -> Interactions:
        """Pairs found for the outputs of these rows, on the CPU and with this layer's names."""
        names = PairNames(self._output_names_of(output), *(ends or (self.input_names, self.input_names)))
        weight = facts.pop("weight", None)
        return Interactions(
            layer=torch.full((len(i),), self.layer),
            output=self._numbers(output).cpu()[row.cpu()],
            i=i.cpu(),
            j=j.cpu(),
            coefficient=coefficient.cpu(),
            weight=None if weight is None else weight.cpu(),
            names={self.layer: names},
            **facts,
        )

    @property
    def _reads_layer_input(self) -> bool:
        """Whether there is an input SAE, and on what the layer reads: then features have fixed interactions."""
        return self._input is not None and not self._on_resid_mid(self._input)

    def input_directions(self) -> Float[Tensor, "d_sae d_model"]:
        view = self.input_view
        if self._on_resid_mid(view):
            raise SAEMismatchError(
                f"the input SAE is on {self.resid_mid_hook!r}: in the layer's input its directions are divided by each "
                f"token's norm scale, so they have no fixed interactions. Use an SAE on {self.normalized_hook!r}, or "
                "`attribute`, which takes the scale of its token."
            )
        return view.decoder.to(self.weights.W_out)

    def _metric(self, basis: Basis) -> Float[Tensor, "d_model d_model"] | None:
        """`D^T D` of the input features, in float64: what makes inner products those of the feature basis."""
        if basis == "residual":
            return None
        decoder = double(self.input_directions())
        return decoder.T @ decoder

    def _feature_cosines(
        self, features: Int[Tensor, "n"], basis: Basis, side: Side, against: Side | None, memory: int
    ) -> FeatureCosines:
        u, other = self.directions(features, side), self.directions(features, against or side)
        return feature_cosines(self.weights, u, other, self._metric(basis), memory)

    def _lexicon(self, which: Literal["input", "output"]) -> Lexicon:
        """What directions on one side of the layer are named after: the SAE's features, or tokens without an SAE."""
        view, names = (self._input, self.input_names) if which == "input" else (self._output, self.output_names)
        if view is not None:
            view = self.input_view if which == "input" else self.output_view
            return Lexicon("feature", view.decoder.to(self.weights.W_out), names)
        rows = (self.model.W_E if which == "input" else self.model.W_U.T).detach().to(self.weights.W_out)
        tokenizer = self.model.tokenizer
        strings = None if tokenizer is None else token_strings(tokenizer, torch.arange(len(rows)))
        return Lexicon("token", rows, strings)

    # --- SAEs ---------------------------------------------------------------------------------------------------------

    def _need(self, which: Literal["input", "output"]) -> SAEView:
        view = self._input if which == "input" else self._output
        if view is None:
            raise MissingSAEError(f"this needs an {which}_sae; the Decomposer was made without one.")
        return view

    def _on_resid_mid(self, view: SAEView) -> bool:
        """Whether the SAE reads the stream before the norm (without normalisation that is the same place)."""
        return view.hook_name == self.resid_mid_hook and self.model.cfg.normalization_type is not None

    def _view(self, sae: SAE[Any] | None, which: str, hooks: tuple[str, ...]) -> SAEView | None:
        if sae is None:
            return None
        view = SAEView.of(sae)
        if view.d_in != self.model.cfg.d_model:
            raise SAEMismatchError(
                f"the {which} SAE has d_in {view.d_in}, the model's d_model is {self.model.cfg.d_model}: "
                "is it an SAE of another model?"
            )
        if view.hook_name is not None and view.hook_name not in hooks:
            raise SAEMismatchError(
                f"the {which} SAE is on {view.hook_name!r}; layer {self.layer} needs one on "
                f"{' or '.join(map(repr, hooks))}."
            )
        return view

    @staticmethod
    def _check_names(names: Sequence[str] | None, view: SAEView | None, which: str) -> Sequence[str] | None:
        n = view.d_sae if view else 0
        if names is None:
            return None
        if isinstance(names, str | Mapping | Tensor) or not hasattr(names, "__len__"):
            raise ArgumentError(f"{which}_names is {names!r:.80}, expected a list of {n} labels, one for each feature.")
        known = isinstance(names, FeatureNames)  # strings, found when they are asked for
        other = None if known else next((name for name in names if not isinstance(name, str)), None)
        if other is not None:
            raise ArgumentError(f"{which}_names holds {other!r}, expected strings.")
        if len(names) != n:
            raise ArgumentError(
                f"{len(names)} {which}_names for {n} {which} features"
                + (f": there is no {which}_sae." if not n else ".")
            )
        return names
