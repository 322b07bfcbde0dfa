"""The `bilens` command: arguments in, library calls, a few lines out. Heavy imports happen inside the commands."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bilens._core.checks import check_amounts, check_rates, check_seeds, check_shares, check_sizes
from bilens._core.files import PAGE, destination, destination_folder
from bilens.errors import ArgumentError, BilensError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def _checked(check: Callable[..., object]) -> Callable[..., Any]:
    """A callback for an option: what `bilens._core.checks` refuses is said before anything is imported or loaded."""

    def callback(param: typer.CallbackParam, value: Any) -> Any:
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            try:
                check(**{str(param.name): one})
            except BilensError as error:
                raise typer.BadParameter(str(error)) from error
        return value

    return callback


def _file(replaces: bytes) -> Callable[..., Any]:
    """A callback for a file to be written: where nothing can be written, or other work is, is said at once."""
    return _checked(lambda **given: [destination(path, replaces) for path in given.values()])


size, rate, amount, share = map(_checked, (check_sizes, check_rates, check_amounts, check_shares))
seeds, page = _checked(check_seeds), _file(PAGE)
folder_to_write = _checked(lambda **given: [destination_folder(path) for path in given.values()])
Size = Annotated[int, typer.Option(callback=size)]
Amount = Annotated[float, typer.Option(callback=amount)]
Seed = Annotated[int, typer.Option(callback=seeds)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove other work that is in the folder.")]


@app.callback()
def bilens() -> None:
    """Read bilinear transformers from their weights."""


@app.command("train-lm")
def train_lm(
    data: Annotated[str, typer.Argument(help="Texts: .jsonl/.json/.txt/.parquet (.gz may follow) or a hub dataset.")],
    out: Annotated[
        Path,
        typer.Argument(help="Folder of the model; run again to go on after an interruption.", callback=folder_to_write),
    ],
    valid: Annotated[str | None, typer.Option(help="Validation texts; without, 1 % of the texts is set aside.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, published name or hub id; without, one is trained.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Of a tokenizer trained here.", callback=size)] = 4096,
    column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    d_model: Size = 256,
    n_layer: Size = 4,
    n_head: Size = 4,
    d_hidden: Size = 1024,
    n_ctx: Size = 256,
    bias: Annotated[bool, typer.Option(help="Biases in the MLP.")] = False,
    gate: Annotated[
        str | None, typer.Option(help="relu, silu or gelu on the left branch: not bilinear any more.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the texts.", callback=rate)] = 10.0,
    batch_size: Annotated[int, typer.Option(help="Contexts per step.", callback=size)] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", callback=rate)] = 2e-3,
    weight_decay: Amount = 0.1,
    bf16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = True,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="Of the weights on disk: float32, bfloat16, float16.")] = "float32",
    device: str | None = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a bilinear language model (and its tokenizer) and write it in the published format."""
    from bilens.train.language_model import TrainConfig
    from bilens.train.language_model import train_lm as train

    config = TrainConfig(
        d_model=d_model,
        n_layer=n_layer,
        n_head=n_head,
        d_hidden=d_hidden,
        n_ctx=n_ctx,
        bias=bias,
        gate=gate,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        bf16=bf16,
        seed=seed,
    )
    result = train(
        data,
        out,
        config,
        valid=valid,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        column=column,
        dtype=dtype,
        device=device,
        overwrite=overwrite,
    )
    typer.echo(f"{result.validations[-1]}\nmodel written to {out}")


