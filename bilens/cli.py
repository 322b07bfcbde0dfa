"""The `bilens` command: arguments in, library calls, a few lines out. Heavy imports happen inside the commands."""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from bilens import __version__
from bilens._core.checks import check_amounts, check_rates, check_seeds, check_shares, check_sizes
from bilens._core.files import PAGE, destination, destination_folder
from bilens.errors import ArgumentError, BilensError

T = TypeVar("T")


class _Panels(TyperGroup):
    """Lists the commands under the headings that they were registered with, each with its whole summary."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            panels.setdefault(str(getattr(command, "rich_help_panel", "")), []).append(
                (name, command.get_short_help_str(limit=1000))
            )
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


app = typer.Typer(cls=_Panels, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
LOOK, TRAIN, MEASURE = "Look", "Train", "Measure"


def _wait_asleep() -> None:
    """Before torch is imported: its threads wait for one another asleep, unless the environment says otherwise.

    What a page takes is many small operations. Where other processes use the cores, too, threads that wait awake take
    them from those waited for, and the work takes ten times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
page = _file(PAGE)
folder_to_write = _checked(lambda **given: [destination_folder(path) for path in given.values()])


def _size(about: str) -> Any:
    return typer.Option(help=about, callback=size)


def _rate(about: str) -> Any:
    return typer.Option(help=about, callback=rate)


def _amount(about: str) -> Any:
    return typer.Option(help=about, callback=amount)


def _folder(about: str) -> Any:
    return typer.Argument(
        help=f"{about} Run the command again to go on after an interruption.", callback=folder_to_write
    )


def _config(kind: type[T], given: dict[str, Any]) -> T:
    """A configuration from the options that have its fields' names, of all that a command was given."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in given.items() if name in names})


# Arguments and options that mean the same in every command that has them.
Model = Annotated[str, typer.Argument(help="The model: a bundled name, a folder or a hub id.")]
ModelOrBundled = Annotated[
    str | None, typer.Argument(help="The model: a bundled name, a folder or a hub id. The default is the bundled one.")
]
Texts = Annotated[
    str,
    typer.Argument(help="The texts: a .jsonl, .json, .txt or .parquet file (.gz may follow), or a hub dataset."),
]
HeldOut = Annotated[
    str | None, typer.Option(help="Texts for validation. By default 1 % of the training texts is set aside.")
]
Column = Annotated[str, typer.Option(help="The field that holds the text.")]
Split = Annotated[str, typer.Option(help="The split of a hub dataset that is read.")]
SAEs = Annotated[
    str | None, typer.Option(help="The folder or hub id that holds the SAEs. By default those of the model are used.")
]
Expansion = Annotated[int | None, _size("Use the SAEs with this many features per dimension.")]
K = Annotated[int | None, _size("Use the SAEs with this many active features per token.")]
OneLayer = Annotated[int | None, typer.Option(help="The layer to look at. The default is the middle one.")]
Layers = Annotated[list[int] | None, typer.Option(help="A layer; give it several times. The default is every layer.")]
Examples = Annotated[
    str | None, typer.Option(help="Texts to see what features fire on. By default the model's own examples are used.")
]
Page = Annotated[Path, typer.Option(help="The HTML file to write.", callback=page)]
LearningRate = Annotated[float, _rate("The largest learning rate.")]
Bf16 = Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")]
Seed = Annotated[int, typer.Option(help="The seed of everything random.", callback=_checked(check_seeds))]
Device = Annotated[str | None, typer.Option(help="The device to train on, such as cpu or cuda.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace other work that is in the folder.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"bilens {__version__}")
        raise typer.Exit


@app.callback()
def bilens(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Read bilinear transformers from their weights. Begin with `bilens demo`."""


@app.command(rich_help_panel=LOOK)
def demo(out: Page = Path("bilens_demo.html")) -> None:
    """Show circuits of the bundled language model on one page."""
    _wait_asleep()
    from bilens.pages.report import demo as write

    found = write(say=typer.echo)
    found.save(out)
    _tell(found, out)


