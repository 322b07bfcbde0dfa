"""Circuits checked by intervention, on the model itself.

What is kept and removed are features and errors at their positions. In every layer an SAE takes its activation apart;
what is not kept is replaced by zero (or by the feature's mean), the rest is put together again and flows on. `b_dec`,
embeddings and attention stay. In two ways:

    attention "frozen"   patterns, norm scales, the set of active features and the errors are as they were: the
                         polynomial that the circuit is a part of, so that this tests what was pruned
    attention "real"     everything is computed anew: SAEs encode what reaches them, and what they miss of that is their
                         error; this tests whether the frozen picture says anything about the model

An edge is checked alone: its source is removed while all MLPs above are held at what they gave, so that what changes at
the other end came through the residual stream and attention.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from bilens._core.bare import require_bare
from bilens._core.display import Tabular
from bilens._core.fingerprint import check_same
from bilens.attribute.circuit import Circuit, trace_circuit
from bilens.attribute.frozen import FrozenPass, SAEs, check_saes, freeze
from bilens.attribute.interventions import Hook, frozen_hooks, read_values, rerun
from bilens.attribute.targets import STREAM, Reads, Target, feature_reads, read_targets
from bilens.draw import plots
from bilens.draw.markup import Numbers
from bilens.errors import ArgumentError
from bilens.layer.bilinear import branches, pair_products
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.passes import SAEPass

AttentionMode = Literal["frozen", "real"]
MODES: tuple[AttentionMode, ...] = ("frozen", "real")
ROWS_AT_ONCE = 32
Means = Mapping[str, Float[Tensor, "d_sae"]]


@dataclass(frozen=True)
class Faithfulness(Tabular):
    """The target's value with parts of its circuit kept or removed.

    Attributes:
        target: its name.
        frame: one row per run: `attention` (frozen, real), `kept` (everything, nothing, circuit, all but circuit,
            or top n), `nodes` kept, `value`, and `recovered`, `(value - nothing) / (everything - nothing)`.
        ablation: what stands in the place of what is removed: zero, or its mean.
    """

    target: str
    frame: pd.DataFrame = field(repr=False)
    ablation: str = "zero"

    def to_frame(self) -> pd.DataFrame:
        return self.frame

    def recovered(self, kept: str = "circuit", attention: AttentionMode = "frozen") -> float:
        """What is recovered with that part kept."""
        rows = self.frame[(self.frame.kept == kept) & (self.frame.attention == attention)]
        return float(rows.recovered.iloc[0])

    @property
    def verdict(self) -> tuple[str, str, str]:
        """One word for the circuit alone with frozen attention, its number, and a sentence.

        It is faithful if it recovers 80 % to 120 % of the target, partial from 50 % on, else weak.
        """
        rows = self.frame[self.frame.kept == "circuit"].set_index("attention")
        part = self.recovered()
        if not math.isfinite(part):
            return "unclear", "", "nothing kept gives the same value as everything kept, so no share is recovered."
        word = "faithful" if 0.8 <= part <= 1.2 else "partial" if 0.5 <= part < 0.8 else "weak"
        numbers = [f"{100 * rows.recovered[mode]:.0f} %" for mode in MODES]
        return (
            word,
            numbers[0],
            f"its {rows.nodes['frozen']} features and errors alone, all others at {self.ablation}, recover "
            f"{numbers[0]} of the target with frozen attention and {numbers[1]} with real attention.",
        )

    def plot(self) -> go.Figure:
        """Recovered value over the number of nodes kept."""
        curve = self.frame[self.frame.kept.str.startswith("top")].sort_values("nodes")
        nodes = sorted(curve.nodes.unique())
        series: dict[str, Numbers] = {mode: curve[curve.attention == mode].recovered.tolist() for mode in MODES}
        return plots.line(nodes, series, self.target, x_title="nodes kept", y_title="recovered")

    def __str__(self) -> str:
        return f"{self.target}\n{self.frame.to_string(index=False)}"


@dataclass(frozen=True)
class EdgeCheck(Tabular):
    """Every edge's predicted change, the source removed, beside the measured one.

    Attributes:
        attention: `"frozen"` if patterns and norms stayed as they were, else `"real"`.
        frame: `source, target, kind` (linear, or mlp: all that an MLP input's feature takes part in of one output
            feature, its eigencircuits or pairs), `predicted, measured`.
    """

    attention: str
    frame: pd.DataFrame = field(repr=False)

    @property
    def correlation(self) -> dict[str, float]:
        """Pearson's, of each kind of edge."""
        kinds = self.frame.groupby("kind")
        return {kind: float(rows.predicted.corr(rows.measured)) for kind, rows in kinds}

    def to_frame(self) -> pd.DataFrame:
        return self.frame

    def plot(self) -> go.Figure:
        """Measured over predicted."""
        labels = [f"{s} → {t}" for s, t in zip(self.frame.source, self.frame.target, strict=True)]
        return plots.scatter(
            self.frame.predicted,
            self.frame.measured,
            labels,
            f"{self.attention} attention",
            x_title="predicted change",
            y_title="measured change",
            diagonal=True,
        )

    def __str__(self) -> str:
        found = ", ".join(f"{kind} {value:.4f}" for kind, value in self.correlation.items())
        return f"{len(self.frame)} edges, {self.attention} attention: correlation {found}"