@app.command()
def anneal(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id; with a gate, or with norms.")],
    data: Annotated[str, typer.Argument(help="Texts, as for train-lm.")],
    out: Annotated[
        Path,
        typer.Argument(help="Folder of the model; run again to go on after an interruption.", callback=folder_to_write),
    ],
    valid: Annotated[str | None, typer.Option(help="Validation texts; without, 1 % of the texts is set aside.")] = None,
    normalization: Annotated[
        bool, typer.Option("--normalization", help="Take the norms away too; without, only the gate.")
    ] = False,
    scratch: Annotated[
        str | None, typer.Option(help="A model to compare with, such as a bilinear one trained from scratch.")
    ] = None,
    ramp: Annotated[
        float, typer.Option(help="Share of the steps in which the nonlinearity goes.", callback=share)
    ] = 0.5,
    column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    epochs: Annotated[float, typer.Option(help="Passes over the texts.", callback=rate)] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Contexts per step.", callback=size)] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", callback=rate)] = 1e-3,
    bf16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = True,
    seed: Seed = 1,
    overwrite: Overwrite = False,
) -> None:
    """Turn a gated or normalised model into a bilinear one while training it on."""
    from bilens.train.annealing import AnnealConfig
    from bilens.train.annealing import anneal as run

    config = AnnealConfig(
        normalization=normalization, ramp=ramp, epochs=epochs, batch_size=batch_size, lr=lr, bf16=bf16, seed=seed
    )
    result = run(model, data, out, config, valid=valid, scratch=scratch, column=column, overwrite=overwrite)
    typer.echo(f"{result}\nmodel written to {out}")


@app.command("train-image")
def train_image(
    data: Annotated[str, typer.Argument(help="digits, mnist, fashion_mnist, a folder, an .npz file or a hub dataset.")],
    out: Annotated[Path, typer.Argument(help="Folder of the model.", callback=folder_to_write)],
    d_hidden: Size = 256,
    n_layer: Size = 1,
    bias: Annotated[bool, typer.Option(help="Biases on both branches.")] = False,
    residual: Annotated[bool, typer.Option(help="Every layer adds its input.")] = False,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", callback=size)] = 40,
    batch_size: Annotated[int, typer.Option(help="Images per step.", callback=size)] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate at the start.", callback=rate)] = 3e-3,
    weight_decay: Amount = 0.5,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of noise on the pixels, which are 0 to 1.", callback=amount)
    ] = 0.3,
    latent_noise: Annotated[
        float, typer.Option(help="Of noise on every layer's input, in its own size.", callback=amount)
    ] = 0.0,
    rotation: Annotated[float, typer.Option(help="Degrees either way.", callback=amount)] = 0.0,
    translation: Annotated[float, typer.Option(help="Pixels either way.", callback=amount)] = 0.0,
    blur: Annotated[float, typer.Option(help="Largest standard deviation, in pixels.", callback=amount)] = 0.0,
    seed: Seed = 0,
    device: str | None = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a bilinear image classifier and write it as config.json and model.safetensors."""
    from bilens.vision.training import ImageTrainConfig, train_classifier

    config = ImageTrainConfig(
        d_hidden=d_hidden,
        n_layer=n_layer,
        bias=bias,
        residual=residual,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        noise=noise,
        latent_noise=latent_noise,
        rotation=rotation,
        translation=translation,
        blur=blur,
        seed=seed,
    )
    trained = train_classifier(data, config, out, device=device, overwrite=overwrite)
    typer.echo(f"{trained}\nmodel written to {out}")


@app.command("train-sae")
def train_sae(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id.")],
    data: Annotated[str, typer.Argument(help="Texts, as for train-lm.")],
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder of the SAE folders; run again to go on after an interruption.", callback=folder_to_write
        ),
    ],
    hook: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; READ:WRITE is a transcoder; without, every MLP's input and output."),
    ] = None,
    architecture: Annotated[
        str, typer.Option(help="topk, batchtopk, matryoshka_batchtopk, jumprelu, standard, gated or scope.")
    ] = "topk",
    expansion: Annotated[int, typer.Option(help="Features per dimension.", callback=size)] = 8,
    k: Annotated[int, typer.Option(help="Active features per token; jumprelu aims at it.", callback=size)] = 32,
    l1: Annotated[float, typer.Option(help="Sparsity of standard and gated, in place of k.", callback=amount)] = 5.0,
    bilinear_encoder: Annotated[bool, typer.Option(help="Of scope.")] = False,
    encoder_bias: Annotated[bool, typer.Option(help="Of scope.")] = False,
    tokens: Annotated[int, typer.Option(help="Training tokens.", callback=size)] = 1_000_000,
    batch_size: Annotated[int, typer.Option(help="Tokens per step.", callback=size)] = 1024,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", callback=rate)] = 1e-3,
    bf16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = True,
    column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Of a hub dataset.")] = "train",
    streaming: Annotated[bool, typer.Option(help="Read texts as they are needed: data larger than memory.")] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train SAEs or transcoders with SAELens, all hooks from one pass over the model."""
    from bilens._core import parallel
    from bilens.model.loading import load_model
    from bilens.sae.train.training import SAETrainConfig, train_saes

    config = SAETrainConfig(
        architecture=architecture,
        expansion=expansion,
        k=k,
        l1=l1,
        bilinear_encoder=bilinear_encoder,
        encoder_bias=encoder_bias,
        tokens=tokens,
        batch_size=batch_size,
        lr=lr,
        bf16=bf16,
        seed=seed,
    )
    pairs = [name.partition(":") for name in hook or []]
    hooks = [(read, write) if write else read for read, _, write in pairs] or None
    with parallel.processes():
        trained = train_saes(
            load_model(model),
            data,
            out,
            config,
            hooks=hooks,
            column=column,
            split=split,
            streaming=streaming,
            overwrite=overwrite,
        )
        if parallel.is_main():
            typer.echo(f"{len(trained)} SAEs written to {out}: {', '.join(trained)}")


