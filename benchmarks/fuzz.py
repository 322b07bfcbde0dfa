"""Bad and hostile input: arguments of every wrong kind, damaged files, command lines. What is not answered in words?

    python benchmarks/fuzz.py                      everything (some 4,000 cases)
    python benchmarks/fuzz.py --only files --seed 1

Every case runs in a forked child under a time limit and an address-space limit. It passes if it returns, or raises one
of bilens' own exceptions, which name the value and say what was expected. Anything else is listed: a raw exception, a
hang, or memory that ran out. The exit status is the number of such cases, at most 100.
"""

import argparse
import contextlib
import inspect
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


import numpy as np
import torch
import typer
from sae_lens import TopKSAE, TopKSAEConfig
from safetensors.torch import save_file
from typer.testing import CliRunner

import bilens
from bilens import attribute, cli, vision
from bilens._core.files import read_json
from bilens.attribute import Circuit, Target
from bilens.decompose.sweep import Sweep, sweep_layers
from bilens.errors import BilensError
from bilens.model.config import config_from_published
from bilens.sae.loading import load_sae_folder
from bilens.train.data import load_texts, train_tokenizer

TEXTS = [f"the {a} fox {b} a {c} stone." for a in ("little", "old") for b in ("found", "lost") for c in ("red", "grey")]
SECONDS, MEMORY = 30, 2**32  # of a case; on top of what the parent has mapped
PER_CHILD, PER_ARGUMENT = 50, 14
NUMBERS: list[Any] = [True, -1, 0, 1, 10**6, 10**9, 2**62, 10**30, 1.5, float("nan"), float("inf"), 1j]
TEXTUAL: list[Any] = [
    "",
    "x",
    "nothing at all",
    "a\0b",
    "../x",
    "[01]",
    "*",
    "x" * 5000,
    "\ud800",
    "~nobody/x",
    "/proc",
]
OTHERS: list[Any] = [None, b"bytes", [], [1], ["a"], {}, {"a": 1}, (), object(), len, Path("/dev/zero"), slice(2)]
TENSORS: list[Any] = [torch.tensor(1), torch.ones(3), torch.full((2, 2), torch.nan), np.arange(3), np.float64(np.inf)]
VALUES = NUMBERS + TEXTUAL + OTHERS + TENSORS
NETWORK = {"revision", "token", "cache_dir", "local_files_only", "progress", "self"}


class Case(NamedTuple):
    """One input; `run` gets an empty folder of its own."""

    group: str
    name: str
    run: Callable[[Path], Any]


class Fixtures:
    """Small valid things, made once: the model, its SAEs, and one file of every kind that bilens reads."""

    def __init__(self, root: Path):
        self.root, self.texts = root, root / "texts.jsonl"
        self.texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        tokenizer = train_tokenizer(TEXTS, vocab_size=80, n_ctx=16)
        sizes = {"n_head": 2, "n_layer": 2, "n_ctx": 16, "d_model": 16, "d_hidden": 24}
        cfg = config_from_published(sizes, len(tokenizer))
        self.model = bilens.HookedBilinearTransformer(cfg, tokenizer, seed=0).eval()
        self.model.save_pretrained(root / "model")
        for hook in ("ln2.hook_normalized", "hook_mlp_out"):
            sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=32, k=4))
            sae.cfg.metadata.hook_name = f"blocks.1.{hook}"
            sae.save_model(root / "saes" / ("1-mlp-in-x2-k4" if hook.startswith("ln2") else "1-mlp-out-x2-k4"))
        scope = {"point": ["mlp-in", 0], "d_model": 16, "expansion": 2, "k": 4}
        shapes = {"w_enc.weight": (32, 16), "w_dec.weight": (16, 32), "b_dec": (16,)}
        self.folder_of("scope/0-mlp-in-x2-k4", "config.json", scope, "model.safetensors", shapes)
        sparsify = {"d_in": 16, "expansion_factor": 2, "num_latents": 0, "k": 4, "signed": False}
        shapes = {"encoder.weight": (32, 16), "encoder.bias": (32,), "W_dec": (32, 16), "b_dec": (16,)}
        self.folder_of("sparsify/layers.1.mlp", "cfg.json", sparsify, "sae.safetensors", shapes)
        self.saes = {path.name: load_sae_folder(path) for path in sorted((root / "saes").iterdir())}
        self.decomposer = bilens.Decomposer(self.model, 1, *self.saes.values())
        self.store = bilens.build_feature_store(self.model, self.saes, TEXTS, root / "store")
        sweep_layers([self.decomposer], root / "sweep")
        self.frozen = attribute.freeze(self.model, TEXTS[0], self.saes)
        self.circuit = Circuit.trace(self.model, self.saes, TEXTS[0])
        self.circuit.save(root / "circuit.safetensors")
        (root / "graph.json").write_text(json.dumps(self.circuit.to_attribution_graph()))
        self.classifier = vision.BilinearClassifier(vision.ClassifierConfig(16, 6, 3), seed=0)
        self.classifier.save_pretrained(root / "classifier")
        self.images, self.labels = np.arange(640, dtype=np.uint8).reshape(40, 4, 4), np.arange(40, dtype=np.uint8) % 3
        np.savez(root / "images.npz", x_train=self.images, y_train=self.labels)
        for name, array in {"images-idx3": self.images, "labels-idx1": self.labels}.items():
            (root / "idx").mkdir(exist_ok=True)
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (root / "idx" / f"train-{name}-ubyte").write_bytes(head + array.tobytes())

    def folder_of(self, name: str, config: str, values: dict, weights: str, shapes: dict) -> None:
        (self.root / name).mkdir(parents=True)
        (self.root / name / config).write_text(json.dumps(values))
        save_file({key: torch.randn(shape) for key, shape in shapes.items()}, self.root / name / weights)