@torch.no_grad()
def check_circuit(
    frozen: FrozenPass,
    circuit: Circuit,
    target: Target,
    *,
    means: Means | None = None,
    errors: Literal["circuit", "all"] = "circuit",
    counts: Sequence[int] | None = None,
) -> Faithfulness:
    """Keep only the circuit, remove it, and keep its `n` most influential nodes for a curve.

    Args:
        frozen: the forward pass it was traced on, with the same SAEs.
        circuit: not merged.
        target: the one it was traced for; one of them.
        means: each hook's mean activations (`feature_means`), to put in the place of what is removed; `None` is zero.
        errors: the SAEs' errors that are kept: those in the circuit, or all of them always.
        counts: the numbers of nodes on the curve; `None` takes about eight.

    Raises:
        ArgumentError: a merged circuit, or one of another text or target.
        StaleError: a circuit of another model or other SAEs.
    """
    frame = _members(frozen, circuit)
    reads = read_targets(frozen, target)
    _target_ids(circuit, reads)
    n = len(frame)
    if counts is None:
        counts = sorted({round(n * share) for share in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)} - {0})
    names = ["everything", "nothing", "circuit", "all but circuit", *(f"top {count}" for count in counts)]
    rows: list[dict[str, Any]] = []
    masks = _masks(frozen, frame, [n, 0, n, n, *counts])
    for mask in masks.values():
        mask[0] = True
        mask[3] = ~mask[3]
    for mode in MODES:
        values = torch.cat(
            [
                read_values(reads, rerun(frozen, len(chunk), _hooks(frozen, reads, masks, chunk, mode, means, errors),
                                         reads.hooks))[:, 0]
                for chunk in torch.arange(len(names)).split(_rows_at_once(frozen, with_saes=True))
            ]
        )  # fmt: skip
        everything, nothing = values[0], values[1]
        recovered = (values - nothing) / (everything - nothing)
        kept = [-1, 0, n, -n, *counts]
        for name, count, value, part in zip(names, kept, values.tolist(), recovered.tolist(), strict=True):
            rows.append({"attention": mode, "kept": name, "nodes": count, "value": value, "recovered": part})
    return Faithfulness(reads.names[0], pd.DataFrame(rows), "zero" if means is None else "their means")


def feature_means(
    model: HookedBilinearTransformer, saes: SAEs, texts: Sequence[str]
) -> dict[str, Float[Tensor, "d_sae"]]:
    """Every SAE's mean activations over the tokens of some texts, `[BOS]` left out, by hook."""
    views = check_saes(model, saes)
    require_bare(model, *(view.sae for view in views.values()))
    sums = {hook: torch.zeros(view.d_sae, dtype=torch.float64) for hook, view in views.items()}
    n = 0
    for text in tqdm(texts, desc="feature means", unit=" texts"):
        _, cache = model.run_with_cache(text, names_filter=list(views), return_cache_object=False)
        for hook, view in views.items():
            sums[hook] += view.activations(cache[hook][0, model.n_bos :]).sum(0).double().cpu()
        n += cache[next(iter(views))].shape[1] - model.n_bos
    return {hook: (total / max(n, 1)).float() for hook, total in sums.items()}