@app.command("finetune-sae")
def finetune_sae(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id.")],
    data: Annotated[str, typer.Argument(help="Texts, as for train-lm.")],
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of the SAE folders; what is tuned replaces what was.", callback=folder_to_write),
    ],
    sae: Annotated[list[str], typer.Option(help="Repeatable: the SAE's folder, such as 2-mlp-out-x8-k32.")],
    tokens: Annotated[int, typer.Option(help="Training tokens.", callback=size)] = 4_000_000,
    batch_size: Annotated[int, typer.Option(help="Contexts per step.", callback=size)] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", callback=rate)] = 1e-3,
    bf16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = True,
    column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    seed: Seed = 1,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune trained SAEs on the output of the model they are spliced into; run again to go on."""
    from bilens.model.loading import load_model
    from bilens.sae.loading import load_sae_folder
    from bilens.sae.train.finetuning import FinetuneConfig, finetune_saes

    loaded = load_model(model)
    saes = {
        name: load_sae_folder(folder / name, n_layers=loaded.cfg.n_layers, scale_attn=loaded.cfg.scale_attn)
        for name in sae
    }
    config = FinetuneConfig(tokens=tokens, batch_size=batch_size, lr=lr, bf16=bf16, seed=seed)
    finetune_saes(loaded, saes, data, folder, config, column=column, overwrite=overwrite)
    typer.echo(f"{len(saes)} SAEs in {folder} fine-tuned: {', '.join(saes)}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id.")],
    data: Annotated[str, typer.Argument(help="Texts that neither the model nor the SAEs were trained on.")],
    saes: Annotated[str | None, typer.Option(help="Folder or hub id of the SAEs; without, the model's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.", callback=_file(b"{"))] = None,
    column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
) -> None:
    """Validation loss of a model; sparsity, explained variance and loss recovered of its SAEs."""
    from bilens.pages.report import evaluate as run
    from bilens.train.data import load_texts

    card = run(model, load_texts(data, column=column), saes)
    typer.echo(str(card))
    if out is not None:
        card.save(out)


@app.command()
def sweep(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id.")],
    out: Annotated[
        Path,
        typer.Argument(help="Folder of the sweep; run again to go on after an interruption.", callback=folder_to_write),
    ],
    layer: Annotated[list[int] | None, typer.Option(help="Repeatable; without, every layer.")] = None,
    saes: Annotated[str | None, typer.Option(help="Folder or hub id of the SAEs; without, the model's own.")] = None,
    expansion: Annotated[int | None, typer.Option(help="Which SAEs, where there are several.", callback=size)] = None,
    sparsity: Annotated[
        int | None, typer.Option(help="The k of the SAEs, where there are several.", callback=size)
    ] = None,
    k: Annotated[int, typer.Option(help="Leading eigenpairs of every output feature.", callback=size)] = 2,
    full: Annotated[bool, typer.Option(help="Effective ranks too, from all eigenvalues.")] = False,
    memory: Annotated[float, typer.Option(help="GB to use besides the model.", callback=rate)] = 1.0,
    overwrite: Overwrite = False,
) -> None:
    """Spectra of all output features of a whole model; under torchrun, its processes share the work."""
    from bilens.decompose.sweep import sweep as write
    from bilens.model.loading import load_model
    from bilens.pages.report import layer_decomposers

    loaded = load_model(model)
    decomposers = layer_decomposers(loaded, layer, saes, expansion, sparsity)
    typer.echo(str(write(decomposers, out, k=k, full=full, memory=round(memory * 2**30), overwrite=overwrite)))


@app.command()
def features(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id.")],
    data: Annotated[str, typer.Argument(help="Texts, as for train-lm; streamed, so of any size.")],
    out: Annotated[
        Path,
        typer.Argument(help="Folder of the store; run again to go on after an interruption.", callback=folder_to_write),
    ],
    saes: Annotated[str | None, typer.Option(help="Folder or hub id of the SAEs; without, the model's own.")] = None,
    sae: Annotated[
        list[str] | None, typer.Option(help="Repeatable: an SAE's folder, such as 1-mlp-out-x8-k32; without, all.")
    ] = None,
    max_texts: Annotated[int | None, typer.Option(help="At most this many texts.", callback=size)] = None,
    n_top: Annotated[int, typer.Option(help="Strongest contexts kept of each feature.", callback=size)] = 12,
    split: Annotated[str, typer.Option(help="Of a hub dataset.")] = "train",
    column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(help="Of the random contexts.", callback=seeds)] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Store what every SAE feature fires on over a corpus; several processes share it under torchrun."""
    from bilens._core import parallel
    from bilens.model.loading import load_model
    from bilens.pages.report import sae_source
    from bilens.sae.features.store import FeatureStoreConfig, build_feature_store
    from bilens.sae.loading import list_saes, load_sae

    with parallel.processes():
        device = parallel.local_device()
        loaded = load_model(model, device=device)
        place = saes or sae_source(loaded.cfg.model_name)
        entries = {entry.folder: entry for entry in list_saes(place)}
        if not entries:
            raise ArgumentError(f"{place} holds no SAEs: say where they are (--saes).")
        if unknown := [name for name in sae or () if name not in entries]:
            raise ArgumentError(f"{place} has no SAE {unknown[0]!r}; it has {', '.join(entries)}.")
        found = {
            name: load_sae(
                place,
                e.point,
                e.layer,
                e.expansion,
                e.k,
                e.tag or "",
                device=device,
                n_layers=loaded.cfg.n_layers,
                scale_attn=loaded.cfg.scale_attn,
            )
            for name, e in entries.items()
            if not sae or name in sae
        }
        config = FeatureStoreConfig(max_texts=max_texts, n_top=n_top, seed=seed)
        store = build_feature_store(
            loaded, found, data, out, config=config, split=split, column=column, overwrite=overwrite
        )
        if parallel.is_main():
            typer.echo(f"{store}\nwritten to {out}")