@app.command(rich_help_panel=LOOK)
def report(
    model: ModelOrBundled = None,
    layer: OneLayer = None,
    text: Annotated[
        str | None, typer.Option(help="The text to explain. By default each feature is shown on its strongest example.")
    ] = None,
    feature: Annotated[
        list[int] | None,
        typer.Option(help="An output feature; give it several times. By default the most interesting ones are shown."),
    ] = None,
    n: Annotated[int, _size("How many interesting features to show.")] = 3,
    saes: SAEs = None,
    expansion: Expansion = None,
    k: K = None,
    examples: Examples = None,
    out: Page = Path("bilens_report.html"),
) -> None:
    """Explain features of one layer, on your text, on one page."""
    _wait_asleep()
    from bilens.pages.report import report as write
    from bilens.train.data import load_texts

    texts = None if examples is None else load_texts(examples)
    found = write(
        model,
        layer=layer,
        text=text,
        features=feature,
        n=n,
        saes=saes,
        expansion=expansion,
        k=k,
        examples=texts,
        say=typer.echo,
    )
    found.save(out)
    _tell(found, out)


@app.command(rich_help_panel=LOOK)
def trace(
    text: Annotated[str, typer.Option(help="The text that the model reads.")],
    model: ModelOrBundled = None,
    target: Annotated[
        str | None, typer.Option(help="The token whose logit is explained. The default is the likeliest next token.")
    ] = None,
    minus: Annotated[
        str | None, typer.Option(help="A second token: what is explained is how far the target's logit is above its.")
    ] = None,
    feature: Annotated[
        str | None, typer.Option(help="Explain a feature instead: SAE/INDEX@POSITION, such as 2-mlp-in/137@11.")
    ] = None,
    position: Annotated[
        int, typer.Option(help="The position of the target in the text. Negative numbers count from the end.")
    ] = -1,
    max_nodes: Annotated[int, _size("The largest number of nodes in the graph.")] = 200,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Show MLPs as pairs of their input's features, not as eigencircuits.")
    ] = False,
    saes: SAEs = None,
    expansion: Expansion = None,
    k: K = None,
    examples: Examples = None,
    check: Annotated[bool, typer.Option(help="Check the graph by intervening on the model.")] = True,
    out: Page = Path("bilens_trace.html"),
) -> None:
    """Explain a next token or a feature as an interactive graph."""
    _wait_asleep()
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
        mlps="pairs" if pairs else "eigencircuits",
        saes=saes,
        expansion=expansion,
        k=k,
        examples=texts,
        check=check,
        out=out,
        say=typer.echo,
    )
    _tell(circuit, out)


@app.command(rich_help_panel=LOOK)
def gallery(
    model: ModelOrBundled = None,
    layer: Layers = None,
    n: Annotated[int, _size("How many pairs of each kind to show for each layer.")] = 3,
    saes: SAEs = None,
    expansion: Expansion = None,
    k: K = None,
    examples: Examples = None,
    out: Page = Path("bilens_gallery.html"),
) -> None:
    """Find pairs of features that act like AND, XOR or inhibition."""
    _wait_asleep()
    from bilens.pages.report import gallery as write
    from bilens.train.data import load_texts

    texts = None if examples is None else load_texts(examples)
    found = write(
        model, layers=layer, n=n, saes=saes, expansion=expansion, k=k, examples=texts, out=out, say=typer.echo
    )
    _tell(found, out)