@torch.no_grad()
def check_edges(
    frozen: FrozenPass, circuit: Circuit, target: Target | Sequence[Target], *, attention: AttentionMode = "frozen"
) -> EdgeCheck:
    """Remove the source of every edge alone; compare the change at its other end with the edge's weight.

    Args:
        frozen: the forward pass the circuit was traced on, with the same SAEs.
        circuit: not merged.
        target: the one it was traced for; all of them.
        attention: patterns and norm scales as they were ("frozen"), or as they come out ("real").

    Raises:
        ArgumentError: a merged circuit, one of another text or other targets, or another attention.
        StaleError: a circuit of another model or other SAEs.
    """
    if attention not in MODES:
        raise ArgumentError(f"attention is {attention!r}, expected 'frozen' or 'real'.")
    _members(frozen, circuit)
    read = read_targets(frozen, target)
    roots = {name: read[row : row + 1] for row, name in enumerate(_target_ids(circuit, read))}
    missing = circuit.nodes[(circuit.nodes.kind == "target") & ~circuit.nodes.id.isin(list(roots))]
    if len(missing):
        raise ArgumentError(f"the circuit was traced for {', '.join(missing.name)} too; give all of its targets.")
    nodes = circuit.nodes.set_index("id")
    linear = circuit.edges[circuit.edges["via"] != ""]  # what comes through the residual stream
    tables = [pd.DataFrame(columns=["source", "target", "kind", "predicted", "measured"])]
    if len(linear):
        sources, targets = list(linear.source.unique()), list(linear.target.unique())
        reads = Reads.concatenate([_reads_of(frozen, nodes.loc[name], roots) for name in targets])
        at_once = _rows_at_once(frozen, with_saes=False)
        change = torch.cat(
            [
                _direct_changes(frozen, nodes.loc[sources[at : at + at_once]], reads, attention)
                for at in range(0, len(sources), at_once)
            ]
        )
        rows = [sources.index(name) for name in linear.source]
        columns = [targets.index(name) for name in linear.target]
        measured = change[rows, columns].tolist()
        tables.append(
            pd.DataFrame(
                {
                    "source": linear.source.to_numpy(),
                    "target": linear.target.to_numpy(),
                    "kind": "linear",
                    "predicted": -linear.weight.to_numpy(),
                    "measured": measured,
                }
            )
        )
    tables += _mlp_changes(frozen, circuit, nodes, roots)
    filled = [table for table in tables if len(table)]
    return EdgeCheck(attention, pd.concat(filled, ignore_index=True) if filled else tables[0])


@dataclass(frozen=True)
class CircuitChecks(Tabular):
    """Circuits of many prompts, each checked.

    Attributes:
        curves: the frames of `Faithfulness`, with columns `prompt` and `ablation` (zero, or mean).
        edges: those of `EdgeCheck`, with `prompt` and `attention`.
    """

    curves: pd.DataFrame = field(repr=False)
    edges: pd.DataFrame = field(repr=False)

    @property
    def correlations(self) -> pd.Series:
        """Of predicted and measured change, over all prompts' edges, by kind and attention."""
        return self.edges.groupby(["kind", "attention"])[["predicted", "measured"]].apply(
            lambda rows: rows.predicted.corr(rows.measured)
        )

    def to_frame(self) -> pd.DataFrame:
        """Medians and quartiles over prompts of what is recovered: one row per ablation, attention and part kept."""
        recovered = self.curves.groupby(["ablation", "attention", "kept"], sort=False).recovered
        return recovered.quantile([0.25, 0.5, 0.75]).unstack().reset_index()

    def plot(self) -> go.Figure:
        """The median recovered value over the number of nodes kept."""
        top = self.curves[self.curves.kept.str.startswith("top")]
        medians = top.groupby(["attention", "ablation", "nodes"]).recovered.median().unstack([0, 1])
        series: dict[str, Numbers] = {", ".join(mode): medians[mode].tolist() for mode in medians.columns}
        return plots.line(list(medians.index), series, x_title="nodes kept", y_title="median recovered")

    def __str__(self) -> str:
        return f"{self.to_frame().to_string(index=False)}\ncorrelation of edges\n{self.correlations.to_string()}"