@app.command()
def dashboard(
    store: Annotated[Path, typer.Argument(help="Folder that `bilens features` wrote.")],
    sae: Annotated[str, typer.Option(help="Which SAE, such as 1-mlp-out-x8-k32.")],
    feature: Annotated[list[int], typer.Option(help="Repeatable: the features to show.")],
    out: Annotated[Path, typer.Option(help="The HTML file.", callback=page)] = Path("bilens_features.html"),
) -> None:
    """Write what features fire on to one self-contained HTML file."""
    from bilens.pages.dashboard import FeatureDashboard
    from bilens.sae.features.store import FeatureStore

    features = FeatureStore.load(store)[sae]
    records = [features.feature(index) for index in feature]
    FeatureDashboard(records).save(out)
    for record in records:
        typer.echo(f"{record}\n")
    typer.echo(f"{out.resolve()} written ({out.stat().st_size / 1e6:.1f} MB): open it in a browser.")


@app.command()
def report(
    model: Annotated[
        str | None, typer.Argument(help="Bundled name, folder or hub id; without, the bundled one.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Which MLP; without, the middle one.")] = None,
    text: Annotated[str | None, typer.Option(help="To explain; without, each feature's strongest example.")] = None,
    feature: Annotated[list[int] | None, typer.Option(help="Repeatable; without, the most interesting ones.")] = None,
    n: Annotated[int, typer.Option(help="How many interesting ones.", callback=size)] = 3,
    saes: Annotated[str | None, typer.Option(help="Folder or hub id of the SAEs; without, the model's own.")] = None,
    expansion: Annotated[int | None, typer.Option(help="Which SAEs, where there are several.", callback=size)] = None,
    k: Annotated[int | None, typer.Option(help="Which SAEs, where there are several.", callback=size)] = None,
    examples: Annotated[str | None, typer.Option(help="Texts for examples; without, the model's own.")] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="What `bilens sweep` wrote: interesting features are found from it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The HTML file.", callback=page)] = Path("bilens_report.html"),
) -> None:
    """Write a report on the circuits of one layer: one self-contained HTML file."""
    from bilens.pages.report import report as write
    from bilens.train.data import load_texts

    texts = None if examples is None else load_texts(examples)
    circuits = write(
        model,
        layer=layer,
        text=text,
        features=feature,
        n=n,
        saes=saes,
        expansion=expansion,
        k=k,
        examples=texts,
        sweep=sweep,
        out=out,
        say=typer.echo,
    )
    _tell(circuits, out)


