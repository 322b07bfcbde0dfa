"""One bilinear layer, read through SAE features.

    1. an output is a direction u in the layer's output space: an output feature's encoder row (what makes it fire), its
       decoder row (what it writes), or any vector
    2. the layer's weights turn u into a symmetric matrix Q_u over its input space (`interaction`)
    3. Q_u is read by its eigenvectors (`eigen`) or between input features (`interaction(basis="features")`,
       `top_interactions`)
    4. on a text, the same numbers times the active features' activations give the output feature's pre-activation,
       nothing left out (`attribute`)

Source: Pearce et al. 2025 (arXiv 2410.08417), sections 3 and 5; DESIGN section 4.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from bilens.decompose.eigen import sorted_eigenpairs
from bilens.decompose.outputs import Output, check_index, read_output
from bilens.decompose.results import Attribution, Eigencircuits, TopInteractions
from bilens.decompose.tensors import (
    BilinearLayer,
    constant_term,
    in_basis,
    interaction_matrix,
    linear_term,
    source_products,
)
from bilens.errors import ArgumentError, MissingSAEError, OutOfRangeError, SAEMismatchError
from bilens.model import HookedBilinearTransformer
from bilens.sae.view import SAEView
from bilens.typing import typed

Side = Literal["encoder", "decoder"]
Basis = Literal["residual", "features"]


class Decomposer:
    """Interaction matrices, eigencircuits and exact attributions of one bilinear layer.

    Args:
        model: a bilinear model.
        layer: which MLP; negative counts from the end.
        input_sae: on the layer's `ln2.hook_normalized`. One on `hook_resid_mid` differs from it by each token's norm
            scale: `attribute` takes that exactly, weight-only analyses in its basis are refused.
        output_sae: on the layer's `hook_mlp_out`.
        input_names, output_names: labels of the features, one each, for tables and plots.

    Wherever an `output` is taken, integers (one, or several) mean features of the output SAE and floats, of shape
    `(d_model,)` or `(n, d_model)`, mean directions in the layer's output space, used as they are. Several outputs put
    an axis in front of the result; one does not.

    SAEs in half precision are read in float32 at least: the expansion is exact only where the SAE's own rounding is.

    Raises:
        ArgumentError: as many names as features are needed.
        NotBilinearError: a gated or one-branch model.
        SAEMismatchError: an SAE of another width, hook or layer.
        OutOfRangeError: no such layer.
    """

    def __init__(
        self,
        model: HookedBilinearTransformer,
        layer: int,
        input_sae: SAE[Any] | None = None,
        output_sae: SAE[Any] | None = None,
        *,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
    ):
        n_layers = model.cfg.n_layers
        if not -n_layers <= layer < n_layers:
            raise OutOfRangeError(f"layer {layer} is outside the model's {n_layers} layers, 0 to {n_layers - 1}.")
        self.model = model
        self.layer = layer % n_layers
        self.weights = BilinearLayer.of(model, self.layer)
        at = f"blocks.{self.layer}"
        self.normalized_hook, self.resid_mid_hook = f"{at}.ln2.hook_normalized", f"{at}.hook_resid_mid"
        self.scale_hook, self.out_hook = f"{at}.ln2.hook_scale", f"{at}.hook_mlp_out"
        self._input = self._view(input_sae, "input", (self.normalized_hook, self.resid_mid_hook))
        self._output = self._view(output_sae, "output", (self.out_hook,))
        self.input_names = self._check_names(input_names, self._input, "input")
        self.output_names = self._check_names(output_names, self._output, "output")

    @property
    def input_sae(self) -> SAE[Any] | None:
        return None if self._input is None else self._input.sae

    @property
    def output_sae(self) -> SAE[Any] | None:
        return None if self._output is None else self._output.sae

    @property
    def input_view(self) -> SAEView:
        """The input SAE as directions; raises `MissingSAEError` where there is none."""
        return self._need("input")

    @property
    def output_view(self) -> SAEView:
        """The output SAE as directions; raises `MissingSAEError` where there is none."""
        return self._need("output")

    # --- from the weights alone ---------------------------------------------------------------------------------------

    @typed
    def interaction(self, output: Output, basis: Basis = "residual", side: Side = "encoder") -> Float[Tensor, "*n d d"]:
        """The symmetric interaction matrix of each output: `u . mlp(x) = x^T Q_u x` (plus bias terms).

        Args:
            output: features or directions (see the class).
            basis: `"residual"` (d = d_model) or `"features"` (d = the input SAE's d_sae: `D Q D^T` with its decoder).
            side: the encoder or decoder direction of an output feature; does not matter for directions.

        Raises:
            ArgumentError: an output, basis or side that is none.
            MissingSAEError: features without an output SAE, or the feature basis without an input SAE.
            OutOfRangeError: no such feature.
            SAEMismatchError: directions of another width, the feature basis of an SAE on `hook_resid_mid`, or the
                encoder side of an SAE that has no encoder directions.
        """
        matrix = interaction_matrix(self.weights, self.directions(output, side))
        return matrix if basis == "residual" else in_basis(matrix, self._input_directions())

    @typed
    def linear(self, output: Output, side: Side = "encoder") -> Float[Tensor, "*n d_model"]:
        """The part of each output linear in the layer's input; zeros for a model without MLP biases."""
        return linear_term(self.weights, self.directions(output, side))

    @typed
    def constant(self, output: Output, side: Side = "encoder") -> Float[Tensor, "*n"]:
        """The part of each output that does not depend on the layer's input."""
        return constant_term(self.weights, self.directions(output, side))

    @typed
    def eigen(self, output: Output, k: int | None = None, side: Side = "encoder") -> Eigencircuits:
        """Eigenpairs of the interaction matrix in the residual basis, by falling absolute eigenvalue.

        Args:
            output: as for `interaction`.
            k: how many; `None` gives all `d_model`.
            side: as for `interaction`.
        """
        values, vectors = sorted_eigenpairs(self.interaction(output, side=side), k)
        decoder = None if self._input is None else self._input.decoder.to(vectors)
        return Eigencircuits(values, vectors, self._output_indices(output), decoder, self.input_names)

    @typed
    def top_interactions(self, output: Output, k: int = 50, side: Side = "encoder") -> TopInteractions:
        """The `k` largest interactions of each output between input features, self and cross together.

        Args:
            output: as for `interaction`.
            k: at most `d_sae (d_sae + 1) / 2`.
            side: as for `interaction`.
        """
        matrix = self.interaction(output, basis="features", side=side)
        batch = matrix if matrix.ndim == 3 else matrix[None]
        d_sae = batch.shape[-1]
        rows, columns = torch.tril_indices(d_sae, d_sae, device=batch.device)
        if not 1 <= k <= len(rows):
            raise OutOfRangeError(f"k is {k}, expected 1 to {len(rows)}, the number of pairs of {d_sae} features.")
        coefficients = batch[:, rows, columns] * torch.where(rows == columns, 1.0, 2.0)
        top = coefficients.abs().topk(k, dim=-1).indices
        i, j = columns[top], rows[top]
        features = torch.cat([i.flatten(), j.flatten()]).unique()
        return TopInteractions(
            outputs=self._output_indices(output),
            i=i,
            j=j,
            coefficients=coefficients.gather(-1, top),
            features=features,
            submatrix=matrix[..., features, :][..., :, features],
            input_names=self.input_names,
            output_names=None if self._read(output).is_floating_point() else self.output_names,
        )

    # --- on a text ----------------------------------------------------------------------------------------------------

    @typed
    @torch.no_grad()
    def attribute(
        self,
        text_or_tokens: str | Sequence[int] | Int[Tensor, "p"] | Int[Tensor, "1 p"],
        feature: SupportsIndex,
        position: SupportsIndex,
    ) -> Attribution:
        """The exact expansion of one output feature's pre-activation at one token.

        Args:
            text_or_tokens: one text (`[BOS]` is prepended), or its tokens as they are.
            feature: of the output SAE, active there or not.
            position: `[BOS]` counted; negative counts from the end.

        Raises:
            ArgumentError: several texts, or a feature or position that is no integer.
            EmptyTextError, ContextLengthError: the text does not fit.
            MissingSAEError: it needs both SAEs.
            OutOfRangeError: no such feature or position.
        """
        view_in, view_out = self.input_view, self.output_view
        feature = self.check_feature(feature)
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
        x, resid_mid, scale, y = (cache[name][0, position] for name in names)

        # The input's sources, in the space the layer reads, in float64: only the model's own rounding remains.
        on_resid_mid = self._on_resid_mid(view_in)
        site = resid_mid if on_resid_mid else x
        acts = view_in.activations(site[None])[0]
        inputs = acts.nonzero().flatten()
        norm = view_in.frozen_norm(site.double())
        divisor = scale.double() if on_resid_mid else 1.0
        directions = view_in.decoder[inputs].double() * norm.scale_out / divisor
        b_dec = (view_in.b_dec.double() * norm.scale_out + norm.shift) / divisor
        features = acts[inputs].double()[:, None] * directions
        error = x.double() - features.sum(0) - b_dec
        sources = torch.cat([features, b_dec[None], error[None], torch.zeros_like(error)[None]])
        ones = torch.zeros(len(sources), dtype=torch.float64, device=sources.device)
        ones[-1] = 1.0

        # The output: a linear read of hook_mlp_out, plus what the SAE adds by itself.
        norm_out = view_out.frozen_norm(y.double())
        e = view_out.encoder[feature].double()
        weights = self.weights.to(torch.float64)
        contributions = source_products(weights, e * norm_out.scale_in, sources, ones)
        output_bias = view_out.encoder_bias[feature].double() - norm_out.scale_in * norm_out.shift * e.sum()
        coefficients = source_products(weights, e * norm_out.scale_in, directions, ones.new_zeros(len(inputs)))
        return Attribution(
            layer=self.layer,
            feature=feature,
            position=position,
            tokens=self.token_strings(tokens[0]),
            inputs=inputs,
            activations=acts[inputs],
            coefficients=coefficients.float(),
            contributions=contributions.float(),
            output_bias=output_bias.float().item(),
            actual=view_out.pre_activations(y[None])[0, feature].item(),
            active=bool(view_out.activations(y[None])[0, feature] != 0),
            input_names=self.input_names,
            output_name="" if self.output_names is None else self.output_names[feature],
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
            self.check_feature(feature)
        return directions[read.long().to(like.device)]

    def _read(self, output: Output) -> Tensor:
        return read_output(output, self.model.cfg.d_model)

    def _output_indices(self, output: Output) -> Int[Tensor, "n"]:
        """What to call the outputs: features by their numbers, directions by their places."""
        read = self._read(output)
        return torch.arange(read[..., 0].numel()) if read.is_floating_point() else read.reshape(-1)

    def feature_indices(self, output: Output) -> Int[Tensor, "n"]:
        """Output features as a tensor of their numbers.

        Raises:
            ArgumentError: directions instead of features.
            OutOfRangeError: no such feature.
        """
        read = self._read(output)
        if read.is_floating_point():
            raise ArgumentError("these are directions; this needs output features, as integers.")
        return torch.tensor([self.check_feature(feature) for feature in read.reshape(-1).tolist()], dtype=torch.long)

    def check_feature(self, feature: SupportsIndex) -> int:
        """An output feature's index as an int; raises `OutOfRangeError` outside the output SAE."""
        return check_index(feature, self.output_view.d_sae, "feature {} is outside the output SAE's {}")

    def _input_directions(self) -> Float[Tensor, "d_sae d_model"]:
        view = self.input_view
        if self._on_resid_mid(view):
            raise SAEMismatchError(
                f"the input SAE is on {self.resid_mid_hook!r}: in the layer's input its directions are divided by each "
                f"token's norm scale, so they have no fixed interactions. Use an SAE on {self.normalized_hook!r}, or "
                "`attribute`, which takes the scale of its token."
            )
        return view.decoder.to(self.weights.W_out)

    def token_strings(self, tokens: Int[Tensor, "p"]) -> list[str]:
        """Each token as a string; its number where the model has no tokenizer."""
        if self.model.tokenizer is None:
            return [str(token) for token in tokens.tolist()]
        return self.model.to_str_tokens(tokens)  # type: ignore[return-value]

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
        if torch.finfo(sae.dtype).bits < 32:
            sae = copy.deepcopy(sae).to(torch.float32)
        view = SAEView(sae)
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
        if names is not None and len(names) != n:
            raise ArgumentError(
                f"{len(names)} {which}_names for {n} {which} features"
                + (f": there is no {which}_sae." if not n else ".")
            )
        return names