def check_circuits(
    model: HookedBilinearTransformer,
    saes: SAEs,
    texts: Sequence[str],
    *,
    max_nodes: int = 200,
    means: Means | None = None,
    errors: Literal["circuit", "all"] = "circuit",
    counts: Sequence[int] = (10, 20, 50, 100, 200),
    node_threshold: float = 1.0,
) -> CircuitChecks:
    """Trace each text's likeliest next token and check its circuit and edges.

    Args:
        model, saes: the same as for `Circuit.trace`.
        texts: prompts.
        max_nodes, node_threshold: the limits of each circuit, as for `Circuit.trace`.
        means: each hook's mean activations (`feature_means`), to ablate by them as well as by zero.
        errors: the same as for `check_circuit`.
        counts: the numbers of nodes on the curves.
    """
    ablations: dict[str, Means | None] = {"zero": None} | ({} if means is None else {"mean": means})
    curves, edges = [], []
    for prompt, text in enumerate(tqdm(texts, desc="circuits", unit=" prompts")):
        frozen = freeze(model, text, saes)
        target = Target.logit(int(frozen.logits[-1].argmax()))
        circuit = trace_circuit(frozen, target, max_nodes=max_nodes, node_threshold=node_threshold)
        for ablation, given in ablations.items():
            found = check_circuit(frozen, circuit, target, means=given, errors=errors, counts=counts)
            curves.append(found.frame.assign(prompt=prompt, ablation=ablation))
        for mode in MODES:
            checked = check_edges(frozen, circuit, target, attention=mode)
            edges.append(checked.frame.assign(prompt=prompt, attention=mode))
    return CircuitChecks(pd.concat(curves, ignore_index=True), pd.concat(edges, ignore_index=True))


def _rows_at_once(frozen: FrozenPass, *, with_saes: bool) -> int:
    """Runs of the model at once, each with its activations and, where SAEs take part, those of one of them."""
    cfg, n = frozen.model.cfg, frozen.n_positions
    mlp = frozen.model.blocks[0].mlp.w.weight.shape[0]
    d_sae = max((sae.view.d_sae for sae in frozen.saes.values()), default=0) if with_saes else 0
    each = 4 * n * ((4 + 4 * cfg.n_layers) * cfg.d_model + 3 * mlp + 3 * cfg.n_heads * n + 6 * d_sae)
    return frozen.at_once("a run of the model", each, ROWS_AT_ONCE * each)


# --- keeping and removing ---------------------------------------------------------------------------------------------


def _members(frozen: FrozenPass, circuit: Circuit) -> pd.DataFrame:
    """The circuit's features and errors, most influential first.

    Raises:
        ArgumentError: a merged circuit, or one of another text.
        StaleError: one of another model or other SAEs.
    """
    if circuit.tokens != frozen.strings:
        raise ArgumentError(
            f"the circuit is of another text: {' '.join(circuit.tokens[:8])!r}... ({len(circuit.tokens)} tokens), "
            f"this forward pass of {' '.join(frozen.strings[:8])!r}..."
        )
    for name, known in circuit.fingerprints.items():
        thing = "model" if name == "model" else f"SAE on {name}"
        check_same(known, frozen.fingerprints.get(name, ""), "this circuit", thing)
    frame = circuit.nodes[circuit.nodes.kind.isin(["feature", "error"])]
    if (circuit.nodes[circuit.nodes.kind.isin(["feature", "error", "embedding"])].position < 0).any():
        raise ArgumentError("this circuit was merged over positions; check the one that it was merged from.")
    return frame.sort_values("influence", ascending=False, ignore_index=True)


def _spliced(frozen: FrozenPass, reads: Reads) -> list[SAEPass]:
    """The SAEs below the target: each takes part where its activation is made before the target is read."""
    level, stream = int(reads.levels[0]), int(reads.sees[0]) == STREAM
    found = []
    for layer in range(frozen.n_layers):
        for sae, height in ((frozen.input_sae(layer), 2 * layer + 1), (frozen.output_sae(layer), 2 * layer + 2)):
            if sae is not None and (height < level or (height == level and level % 2 == 0 and stream)):
                found.append(sae)
    return found