@app.command()
def trace(
    text: Annotated[str, typer.Option(help="What the model reads.")],
    model: Annotated[
        str | None, typer.Argument(help="Bundled name, folder or hub id; without, the bundled one.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Token whose logit to explain; without, the likeliest next one.")
    ] = None,
    minus: Annotated[str | None, typer.Option(help="Token whose logit is taken off.")] = None,
    feature: Annotated[
        str | None, typer.Option(help="A feature to explain instead, such as 2-mlp-in/137@11 (index, position).")
    ] = None,
    position: Annotated[int, typer.Option(help="Of the target; negative counts from the end.")] = -1,
    max_nodes: Annotated[int, typer.Option(help="Kept at most.", callback=size)] = 200,
    saes: Annotated[str | None, typer.Option(help="Folder or hub id of the SAEs; without, the model's own.")] = None,
    expansion: Annotated[int | None, typer.Option(help="Which SAEs, where there are several.", callback=size)] = None,
    k: Annotated[int | None, typer.Option(help="Which SAEs, where there are several.", callback=size)] = None,
    examples: Annotated[str | None, typer.Option(help="Texts for examples; without, the model's own.")] = None,
    check: Annotated[bool, typer.Option(help="Check the circuit by intervention.")] = True,
    out: Annotated[Path, typer.Option(help="The HTML file.", callback=page)] = Path("bilens_trace.html"),
) -> None:
    """Trace a logit or a feature back to the tokens: an interactive graph in one self-contained HTML file."""
    from bilens.pages.report import trace as write
    from bilens.train.data import load_texts

    texts = None if examples is None else load_texts(examples)
    circuit = write(
        model,
        text=text,
        target=target,
        minus=minus,
        feature=feature,
        position=position,
        max_nodes=max_nodes,
        saes=saes,
        expansion=expansion,
        k=k,
        examples=texts,
        check=check,
        out=out,
        say=typer.echo,
    )
    _tell([circuit], out)