# --- arguments --------------------------------------------------------------------------------------------------------


def calls(f: Fixtures) -> dict[str, tuple[Callable, dict[str, Any]]]:
    """Public functions, each with arguments that work. `OUT` stands for a path in the case's own folder."""
    m, d, target, fox = f.model, f.decomposer, Target.logit(2), TEXTS[0]
    methods = {"eigen": 1, "interaction": 1, "top_interactions": 1, "directions": 1, "constant": 1, "linear": 1}
    methods |= {"spectra": None, "sparsity": None, "outliers": None, "motifs": None, "neighbours": None}
    methods |= {"clusters": None, "strongest_interactions": None, "inner_products": [0, 1]}
    return {
        "load_model": (bilens.load_model, {"source": f.root / "model", "device": "cpu", "dtype": "float32"}),
        "list_saes": (bilens.list_saes, {"source": f.root / "saes"}),
        "load_sae": (bilens.load_sae, {"source": f.root / "saes", "point": "mlp-in", "layer": 1}),
        "load_sae_folder": (load_sae_folder, {"folder": f.root / "saes" / "1-mlp-in-x2-k4"}),
        "save_pretrained": (m.save_pretrained, {"folder": "OUT"}),
        "load_images": (vision.load_images, {"source": f.root / "images.npz"}),
        "from_arrays": (vision.ImageDataset.from_arrays, {"train_images": f.images, "train_labels": f.labels}),
        "load_classifier": (vision.load_classifier, {"source": f.root / "classifier"}),
        "save_classifier": (f.classifier.save_pretrained, {"folder": "OUT"}),
        "eigenfeatures": (vision.eigenfeatures, {"model": f.classifier}),
        "forward": (m.forward, {"input": fox}),
        "run_with_cache": (m.run_with_cache, {"input": fox, "names_filter": None, "pos_slice": None}),
        "to_tokens": (m.to_tokens, {"input": fox}),
        "to_single_token": (m.to_single_token, {"string": "fox"}),
        "generate": (m.generate, {"input": fox, "max_new_tokens": 2, "temperature": 1.0, "top_k": 3, "top_p": None}),
        "Decomposer": (bilens.Decomposer, {"model": m, "layer": 1}),
        **{f"d.{name}": (getattr(d, name), {"output": output}) for name, output in methods.items()},
        "d.attribute": (d.attribute, {"text_or_tokens": fox, "feature": 1, "position": 2}),
        "d.fidelity": (d.fidelity, {"texts": TEXTS, "k": 3}),
        "d.hosvd": (d.hosvd, {"k": 3}),
        "sweep_layers": (sweep_layers, {"decomposers": [d], "out": "OUT"}),
        "Sweep.load": (Sweep.load, {"folder": f.root / "sweep"}),
        "freeze": (attribute.freeze, {"model": m, "text_or_tokens": fox, "saes": f.saes}),
        "split": (attribute.split, {"frozen": f.frozen, "target": target}),
        "attribute_tokens": (attribute.attribute_tokens, {"frozen": f.frozen, "targets": target}),
        "trace": (Circuit.trace, {"model": m, "saes": f.saes, "text_or_tokens": fox, "target": None}),
        "Circuit.save": (f.circuit.save, {"path": "OUT"}),
        "Circuit.load": (Circuit.load, {"path": f.root / "circuit.safetensors"}),
        "page.save": (f.circuit.to_page().save, {"path": "OUT"}),
        "FeatureStore.load": (bilens.FeatureStore.load, {"folder": f.root / "store"}),
        "build_store": (bilens.build_feature_store, {"model": m, "saes": f.saes, "source": TEXTS, "folder": "OUT"}),
        "evaluate_saes": (bilens.evaluate_saes, {"model": m, "saes": f.saes, "texts": TEXTS}),
        "load_texts": (load_texts, {"source": f.texts}),
    }