def _masks(frozen: FrozenPass, frame: pd.DataFrame, counts: Sequence[int]) -> dict[str, Bool[Tensor, "row p s"]]:
    """What of every SAE (its features, then its error) is kept if the first `count` rows of the frame are."""
    masks = {
        hook: torch.zeros(len(counts), frozen.n_positions, sae.view.d_sae + 1, dtype=torch.bool)
        for hook, sae in frozen.saes.items()
    }
    rows = torch.tensor(counts)[:, None]
    for hook, part in frame.groupby("hook"):
        place, position = torch.tensor(part.index.to_list()), torch.tensor(part.position.to_list())
        feature = torch.tensor(part.feature.to_list())  # an error's -1 is the last column
        masks[hook][:, position, feature] = place < rows
    return masks


def _hooks(
    frozen: FrozenPass,
    reads: Reads,
    masks: dict[str, Tensor],
    rows: Tensor,
    mode: AttentionMode,
    means: Means | None,
    errors: str,
) -> list[Hook]:
    def splice(sae: SAEPass) -> Hook:
        kept = masks[sae.hook][rows].to(sae.error.device)
        mean = kept.new_zeros(sae.view.d_sae) if means is None else means[sae.hook].to(kept.device)

        def replace(value: Tensor, hook: Any) -> Tensor:
            acts, error = _decomposed(frozen, sae, value, mode)
            acts = torch.where(kept[..., :-1], acts, mean.to(acts))
            kept_error = error if errors == "all" else error * kept[..., -1:]
            return (_reconstruction(sae, acts, value, mode) + kept_error).to(value.dtype)

        return sae.hook, replace

    hooks = frozen_hooks(frozen) if mode == "frozen" else []
    return [*hooks, *(splice(sae) for sae in _spliced(frozen, reads))]


def _decomposed(
    frozen: FrozenPass, sae: SAEPass, value: Float[Tensor, "row p d_model"], mode: AttentionMode
) -> tuple[Float[Tensor, "#row p d_sae"], Float[Tensor, "#row p d_model"]]:
    """Activations and error of what reaches an SAE."""
    if mode == "real":
        acts = sae.view.activations(value)
        return acts, value - _reconstruction(sae, acts, value, mode)
    clean = value.new_zeros(len(sae.values), sae.view.d_sae)
    clean.scatter_add_(1, sae.features, sae.values.to(value) * sae.real)
    error = sae.error.to(value)[None]
    if not sae.has_reads:
        return clean[None], error
    read = (value - sae.shift[:, None].to(value)) * sae.scale_in[:, None].to(value)
    pre = read @ sae.view.encoder.to(value).T + sae.view.encoder_bias.to(value)
    return pre * (clean != 0), error


def _reconstruction(sae: SAEPass, acts: Tensor, value: Tensor, mode: AttentionMode) -> Float[Tensor, "row p d_model"]:
    if mode == "real":
        norm = sae.view.frozen_norm(value)
        scale, shift = norm.scale_out[..., None], norm.shift[..., None]
        return (acts @ sae.view.decoder.to(acts) + sae.view.b_dec.to(acts)) * scale + shift
    return acts @ sae.view.decoder.to(acts) * sae.scale_out[:, None].to(acts) + sae.b_dec.to(acts)


# --- edges ------------------------------------------------------------------------------------------------------------


def _target_ids(circuit: Circuit, reads: Reads) -> list[str]:
    """The circuit's nodes for these targets.

    Raises:
        ArgumentError: it was not traced for one of them.
    """
    nodes = circuit.nodes[circuit.nodes.kind == "target"]
    ids = {(row.name, row.position): row.id for row in nodes.itertuples(index=False)}
    for name, position in zip(reads.names, reads.positions.tolist(), strict=True):
        if (name, position) not in ids:
            traced = ", ".join(f"{name} at position {at}" for name, at in ids)
            raise ArgumentError(f"the circuit was traced for {traced}; given is {name} at position {position}.")
    return [ids[key] for key in zip(reads.names, reads.positions.tolist(), strict=True)]


