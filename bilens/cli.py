"""The `bilens` command: arguments in, library calls, a few lines out. Heavy imports happen inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def bilens() -> None:
    """Read bilinear transformers from their weights."""


@app.command("train-lm")
def train_lm(
    data: Annotated[str, typer.Argument(help="Texts: .jsonl/.json/.txt/.parquet (.gz may follow) or a hub dataset.")],
    out: Annotated[Path, typer.Argument(help="Folder of the model; run again to go on after an interruption.")],
    valid: Annotated[str | None, typer.Option(help="Validation texts; without, 1 % of the texts is set aside.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, published name or hub id; without, one is trained.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Of a tokenizer trained here.")] = 4096,
    column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    d_model: int = 256,
    n_layer: int = 4,
    n_head: int = 4,
    d_hidden: int = 1024,
    n_ctx: int = 256,
    bias: Annotated[bool, typer.Option(help="Biases in the MLP.")] = False,
    gate: Annotated[
        str | None, typer.Option(help="relu, silu or gelu on the left branch: not bilinear any more.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the texts.")] = 10.0,
    batch_size: Annotated[int, typer.Option(help="Contexts per step.")] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    weight_decay: float = 0.1,
    bf16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = True,
    seed: int = 0,
    dtype: Annotated[str, typer.Option(help="Of the weights on disk: float32, bfloat16, float16.")] = "float32",
    device: str | None = None,
) -> None:
    """Train a bilinear language model (and its tokenizer) and write it in the published format."""
    from bilens.training import TrainConfig
    from bilens.training import train_lm as train

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
    )
    typer.echo(f"{result.validations[-1]}\nmodel written to {out}")


@app.command("train-sae")
def train_sae(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id.")],
    data: Annotated[str, typer.Argument(help="Texts, as for train-lm.")],
    out: Annotated[Path, typer.Argument(help="Folder of the SAE folders.")],
    hook: Annotated[list[str] | None, typer.Option(help="Repeatable; without, every MLP's input and output.")] = None,
    expansion: Annotated[int, typer.Option(help="Features per dimension.")] = 8,
    k: Annotated[int, typer.Option(help="Active features per token.")] = 32,
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = 4_000_000,
    batch_size: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    bf16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = True,
    column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    seed: int = 0,
) -> None:
    """Train top-k SAEs with SAELens, all hooks from one pass over the model."""
    from bilens.loading import load_model
    from bilens.sae.training import SAETrainConfig, train_saes

    config = SAETrainConfig(expansion=expansion, k=k, tokens=tokens, batch_size=batch_size, lr=lr, bf16=bf16, seed=seed)
    trained = train_saes(load_model(model), data, out, config, hooks=hook, column=column)
    typer.echo(f"{len(trained)} SAEs written to {out}: {', '.join(trained)}")


@app.command("finetune-sae")
def finetune_sae(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id.")],
    data: Annotated[str, typer.Argument(help="Texts, as for train-lm.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the SAE folders; what is tuned replaces what was.")],
    sae: Annotated[list[str], typer.Option(help="Repeatable: the SAE's folder, such as 2-mlp-out-x8-k32.")],
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = 4_000_000,
    batch_size: Annotated[int, typer.Option(help="Contexts per step.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    bf16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = True,
    column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    seed: int = 1,
) -> None:
    """Fine-tune trained SAEs on the output of the model they are spliced into; run again to go on."""
    from bilens.loading import load_model
    from bilens.sae.finetuning import FinetuneConfig, finetune_saes
    from bilens.sae.loading import load_sae_folder

    loaded = load_model(model)
    saes = {name: load_sae_folder(folder / name, n_layers=loaded.cfg.n_layers) for name in sae}
    config = FinetuneConfig(tokens=tokens, batch_size=batch_size, lr=lr, bf16=bf16, seed=seed)
    finetune_saes(loaded, saes, data, folder, config, column=column)
    typer.echo(f"{len(saes)} SAEs in {folder} fine-tuned: {', '.join(saes)}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id.")],
    data: Annotated[str, typer.Argument(help="Texts that neither the model nor the SAEs were trained on.")],
    saes: Annotated[str | None, typer.Option(help="Folder or hub id of the SAEs; without, the model's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
    column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
) -> None:
    """Validation loss of a model; sparsity, explained variance and loss recovered of its SAEs."""
    from bilens.data import load_texts
    from bilens.reporting import evaluate as run

    card = run(model, load_texts(data, column=column), saes)
    typer.echo(str(card))
    if out is not None:
        card.save(out)


@app.command()
def report(
    model: Annotated[
        str | None, typer.Argument(help="Bundled name, folder or hub id; without, the bundled one.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Which MLP; without, the middle one.")] = None,
    text: Annotated[str | None, typer.Option(help="To explain; without, each feature's strongest example.")] = None,
    feature: Annotated[list[int] | None, typer.Option(help="Repeatable; without, the most interesting ones.")] = None,
    n: Annotated[int, typer.Option(help="How many interesting ones.")] = 3,
    saes: Annotated[str | None, typer.Option(help="Folder or hub id of the SAEs; without, the model's own.")] = None,
    expansion: Annotated[int | None, typer.Option(help="Which SAEs, where there are several.")] = None,
    k: Annotated[int | None, typer.Option(help="Which SAEs, where there are several.")] = None,
    examples: Annotated[str | None, typer.Option(help="Texts for examples; without, the model's own.")] = None,
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("bilens_report.html"),
) -> None:
    """Write a report on the circuits of one layer: one self-contained HTML file."""
    from bilens.data import load_texts
    from bilens.reporting import report as write

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
        out=out,
        say=typer.echo,
    )
    _tell(circuits, out)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("bilens_demo.html")) -> None:
    """Circuits of the bundled model: which pairs of input features build an output feature, in which tokens."""
    from bilens.reporting import demo as write

    _tell(write(out, say=typer.echo), out)


def _tell(circuits: list, out: Path) -> None:
    for circuit in circuits:
        typer.echo(f"\n{circuit}")
    typer.echo(f"\n{out.resolve()} written ({out.stat().st_size / 1e6:.1f} MB): open it in a browser.")


def main() -> None:
    """Run the command; an error that bilens raised on purpose is one line, not a traceback."""
    import sys

    from bilens.errors import BilensError

    try:
        app()
    except BilensError as error:
        typer.echo(f"bilens: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