def argument_cases(f: Fixtures, rng: random.Random) -> Iterator[Case]:
    for name, (function, good) in calls(f).items():
        parameters = inspect.signature(function).parameters.values()
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} | good.keys()
        for parameter in sorted(named - NETWORK):
            for value in rng.sample(VALUES, PER_ARGUMENT):

                def run(folder: Path, function=function, good=good, changed=(parameter, value)) -> Any:
                    arguments = good | dict([changed])
                    return function(**{k: folder / "out" if _is(v, "OUT") else v for k, v in arguments.items()})

                yield Case("arguments", f"{name}({parameter}={value!r:.40})", run)


def _is(value: Any, text: str) -> bool:
    return isinstance(value, str) and value == text


# --- files ------------------------------------------------------------------------------------------------------------


def readers(f: Fixtures) -> dict[str, Callable[[Path], Any]]:
    """What reads each kind of file: the file's path below the fixtures, then the call on a copy of that root."""

    def sae(name: str) -> Callable[[Path], Any]:
        return lambda root: [load_sae_folder(root / name), bilens.list_saes((root / name).parent)]

    def store(root: Path) -> Any:
        features = bilens.FeatureStore.load(root / "store")["1-mlp-in-x2-k4"]
        return [features.labels(), str(features.feature(3)), features.store.to_frame(), features.store.vocabulary]

    found = {f"model/{name}": lambda root: bilens.load_model(root / "model") for name in os.listdir(f.root / "model")}
    for folder in ("saes/1-mlp-in-x2-k4", "scope/0-mlp-in-x2-k4", "sparsify/layers.1.mlp"):
        found |= {f"{folder}/{name}": sae(folder) for name in os.listdir(f.root / folder)}
    found |= {str(p.relative_to(f.root)): store for p in sorted((f.root / "store").rglob("*")) if p.is_file()}
    found |= {f"sweep/{name}": lambda root: str(Sweep.load(root / "sweep")[1]) for name in os.listdir(f.root / "sweep")}
    found |= {
        f"classifier/{n}": lambda r: vision.load_classifier(r / "classifier")
        for n in ("config.json", "model.safetensors")
    }
    found |= {f"idx/{name}": lambda root: vision.load_images(root / "idx") for name in os.listdir(f.root / "idx")}
    return found | {
        "images.npz": lambda root: vision.load_images(root / "images.npz"),
        "circuit.safetensors": lambda root: str(Circuit.load(root / "circuit.safetensors").to_page().to_html()),
        "graph.json": lambda root: attribute.from_attribution_graph(read_json(root / "graph.json")),
        "texts.jsonl": lambda root: load_texts(root / "texts.jsonl"),
    }


def damages(data: bytes, rng: random.Random) -> Iterator[tuple[str, bytes | Callable[[Path], Any]]]:
    """Ways to damage a file: its whole, its bytes, and the values in its JSON (or in its safetensors header)."""
    yield from {
        "empty": b"",
        "zeros": bytes(64),
        "deep": b"[" * 100_000,
        "digits": b'{"k": ' + b"9" * 6000 + b"}",
    }.items()
    yield from {"pipe": os.mkfifo, "folder": os.mkdir, "zero": lambda path: os.symlink("/dev/zero", path)}.items()
    for _ in range(6):
        yield "cut", data[: rng.randrange(len(data))]
    for _ in range(8):
        place = rng.randrange(min(len(data), 400) if rng.random() < 0.5 else len(data))
        yield f"byte {place}", data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] if length < len(data) else b""
    with contextlib.suppress(ValueError):
        for _ in range(12):
            value = json.loads(header or data)
            where = _edit(value, rng)
            text = json.dumps(value).encode()
            yield where, (len(text).to_bytes(8, "little") + text + data[8 + length :]) if header else text


def _edit(value: Any, rng: random.Random, path: str = "") -> str:
    """Replace or take out one value of a JSON tree; where."""
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(places)
    if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.7:
        return _edit(value[key], rng, f"{path}.{key}")
    if rng.random() < 0.2:
        del value[key]
        return f"{path}.{key} gone"
    value[key] = rng.choice(
        [None, True, -1, 0, 1.5, 10**9, 2**62, 10**40, float("nan"), "", "x", "a\0b", [], [1], {}, "\ud800"]
    )
    return f"{path}.{key} = {value[key]!r}"