def _reads_of(frozen: FrozenPass, node: pd.Series, roots: Mapping[str, Reads]) -> Reads:
    """Of a row of the nodes, indexed by their ids."""
    if node.kind == "target":
        return roots[str(node.name)]
    return feature_reads(frozen, node.hook, torch.tensor([node.position]), torch.tensor([node.feature]))


def _direct_changes(
    frozen: FrozenPass, sources: pd.DataFrame, reads: Reads, mode: AttentionMode
) -> Float[Tensor, "source t"]:
    """How every read changes when one source is removed, all MLPs held."""
    removed: dict[str, list[tuple[int, int, Tensor]]] = {}
    for row, node in enumerate(sources.itertuples(), start=1):
        hook = "hook_embed" if node.kind == "embedding" else node.hook
        removed.setdefault(hook, []).append((row, node.position, _write(frozen, node)))

    def hold(value: Tensor, hook: Any) -> Tensor:
        held = frozen.cache[hook.name].expand_as(value).clone()
        for row, position, write in removed.get(hook.name, []):
            held[row, position] -= write.to(held)
        return held

    held = ["hook_embed", *(f"blocks.{layer}.hook_mlp_out" for layer in range(frozen.n_layers))]
    hooks: list[Hook] = [(name, hold) for name in held]
    seen = rerun(frozen, len(sources) + 1, hooks + (frozen_hooks(frozen) if mode == "frozen" else []), reads.hooks)
    values = read_values(reads, seen)
    return values[1:] - values[:1]


def _write(frozen: FrozenPass, node: Any) -> Float[Tensor, "d_model"]:
    if node.kind == "embedding":
        return frozen.embed[node.position]
    if node.kind == "mlp":
        return frozen.mlp_out[node.layer, node.position]
    sae = frozen.sae(node.hook)
    if node.kind == "error":
        return sae.error[node.position]
    slot = (sae.features[node.position] == node.feature) & sae.real[node.position]
    return sae.writes(node.position, slot).sum(0)


def _mlp_changes(
    frozen: FrozenPass, circuit: Circuit, nodes: pd.DataFrame, roots: Mapping[str, Reads]
) -> list[pd.DataFrame]:
    """Each input feature of every output feature removed: predicted from its pairs, measured on the MLP itself."""
    tables = []
    kind = nodes.kind
    owner = circuit.edges[circuit.edges.source.map(kind) == "eigencircuit"].set_index("source").target
    inner = circuit.edges[circuit.edges["via"] == ""]
    members = pd.concat(
        [
            circuit.hyperedges[["i", "target"]].rename(columns={"i": "j"}),
            circuit.hyperedges[["j", "target"]],
            pd.DataFrame({"j": inner.source, "target": inner.target.map(owner).fillna(inner.target)}),
        ]
    )
    members = members[members.j.map(nodes.kind) == "feature"].drop_duplicates()
    for name, rows in members.groupby("target"):
        reads = _reads_of(frozen, nodes.loc[name], roots)
        layer, position = int(reads.levels[0]) // 2 - 1, int(reads.positions[0])
        sae, mlp = frozen.input_sae(layer), frozen.mlp(layer)
        assert sae is not None
        sources, ones = frozen.input_sources(layer, position)
        products = pair_products(mlp, reads.vectors[0], branches(mlp, sources, ones), ones)
        slots = [int(((sae.features[position] == nodes.feature[j]) & sae.real[position]).nonzero()) for j in rows.j]
        predicted = products.diagonal()[slots] - 2 * products.sum(1)[slots]
        whole = sources.sum(0)
        inputs = torch.stack([whole, *(whole - sources[slot] for slot in slots)])
        module = frozen.model.blocks[layer].mlp
        values = module(inputs[None].to(module.w.weight.dtype))[0].to(frozen.dtype) @ reads.vectors[0]
        tables.append(
            pd.DataFrame(
                {
                    "source": rows.j.to_numpy(),
                    "target": name,
                    "kind": "mlp",
                    "predicted": predicted.tolist(),
                    "measured": (values[1:] - values[0]).tolist(),
                }
            )
        )
    return tables
