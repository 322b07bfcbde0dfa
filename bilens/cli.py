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
    tokenizer: Annotated[str | None, typer.Option(help="Folder, published name or hub id; without, one is trained.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Of a tokenizer trained here.")] = 4096,
    column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    d_model: int = 256,
    n_layer: int = 4,
    n_head: int = 4,
    d_hidden: int = 1024,
    n_ctx: int = 256,
    bias: Annotated[bool, typer.Option(help="Biases in the MLP.")] = False,
    gate: Annotated[str | None, typer.Option(help="relu, silu or gelu on the left branch: not bilinear any more.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the texts.")] = 10.0,
    batch_size: Annotated[int, typer.Option(help="Contexts per step.")] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    weight_decay: float = 0.1,
    bf16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = True,
    seed: int = 0,
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
        data, out, config, valid=valid, tokenizer=tokenizer, vocab_size=vocab_size, column=column, device=device
    )
    typer.echo(f"{result.validations[-1]}\nmodel written to {out}")


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