@app.command(rich_help_panel=LOOK)
def features(
    model: Model,
    data: Texts,
    out: Annotated[Path, _folder("The folder of the store.")],
    saes: SAEs = None,
    expansion: Expansion = None,
    k: K = None,
    sae: Annotated[
        list[str] | None,
        typer.Option(
            help="An SAE's name, such as 1-mlp-out-x8-k32; give it several times. The default is all of them."
        ),
    ] = None,
    max_texts: Annotated[int | None, _size("The largest number of texts to read.")] = None,
    n_top: Annotated[int, _size("How many of each feature's strongest contexts to store.")] = 12,
    split: Split = "train",
    column: Column = "text",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Store what every SAE feature fires on, over a large corpus.

    Texts are read as they are needed. Under torchrun the processes share the work.
    """
    from bilens._core import parallel
    from bilens.model.loading import load_model
    from bilens.pages.report import model_saes
    from bilens.sae.features.store import FeatureStoreConfig, build_feature_store

    with parallel.processes():
        loaded = load_model(model, device=parallel.local_device())
        found = model_saes(loaded, saes, expansion, k)
        if unknown := [name for name in sae or () if name not in found]:
            raise ArgumentError(f"there is no SAE {unknown[0]!r} among {', '.join(found)}.")
        found = {name: found[name] for name in sae or found}
        config = _config(FeatureStoreConfig, locals())
        store = build_feature_store(
            loaded, found, data, out, config=config, split=split, column=column, overwrite=overwrite
        )
        if parallel.is_main():
            typer.echo(f"{store}\nwritten to {out}")


@app.command(rich_help_panel=LOOK)
def names(
    model: Model,
    saes: Annotated[Path, typer.Argument(help="The folder of the SAEs.", callback=folder_to_write)],
    examples: Examples = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make names anew that are there already, also those that you edited.")
    ] = False,
) -> None:
    """Name the features of SAEs in a folder, and keep the names there.

    Reports and graphs take them from there and need no texts. The names are in names.json, which you may edit.
    """
    from bilens.model.loading import load_model
    from bilens.sae.features.kept import keep_features
    from bilens.train.data import load_texts

    texts = None if examples is None else load_texts(examples)
    written = keep_features(load_model(model), saes, texts, corpus=examples, overwrite=overwrite)
    typer.echo("\n".join(f"{path} written" for path in written) or f"every SAE in {saes} has its names already.")


@app.command(rich_help_panel=LOOK)
def dashboard(
    store: Annotated[Path, typer.Argument(help="The folder that `bilens features` wrote.")],
    sae: Annotated[str, typer.Option(help="The SAE's name, such as 1-mlp-out-x8-k32.")],
    feature: Annotated[list[int], typer.Option(help="A feature to show; give it several times.")],
    out: Page = Path("bilens_features.html"),
) -> None:
    """Show what features of such a store fire on, on one page."""
    from bilens.pages.dashboard import FeatureDashboard
    from bilens.sae.features.store import FeatureStore

    features = FeatureStore.load(store)[sae]
    records = [features.feature(index) for index in feature]
    FeatureDashboard(records).save(out)
    for record in records:
        typer.echo(f"{record}\n")
    typer.echo(f"{out.resolve()} written ({out.stat().st_size / 1e6:.1f} MB): open it in a browser.")


@app.command("train-lm", rich_help_panel=TRAIN)
def train_lm(
    data: Texts,
    out: Annotated[Path, _folder("The folder of the model.")],
    valid: HeldOut = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer's folder, published name or hub id. By default one is trained.")
    ] = None,
    vocab_size: Annotated[int, _size("The size of the vocabulary of a tokenizer that is trained.")] = 4096,
    column: Column = "text",
    d_model: Annotated[int, _size("The width of the residual stream.")] = 256,
    n_layer: Annotated[int, _size("The number of layers.")] = 4,
    n_head: Annotated[int, _size("The number of attention heads in a layer.")] = 4,
    d_hidden: Annotated[int, _size("The number of hidden units of an MLP.")] = 1024,
    n_ctx: Annotated[int, _size("The number of tokens in a context.")] = 256,
    bias: Annotated[bool, typer.Option(help="Give the MLPs biases.")] = False,
    gate: Annotated[
        str | None, typer.Option(help="Put relu, silu or gelu on the left branch. The model is then not bilinear.")
    ] = None,
    attention: Annotated[
        str,
        typer.Option(
            help="What a head mixes tokens by: softmax of its scores, or a polynomial of them, bilinear or quadratic."
        ),
    ] = "softmax",
    normalization: Annotated[
        bool,
        typer.Option(
            help="Normalise what attention, the MLPs and the unembedding read. Without, and with bilinear or "
            "quadratic attention, the model is a polynomial."
        ),
    ] = True,
    epochs: Annotated[float, _rate("The number of passes over the texts.")] = 10.0,
    batch_size: Annotated[int, _size("The number of contexts in a step.")] = 16,
    lr: LearningRate = 2e-3,
    weight_decay: Annotated[float, _amount("The weight decay of AdamW.")] = 0.1,
    bf16: Bf16 = True,
    seed: Seed = 0,
    dtype: Annotated[
        str, typer.Option(help="The type of the saved weights: float32, bfloat16 or float16.")
    ] = "float32",
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a bilinear language model and its tokenizer."""
    from bilens.train.language_model import TrainConfig
    from bilens.train.language_model import train_lm as train

    config = _config(TrainConfig, locals())
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


@app.command("train-sae", rich_help_panel=TRAIN)
def train_sae(
    model: Model,
    data: Texts,
    out: Annotated[Path, _folder("The folder in which every SAE has a folder.")],
    hook: Annotated[
        list[str] | None,
        typer.Option(
            help="A hook to train an SAE on, or READ:WRITE for a transcoder; give it several times. "
            "The default is the input and output of every MLP."
        ),
    ] = None,
    architecture: Annotated[
        str,
        typer.Option(
            help="The kind of SAE: topk, batchtopk, matryoshka_batchtopk, jumprelu, standard, gated or scope."
        ),
    ] = "topk",
    expansion: Annotated[int, _size("The number of features per dimension.")] = 8,
    k: Annotated[int, _size("The number of active features per token. For jumprelu it is the aim.")] = 32,
    l1: Annotated[float, _amount("The sparsity penalty of the standard and gated kinds, which have no k.")] = 5.0,
    bilinear_encoder: Annotated[bool, typer.Option(help="Give the scope kind a bilinear encoder.")] = False,
    encoder_bias: Annotated[bool, typer.Option(help="Give the scope kind an encoder bias.")] = False,
    tokens: Annotated[int, _size("The number of training tokens.")] = 1_000_000,
    batch_size: Annotated[int, _size("The number of tokens in a step.")] = 1024,
    lr: LearningRate = 1e-3,
    bf16: Bf16 = True,
    column: Column = "text",
    split: Split = "train",
    streaming: Annotated[
        bool, typer.Option(help="Read texts as they are needed, for data larger than memory.")
    ] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train SAEs or transcoders, all from one pass over the model."""
    from bilens._core import parallel
    from bilens.model.loading import load_model
    from bilens.sae.train.training import SAETrainConfig, train_saes

    config = _config(SAETrainConfig, locals())
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


@app.command("finetune-sae", rich_help_panel=TRAIN)
def finetune_sae(
    model: Model,
    data: Texts,
    folder: Annotated[
        Path,
        typer.Argument(
            help="The folder of the SAEs. The tuned SAEs replace those they were made from.", callback=folder_to_write
        ),
    ],
    sae: Annotated[list[str], typer.Option(help="An SAE's name, such as 2-mlp-out-x8-k32; give it several times.")],
    tokens: Annotated[int, _size("The number of training tokens.")] = 4_000_000,
    batch_size: Annotated[int, _size("The number of contexts in a step.")] = 8,
    lr: LearningRate = 1e-3,
    bf16: Bf16 = True,
    column: Column = "text",
    seed: Seed = 1,
    overwrite: Overwrite = False,
) -> None:
    """Tune trained SAEs on the output of the model they run in."""
    from bilens.model.loading import load_model
    from bilens.sae.loading import load_sae_folder
    from bilens.sae.train.finetuning import FinetuneConfig, finetune_saes

    loaded = load_model(model)
    saes = {
        name: load_sae_folder(folder / name, n_layers=loaded.cfg.n_layers, scale_attn=loaded.cfg.scale_attn)
        for name in sae
    }
    config = _config(FinetuneConfig, locals())
    finetune_saes(loaded, saes, data, folder, config, column=column, overwrite=overwrite)
    typer.echo(f"{len(saes)} SAEs in {folder} fine-tuned: {', '.join(saes)}")


@app.command("train-image", rich_help_panel=TRAIN)
def train_image(
    data: Annotated[
        str,
        typer.Argument(help="The images: digits, mnist, fashion_mnist, a folder, an .npz file or a hub dataset."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder of the model.", callback=folder_to_write)],
    d_hidden: Annotated[int, _size("The number of hidden units of a layer.")] = 256,
    n_layer: Annotated[int, _size("The number of layers.")] = 1,
    bias: Annotated[bool, typer.Option(help="Give both branches biases.")] = False,
    residual: Annotated[bool, typer.Option(help="Let every layer add its input to its output.")] = False,
    epochs: Annotated[int, _size("The number of passes over the training images.")] = 40,
    batch_size: Annotated[int, _size("The number of images in a step.")] = 128,
    lr: LearningRate = 3e-3,
    weight_decay: Annotated[float, _amount("The weight decay of AdamW.")] = 0.5,
    noise: Annotated[float, _amount("The standard deviation of noise on the pixels, which are 0 to 1.")] = 0.3,
    latent_noise: Annotated[
        float, _amount("The standard deviation of noise on every layer's input, relative to the input.")
    ] = 0.0,
    rotation: Annotated[float, _amount("The largest rotation of an image, in degrees.")] = 0.0,
    translation: Annotated[float, _amount("The largest shift of an image, in pixels.")] = 0.0,
    blur: Annotated[float, _amount("The largest standard deviation of a blur, in pixels.")] = 0.0,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a bilinear image classifier."""
    from bilens.vision.training import ImageTrainConfig, train_classifier

    config = _config(ImageTrainConfig, locals())
    trained = train_classifier(data, config, out, device=device, overwrite=overwrite)
    typer.echo(f"{trained}\nmodel written to {out}")


@app.command(rich_help_panel=TRAIN)
def anneal(
    model: Annotated[
        str, typer.Argument(help="The model: a bundled name, a folder or a hub id. It has a gate, or norms.")
    ],
    data: Texts,
    out: Annotated[Path, _folder("The folder of the model.")],
    valid: HeldOut = None,
    normalization: Annotated[
        bool, typer.Option("--normalization", help="Take the norms away too. By default only the gate goes.")
    ] = False,
    scratch: Annotated[
        str | None,
        typer.Option(help="A model to compare with, for example a bilinear one that was trained from scratch."),
    ] = None,
    ramp: Annotated[
        float, typer.Option(help="The share of the steps over which the nonlinearity goes.", callback=share)
    ] = 0.5,
    column: Column = "text",
    epochs: Annotated[float, _rate("The number of passes over the texts.")] = 1.0,
    batch_size: Annotated[int, _size("The number of contexts in a step.")] = 16,
    lr: LearningRate = 1e-3,
    bf16: Bf16 = True,
    seed: Seed = 1,
    overwrite: Overwrite = False,
) -> None:
    """Make a gated or normalised model bilinear by training it on."""
    from bilens.train.annealing import AnnealConfig
    from bilens.train.annealing import anneal as run

    config = _config(AnnealConfig, locals())
    result = run(model, data, out, config, valid=valid, scratch=scratch, column=column, overwrite=overwrite)
    typer.echo(f"{result}\nmodel written to {out}")


@app.command(rich_help_panel=MEASURE)
def evaluate(
    model: Model,
    data: Texts,
    saes: SAEs = None,
    expansion: Expansion = None,
    k: K = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file to write the figures to.", callback=_file(b"{"))] = None,
    column: Column = "text",
) -> None:
    """Measure the loss of a model and the quality of its SAEs.

    Neither the model nor the SAEs should have been trained on the texts.
    """
    from bilens.pages.report import evaluate as run
    from bilens.train.data import load_texts

    card = run(model, load_texts(data, column=column), saes, expansion=expansion, k=k)
    typer.echo(str(card))
    if out is not None:
        card.save(out)


@app.command(rich_help_panel=MEASURE)
def sweep(
    model: Model,
    out: Annotated[Path, _folder("The folder of the sweep.")],
    layer: Layers = None,
    saes: SAEs = None,
    expansion: Expansion = None,
    k: K = None,
    pairs: Annotated[int, _size("The number of leading eigenpairs of every output feature.")] = 2,
    full: Annotated[bool, typer.Option(help="Compute effective ranks too, from all eigenvalues.")] = False,
    memory: Annotated[float, _rate("The gigabytes of memory to use besides the model's.")] = 1.0,
    overwrite: Overwrite = False,
) -> None:
    """Compute the spectra of all output features of a whole model.

    Under torchrun the processes share the work.
    """
    from bilens.decompose import Decomposer, sweep_layers
    from bilens.model.loading import load_model

    loaded = load_model(model)
    layers = layer or range(loaded.cfg.n_layers)
    decomposers = [Decomposer.from_pretrained(loaded, at, saes=saes, expansion=expansion, k=k) for at in layers]
    typer.echo(
        str(sweep_layers(decomposers, out, k=pairs, full=full, memory=round(memory * 2**30), overwrite=overwrite))
    )


@app.command(rich_help_panel=MEASURE)
def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(help="The recipes to run. Without a name, all recipes are listed.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Run all recipes.")] = False,
    out: Annotated[Path, typer.Option(help="The folder of the pages and tables.", callback=folder_to_write)] = Path(
        "bilens_reproductions"
    ),
    model: Annotated[str | None, typer.Option(help="The language model: a bundled name, a folder or a hub id.")] = None,
    saes: SAEs = None,
    expansion: Expansion = None,
    k: K = None,
    layer: Annotated[
        int | None, typer.Option(help="The only layer to measure. By default each recipe chooses its layers.")
    ] = None,
    texts: Annotated[
        str | None, typer.Option(help="Held-out texts. By default the model's own examples are used.")
    ] = None,
    images: Annotated[str, typer.Option(help="The images for recipes on classifiers, as for train-image.")] = "digits",
    reduced: Annotated[bool, typer.Option(help="Make everything small, to see that it runs.")] = False,
    seed: Seed = 0,
) -> None:
    """Make figures of the papers again, beside what the paper says."""
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


def _tell(found: object, out: Path) -> None:
    typer.echo(f"\n{found}")
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
