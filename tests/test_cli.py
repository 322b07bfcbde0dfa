"""Command lines as somebody new might type them: each is one line of an error, never a traceback."""

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

import bilens
from bilens.cli import app
from bilens.errors import BilensError
from bilens.sae.train.training import SAETrainConfig, train_saes
from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("datasets_cache")

NONE_OF = {
    "size": ["0", "-1", "1.5", "x", "nan"],
    "rate": ["0", "-1", "nan", "inf", "1e400", "x"],
    "amount": ["-1", "nan", "inf"],
    "seed": ["-1", str(2**32), "1" + "0" * 40, "x"],
}
# Every command with arguments that it takes, and the kinds of its options.
COMMANDS: dict[str, tuple[str, dict[str, str]]] = {
    "train-lm": (
        "texts.jsonl OUT",
        dict.fromkeys(("vocab-size", "d-model", "n-layer", "n-head", "d-hidden", "n-ctx", "batch-size"), "size")
        | {"epochs": "rate", "lr": "rate", "weight-decay": "amount", "seed": "seed"},
    ),
    "anneal": ("tiny texts.jsonl OUT", {"batch-size": "size", "epochs": "rate", "lr": "rate", "seed": "seed"}),
    "train-image": (
        "digits OUT",
        dict.fromkeys(("d-hidden", "n-layer", "epochs", "batch-size"), "size")
        | dict.fromkeys(("weight-decay", "noise", "latent-noise", "rotation", "translation", "blur"), "amount")
        | {"lr": "rate", "seed": "seed"},
    ),
    "train-sae": (
        "tiny texts.jsonl OUT",
        dict.fromkeys(("expansion", "k", "tokens", "batch-size"), "size")
        | {"l1": "amount", "lr": "rate", "seed": "seed"},
    ),
    "finetune-sae": (
        "tiny texts.jsonl tiny-scope --sae 0-mlp-in-x2-k4",
        {"tokens": "size", "batch-size": "size", "lr": "rate", "seed": "seed"},
    ),
    "evaluate": ("tiny texts.jsonl", {"expansion": "size", "k": "size"}),
    "sweep": ("tiny OUT", {"k": "size", "expansion": "size", "pairs": "size", "memory": "rate"}),
    "features": (
        "tiny texts.jsonl OUT",
        dict.fromkeys(("max-texts", "n-top", "expansion", "k"), "size") | {"seed": "seed"},
    ),
    "report": ("tiny --out page.html", {"n": "size", "expansion": "size", "k": "size"}),
    "trace": ("tiny --text fox --out page.html", {"max-nodes": "size", "expansion": "size", "k": "size"}),
    "gallery": ("tiny --out page.html", {"n": "size", "expansion": "size", "k": "size"}),
    "reproduce": ("--out OUT", {"seed": "seed", "expansion": "size", "k": "size"}),
}
WRONG_VALUES = [
    f"{command} {arguments} --{option} {value}"
    for command, (arguments, options) in COMMANDS.items()
    for option, kind in options.items()
    for value in NONE_OF[kind]
]
# What else can be wrong, and a part of what is said about it.
WRONG = {
    "train-lm nowhere.jsonl OUT": "no file",
    "train-lm texts.jsonl file": "cannot be a folder",
    "train-lm texts.jsonl file/OUT": "cannot be a folder",
    "train-lm texts.jsonl /dev/null": "cannot be a folder",
    "train-lm texts.jsonl tiny": "holds other work",
    "train-lm cut.jsonl.gz OUT": "cut.jsonl.gz cannot be read as json",
    "train-lm empty.jsonl OUT": "empty",
    "train-lm file OUT": "must end in",
    "train-lm tiny OUT": "must end in",
    "train-lm texts.jsonl OUT --column nothing": "no column 'nothing'",
    "train-lm texts.jsonl OUT --n-ctx 1": "n_ctx is 1, expected at least 2",
    "train-lm texts.jsonl OUT --vocab-size 3": "vocab_size is 3",
    "train-lm texts.jsonl OUT --n-head 3": "not divisible by n_head",
    "train-lm texts.jsonl OUT --gate swish": "gate",
    "train-lm texts.jsonl OUT --attention linear": "attention is 'linear', expected one of softmax",
    "train-lm texts.jsonl OUT --dtype int8": "dtype",
    "train-lm texts.jsonl OUT --device foo": "device",
    "train-lm texts.jsonl OUT --tokenizer file": "no tokenizer",
    "train-lm texts.jsonl OUT --d-model 1048576 --vocab-size 100": "GB of memory",
    "train-lm texts.jsonl OUT --batch-size 100000 --vocab-size 100": "less than one batch",
    "anneal tiny texts.jsonl OUT": "no gate",
    "anneal tiny texts.jsonl OUT --ramp 2": "ramp is 2.0",
    "anneal tiny texts.jsonl OUT --ramp 0": "ramp is 0.0",
    "anneal nowhere/ texts.jsonl OUT": "no model",
    "train-image digit OUT": "digits",
    "train-image digits OUT --device foo": "device",
    "train-image digits OUT --rotation 1e30": "rotation is 1e+30",
    "train-image digits OUT --d-hidden 100000000": "GB of memory",
    "train-image digits tiny": "holds other work",
    "train-image file OUT": "file",
    "train-sae tiny texts.jsonl OUT --architecture relu": "architecture 'relu' is not one of",
    "train-sae tiny texts.jsonl OUT --tokens 5": "fewer than one batch",
    "train-sae tiny texts.jsonl OUT --hook blocks.9.hook_mlp_out": "blocks.9.hook_mlp_out",
    "train-sae tiny texts.jsonl OUT --hook hook_embed": "hook_embed",
    "train-sae tiny texts.jsonl OUT --hook :": "hook",
    "train-sae tiny texts.jsonl OUT --k 100000": "k is 100000",
    "train-sae tiny texts.jsonl OUT --bilinear-encoder": "of architecture 'scope'",
    "train-sae tiny texts.jsonl OUT --streaming --column nothing": "no column 'nothing'",
    "train-sae tiny cut.jsonl.gz OUT --streaming": "cut.jsonl.gz cannot be read as json",
    "train-sae tiny texts.jsonl tiny-scope --expansion 2 --k 4": "holds other work",
    "finetune-sae tiny texts.jsonl tiny-scope --sae ../tiny": "tiny",
    "finetune-sae tiny texts.jsonl tiny-scope --sae nothing": "nothing",
    "finetune-sae tiny texts.jsonl tiny-scope --sae 0-mlp-in-x2-k4 --tokens 1": "fewer than the",
    "finetune-sae tiny texts.jsonl tiny-scope": "--sae",
    "evaluate tiny texts.jsonl --saes nowhere": "nowhere",
    "evaluate tiny texts.jsonl --k 5": "no SAE of expansion any and k 5; it holds 0-mlp-in-x2-k4",
    "evaluate tiny texts.jsonl --saes tiny-scope --out texts.jsonl/x": "its folder cannot be made",
    "evaluate tiny texts.jsonl --saes tiny-scope --out page.txt": "of another kind",
    "evaluate tiny texts.jsonl --saes tiny-scope --out /dev/null": "device",
    "evaluate file texts.jsonl": "no model",
    "sweep tiny OUT --layer 9": "layer 9 is outside",
    "sweep tiny OUT --expansion 3": "no SAE",
    "sweep tiny OUT --memory 1e-30": "memory is 0",
    "sweep tiny file": "cannot be a folder",
    "features tiny cut.jsonl.gz OUT": "cut.jsonl.gz cannot be read as json",
    "features tiny texts.jsonl OUT --sae nothing": "no SAE 'nothing'",
    "features tiny texts.jsonl OUT --saes tiny": "tiny holds no SAEs",
    "names tiny tiny": "tiny holds no SAEs on this machine",
    "names tiny file": "cannot be a folder",
    "names tiny tiny-scope --examples empty.jsonl": "empty",
    "dashboard tiny --sae x --feature 0 --out page.html": "no feature store",
    "dashboard store --sae nothing --feature 0 --out page.html": "no SAE 'nothing'",
    "dashboard store --sae 0-mlp-in-x2-k4 --feature -1 --out page.html": "outside",
    "dashboard store --sae 0-mlp-in-x2-k4 --feature 99999999999999999999 --out page.html": "outside",
    "dashboard store --sae 0-mlp-in-x2-k4 --out page.html": "--feature",
    "dashboard store --sae 0-mlp-in-x2-k4 --feature 0 --out page.txt": "of another kind",
    "report tiny --layer 9 --out page.html": "layer",
    "report tiny --feature 100000 --out page.html": "feature",
    "report tiny --feature -1 --out page.html": "feature",
    "report tiny --examples empty.jsonl --out page.html": "empty",
    "report tiny --out tiny/config.json": "of another kind",
    "report tiny --out tiny": "is a folder",
    "report nowhere/x/y --out page.html": "no model",
    "trace tiny --text fox --target nothing-such --out page.html": "token",
    "trace tiny --text fox --minus fox --out page.html": "without a target",
    "trace tiny --text fox --feature x --out page.html": "names no feature",
    "trace tiny --text fox --feature 0-mlp-in/99999@1 --out page.html": "99999",
    "trace tiny --text fox --position 99 --out page.html": "position 99",
    "trace tiny --text fox --position 1000000000000000000000000 --out page.html": "outside",
    "trace tiny --out page.html": "--text",
    "gallery tiny --layer 9 --out page.html": "layer 9 is outside",
    "gallery tiny --out /proc/page.html": "cannot be written",
    "reproduce nothing --out OUT": "no recipe 'nothing'",
    "reproduce 2A --out file": "cannot be a folder",
    "nothing": "No such command",
    "train-lm": "Missing argument",
    "demo --out page.txt": "of another kind",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, texts: list[str]) -> Path:
    """A folder with a tiny model, its SAEs, texts, a store, and files that are none of these."""
    folder = tmp_path_factory.mktemp("place")
    model = make_model(tokenizer=tokenizer)
    model.save_pretrained(folder / "tiny")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines)
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-300])
    (folder / "page.txt").write_text("somebody's notes")
    for name in ("file", "empty.jsonl"):
        (folder / name).touch()
    config = SAETrainConfig(expansion=2, k=4, tokens=256, batch_size=64, bf16=False)
    train_saes(model, texts, folder / "tiny-scope", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made = CliRunner().invoke(app, ["features", "tiny", "texts.jsonl", "store", "--max-texts", "20"])
    assert made.exit_code == 0, made.output
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this is to be looked for on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refused(line: str) -> str:
    """What the command says; whatever it raises but errors of bilens or of the file system is the test's failure."""
    shown = CliRunner().invoke(app, line.split())
    assert shown.exit_code != 0, line
    if not isinstance(shown.exception, SystemExit):
        assert isinstance(shown.exception, BilensError | OSError), line
    said = shown.output + str(shown.exception)
    assert "Aborted" not in said, line
    return said


def test_values_that_are_none(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of every command, by its name; before anything is imported, loaded or written."""
    monkeypatch.chdir(place)
    before = snapshot(place)
    monkeypatch.setattr("bilens.model.loading.load_model", lambda *args, **kwargs: pytest.fail("loaded the model"))
    for line in WRONG_VALUES:
        option = line.split()[-2]
        assert option in refused(line), line
    assert snapshot(place) == before


@pytest.mark.parametrize("line", WRONG)
def test_what_else_is_wrong(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Nothing that was there is changed."""
    monkeypatch.chdir(place)
    before = snapshot(place)
    assert WRONG[line] in " ".join(refused(line.replace("OUT", str(tmp_path / "out"))).split()), line
    assert snapshot(place) == before


def test_there_are_many(place: Path) -> None:
    """The lists name every command and every option that takes a number."""
    lines = [line.split() for line in itertools.chain(WRONG_VALUES, WRONG)]
    assert len(lines) > 300
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert commands <= {line[0] for line in lines}


def test_help_groups_the_commands_and_cuts_nothing_off() -> None:
    """At the width of a terminal of 80 columns; `demo` comes first."""
    shown = CliRunner().invoke(app, ["--help"], terminal_width=80).output
    headings = [line.rstrip(":") for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Options", "Look", "Train", "Measure"]
    assert shown.split("Look:")[1].split()[0] == "demo"
    assert "..." not in shown.split("Look:")[1]
    for command in app.registered_commands:
        name = command.name or str(getattr(command.callback, "__name__", ""))
        [line] = [line for line in shown.splitlines() if line.split()[:1] == [name]]
        assert line.endswith("."), f"the summary of {name} does not fit on a line"


def test_every_option_says_in_a_sentence_what_it_is() -> None:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    for name, command in group.commands.items():
        for one in command.params:
            text = str(getattr(one, "help", ""))
            assert text[:1].isupper(), f"{name} {one.name}: {text!r}"
            assert text.endswith("."), f"{name} {one.name}: {text!r}"
            assert one.name != "k" or "active features per token" in text, f"--k of {name} is the SAE's everywhere"


def test_version() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"bilens {bilens.__version__}\n")


def test_recipes_are_listed_at_once() -> None:
    """Nothing heavy is imported for the list."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom bilens.cli import app\n"
        "shown = CliRunner().invoke(app, ['reproduce'])\n"
        "assert 'figure 2A' in shown.output, shown\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pandas'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