@app.command()
def gallery(
    model: Annotated[
        str | None, typer.Argument(help="Bundled name, folder or hub id; without, the bundled one.")
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Repeatable; without, every layer.")] = None,
    n: Annotated[int, typer.Option(help="Entries of each kind and layer.", callback=size)] = 3,
    saes: Annotated[str | None, typer.Option(help="Folder or hub id of the SAEs; without, the model's own.")] = None,
    expansion: Annotated[int | None, typer.Option(help="Which SAEs, where there are several.", callback=size)] = None,
    k: Annotated[int | None, typer.Option(help="Which SAEs, where there are several.", callback=size)] = None,
    examples: Annotated[str | None, typer.Option(help="Texts for examples; without, the model's own.")] = None,
    out: Annotated[Path, typer.Option(help="The HTML file.", callback=page)] = Path("bilens_gallery.html"),
) -> None:
    """Pairs of features that make an AND, XOR, AND NOT or inhibition: a gallery in one self-contained HTML file."""
    from bilens.pages.report import gallery as write
    from bilens.train.data import load_texts

    texts = None if examples is None else load_texts(examples)
    found = write(
        model, layers=layer, n=n, saes=saes, expansion=expansion, k=k, examples=texts, out=out, say=typer.echo
    )
    _tell([found], out)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="The HTML file.", callback=page)] = Path("bilens_demo.html")) -> None:
    """Circuits of the bundled model: which pairs of input features build an output feature, in which tokens."""
    from bilens.pages.report import demo as write

    _tell(write(out, say=typer.echo), out)


@app.command()
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Which recipes; without, they are listed.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the pages and tables.", callback=folder_to_write)] = Path(
        "bilens_reproductions"
    ),
    model: Annotated[
        str | None, typer.Option(help="Bundled name, folder or hub id, for the recipes on language models.")
    ] = None,
    saes: Annotated[str | None, typer.Option(help="Folder or hub id of the SAEs; without, the model's own.")] = None,
    layer: Annotated[int | None, typer.Option(help="The one layer to measure; without, the recipe's choice.")] = None,
    expansion: Annotated[int | None, typer.Option(help="Which SAEs, where there are several.", callback=size)] = None,
    k: Annotated[int | None, typer.Option(help="Which SAEs, where there are several.", callback=size)] = None,
    texts: Annotated[str | None, typer.Option(help="Held-out texts; without, the model's own examples.")] = None,
    images: Annotated[str, typer.Option(help="As for train-image, for the recipes on image classifiers.")] = "digits",
    reduced: Annotated[bool, typer.Option(help="Everything small, to see that it runs.")] = False,
    seed: Seed = 0,
) -> None:
    """Make figures of the papers again, as far as this machine can: a page each, and a table "paper / here"."""
    from bilens.reproduce import RECIPES, Settings, check_settings, recipe

    chosen = list(RECIPES.values()) if everything else [recipe(name) for name in names or []]
    if not chosen:
        for one in RECIPES.values():
            typer.echo(f"{one.name:22}{one.where}: {one.about}")
        return
    settings = Settings(model, saes, layer, expansion, k, None, images, reduced, seed)
    if texts is not None:
        from bilens.train.data import load_texts

        settings = replace(settings, texts=load_texts(texts))
    check_settings(chosen, settings)
    for one in chosen:
        made = one.run(settings)
        typer.echo(f"{made}\n{made.save(out)} written\n")


def _tell(circuits: list, out: Path) -> None:
    for circuit in circuits:
        typer.echo(f"\n{circuit}")
    typer.echo(f"\n{out.resolve()} written ({out.stat().st_size / 1e6:.1f} MB): open it in a browser.")


def main() -> None:
    """Run the command; an error of bilens or of the file system is one line, not a traceback."""
    import sys

    try:
        app()
    # OSError: a path that cannot be read or written, no connection.
    except (BilensError, OSError, MemoryError) as error:
        typer.echo(f"bilens: {error or 'there is not enough memory for this'}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