def file_cases(f: Fixtures, rng: random.Random) -> Iterator[Case]:
    for name, read in readers(f).items():
        for what, damage in damages((f.root / name).read_bytes(), rng):

            def run(folder: Path, name=name, read=read, damage=damage) -> Any:
                top = name.split("/")[0]
                copy = shutil.copytree if (f.root / top).is_dir() else shutil.copy
                copy(f.root / top, folder / top)
                (folder / name).unlink()
                (folder / name).write_bytes(damage) if isinstance(damage, bytes) else damage(folder / name)
                return read(folder)

            yield Case("files", f"{name}: {what}", run)


# --- command lines ----------------------------------------------------------------------------------------------------


def command_cases(f: Fixtures, rng: random.Random) -> Iterator[Case]:
    model, saes, texts = str(f.root / "model"), str(f.root / "saes"), str(f.texts)
    given = {
        "model": model,
        "saes": saes,
        "data": texts,
        "layer": "1",
        "text": TEXTS[0],
        "feature": "1",
        "source": model,
    }
    bad = ["-1", "0", "nan", "inf", "1e30", "x", "", "999999999999999", "[01]", "../x", "/proc", "/dev/null", "a" * 300]
    runner = CliRunner()
    for command, info in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        arguments = [p for p in info.params if p.param_type_name == "argument"]
        for parameter in info.params:
            if getattr(parameter, "is_flag", False):  # takes no value: the command would run as it should
                continue
            for value in bad:

                def run(folder: Path, command=command, arguments=arguments, parameter=parameter, value=value) -> Any:
                    words = {p.name: given.get(p.name, str(folder / "out")) for p in arguments}
                    option = parameter not in arguments
                    words |= {} if option else {parameter.name: value}
                    line = [command, *words.values(), *([parameter.opts[0], value] if option else [])]
                    line += ["--out", str(folder / "out.html")] if command in WRITES and parameter.name != "out" else []
                    result = runner.invoke(cli.app, line)
                    if result.exception is not None and not isinstance(result.exception, SystemExit):
                        raise result.exception

                yield Case("commands", f"{command} {parameter.opts[0]} {value!r:.30}", run)


WRITES = ("dashboard", "report", "trace", "gallery", "demo")  # with an option for the page


# --- running ----------------------------------------------------------------------------------------------------------


def attempts(cases: list[Case], memory: int) -> Iterator[str]:
    """Each case's verdict: `fine`, `said`, or what went wrong. A child runs many, until it dies of one."""
    done = 0
    while done < len(cases):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.dup2(1, 2)
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            for case in cases[done : done + PER_CHILD]:
                signal.alarm(SECONDS)  # nobody handles it: the child ends
                os.write(send, (_verdict(case).replace("\n", " ") + "\n").encode("utf-8", "replace"))
            os._exit(0)
        os.close(send)
        with os.fdopen(receive, "rb") as pipe:
            for line in pipe:
                done += 1
                yield line.decode().strip()
        _, status = os.waitpid(child, 0)
        if status:
            done += 1
            yield "HANG" if os.WTERMSIG(status) == signal.SIGALRM else f"DIED of status {status}"


def _verdict(case: Case) -> str:
    with TemporaryDirectory() as folder:
        try:
            case.run(Path(folder))
        except (BilensError, OSError) as error:  # the commands say an OSError in one line
            said = isinstance(error, BilensError) or case.group == "commands"
            return "said" if said else _raw(error)
        except BaseException as error:
            return _raw(error)
    return "fine"


def _raw(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/bilens/" in frame.filename]
    at = f"{frames[-1].filename.split('/bilens/')[-1]}:{frames[-1].lineno}" if frames else "outside"
    out_of_memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
    return f"{'MEMORY' if out_of_memory else 'RAW'} {type(error).__name__} at {at}: {str(error)[:160]!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["arguments", "files", "commands"])
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as root:
        fixtures, rng = Fixtures(Path(root)), random.Random(options.seed)
        makers = {"arguments": argument_cases, "files": file_cases, "commands": command_cases}
        cases = [case for name, make in makers.items() if options.only in (None, name) for case in make(fixtures, rng)]
        cases = [case for case in cases if options.match in case.name]
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        counts: Counter[str] = Counter()
        for number, (case, verdict) in enumerate(zip(cases, attempts(cases, mapped + MEMORY), strict=True)):
            counts[verdict.split()[0]] += 1
            if verdict not in ("fine", "said"):
                print(f"{case.group} {case.name} -> {verdict}", flush=True)
            if number % 500 == 499:
                print(f"{number + 1} of {len(cases)}", file=sys.stderr, flush=True)
    print(f"{len(cases)} cases:", ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    return min(100, sum(counts.values()) - counts["fine"] - counts["said"])


if __name__ == "__main__":
    sys.exit(main())
