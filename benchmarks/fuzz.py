"""Bad and hostile input: arguments of every wrong kind, damaged files, command lines. What is not answered in words?

    python benchmarks/fuzz.py                      everything (some 5,500 cases)
    python benchmarks/fuzz.py --only files --seed 1

A case passes if it returns, or raises an exception of bilens, which names the value and says what was expected.
Anything else is listed: a raw exception, more than a minute, or more than 4 GiB. The exit status is the number of such
cases, at most 100. Cases run in forked children, so that one that hangs or dies takes nothing with it.
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

SECONDS, WALL_SECONDS, MEMORY = 60, 300, 2**32  # of a case: computing, waiting, and above what the parent has mapped
PER_CHILD, PER_ARGUMENT = 50, 14
TEXTS = [f"the {a} fox {b} a {c} stone." for a in ("little", "old") for b in ("found", "lost") for c in ("red", "grey")]
NUMBERS = [True, -1, 0, 1, 10**6, 10**9, 2**62, 10**30, 1.5, float("nan"), float("inf"), 1j]
STRINGS = ["", "x", "nothing at all", "a\0b", "../x", "[01]", "*", "x" * 5000, "\ud800", "~nobody/x", "/proc"]
OTHERS = [None, b"bytes", [], [1], ["a"], {}, {"a": 1}, (), object(), len, Path("/dev/zero"), slice(2)]
ARRAYS = [torch.tensor(1), torch.ones(3), torch.full((2, 2), torch.nan), np.arange(3), np.float64(np.inf)]
IN_JSON = [None, True, -1, 0, 1.5, 10**9, 2**62, 10**40, float("nan"), "", "x", "a\0b", [], [1], {}, "\ud800"]
NO_FILES = ["", "/proc", "/dev/null", "a" * 300]
WORDS = ["-1", "0", "nan", "inf", "1e30", "x", "999999999999999", "[01]", "../x", *NO_FILES]
NETWORK = {"revision", "token", "cache_dir", "local_files_only", "progress", "options", "self"}
OUT = object()  # stands for a path in the case's own folder


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
        for point, hook in (("mlp-in", "ln2.hook_normalized"), ("mlp-out", "hook_mlp_out")):
            sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=32, k=4))
            sae.cfg.metadata.hook_name = f"blocks.1.{hook}"
            sae.save_model(root / "saes" / f"1-{point}-x2-k4")
        published = {"point": ["mlp-in", 0], "d_model": 16, "expansion": 2, "k": 4}
        shapes = {"w_enc.weight": (32, 16), "w_dec.weight": (16, 32), "b_dec": (16,)}
        self.write_sae("scope/0-mlp-in-x2-k4", "config.json", published, "model.safetensors", shapes)
        sparsify = {"d_in": 16, "expansion_factor": 2, "num_latents": 0, "k": 4, "signed": False}
        shapes = {"encoder.weight": (32, 16), "encoder.bias": (32,), "W_dec": (32, 16), "b_dec": (16,)}
        self.write_sae("sparsify/layers.1.mlp", "cfg.json", sparsify, "sae.safetensors", shapes)
        self.saes = {path.name: load_sae_folder(path) for path in sorted((root / "saes").iterdir())}
        self.decomposer = bilens.Decomposer(self.model, 1, *self.saes.values())
        bilens.build_feature_store(self.model, self.saes, TEXTS, root / "store")
        sweep_layers([self.decomposer], root / "sweep")
        self.frozen = attribute.freeze(self.model, TEXTS[0], self.saes)
        self.circuit = Circuit.trace(self.model, self.saes, TEXTS[0])
        self.circuit.save(root / "circuit.safetensors")
        (root / "graph.json").write_text(json.dumps(self.circuit.to_attribution_graph()))
        self.classifier = vision.BilinearClassifier(vision.ClassifierConfig(16, 6, 3), seed=0)
        self.classifier.save_pretrained(root / "classifier")
        self.images, self.labels = np.arange(640, dtype=np.uint8).reshape(40, 4, 4), np.arange(40, dtype=np.uint8) % 3
        np.savez(root / "images.npz", x_train=self.images, y_train=self.labels)
        (root / "idx").mkdir()
        for name, array in {"images-idx3": self.images, "labels-idx1": self.labels}.items():
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (root / "idx" / f"train-{name}-ubyte").write_bytes(head + array.tobytes())

    def write_sae(self, name: str, config: str, values: dict, weights: str, shapes: dict) -> None:
        (self.root / name).mkdir(parents=True)
        (self.root / name / config).write_text(json.dumps(values))
        save_file({key: torch.randn(shape) for key, shape in shapes.items()}, self.root / name / weights)


# --- arguments --------------------------------------------------------------------------------------------------------


def calls(f: Fixtures) -> Iterator[tuple[str, Callable, dict[str, Any]]]:
    """Public functions, each with arguments that work."""
    m, d, root = f.model, f.decomposer, f.root
    good = {"model": m, "saes": f.saes, "layer": 1, "input": TEXTS[0], "text_or_tokens": TEXTS[0], "texts": TEXTS}
    good |= {"frozen": f.frozen, "target": Target.logit(2), "targets": Target.logit(2), "output": 1, "feature": 1}
    good |= {"position": 2, "rank": 2, "ranks": [1, 2], "left": [0, 1], "which": "input", "tokens": [1, 2]}
    named = [bilens.Decomposer, attribute.freeze, attribute.split, attribute.attribute_tokens, bilens.evaluate_saes]
    named += [m.forward, m.to_tokens, m.generate, Circuit.trace]
    named += [getattr(d, name) for name in dir(d) if name[0] != "_" and inspect.ismethod(getattr(d, name))]
    for function in named:
        names = inspect.signature(function).parameters
        yield function.__qualname__, function, {key: value for key, value in good.items() if key in names}
    for function, arguments in (
        (bilens.load_model, {"source": root / "model", "device": "cpu", "dtype": "float32"}),
        (bilens.list_saes, {"source": root / "saes"}),
        (bilens.load_sae, {"source": root / "saes", "point": "mlp-in", "layer": 1}),
        (load_sae_folder, {"folder": root / "saes" / "1-mlp-in-x2-k4"}),
        (m.run_with_cache, {"input": TEXTS[0], "names_filter": None}),
        (m.to_single_token, {"string": "fox"}),
        (m.save_pretrained, {"folder": OUT}),
        (vision.load_images, {"source": root / "images.npz"}),
        (vision.ImageDataset.from_arrays, {"train_images": f.images, "train_labels": f.labels}),
        (vision.BilinearClassifier.from_pretrained, {"source": root / "classifier"}),
        (f.classifier.save_pretrained, {"folder": OUT}),
        (vision.eigenfeatures, {"model": f.classifier}),
        (sweep_layers, {"decomposers": [d], "out": OUT}),
        (Sweep.load, {"folder": root / "sweep"}),
        (f.circuit.save, {"path": OUT}),
        (Circuit.load, {"path": root / "circuit.safetensors"}),
        (f.circuit.to_page().save, {"path": OUT}),
        (bilens.FeatureStore.load, {"folder": root / "store"}),
        (bilens.build_feature_store, {"model": m, "saes": f.saes, "source": TEXTS, "folder": OUT}),
        (load_texts, {"source": f.texts}),
    ):
        yield function.__qualname__, function, arguments


def argument_cases(f: Fixtures, rng: random.Random) -> Iterator[Case]:
    for name, function, good in calls(f):
        parameters = inspect.signature(function).parameters.values()
        names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} | good.keys()
        for parameter in sorted(names - NETWORK):
            for value in rng.sample([*NUMBERS, *STRINGS, *OTHERS, *ARRAYS], PER_ARGUMENT):

                def run(folder: Path, function=function, arguments=good | {parameter: value}) -> Any:
                    return function(**{k: folder / "out" if v is OUT else v for k, v in arguments.items()})

                yield Case("arguments", f"{name}({parameter}={value!r:.40})", run)


# --- files ------------------------------------------------------------------------------------------------------------


def readers(f: Fixtures) -> dict[str, Callable[[Path], Any]]:
    """What reads each file or folder below the fixtures' root, given a copy of it."""

    def store(path: Path) -> Any:
        features = bilens.FeatureStore.load(path)["1-mlp-in-x2-k4"]
        return [features.labels(), str(features.feature(3)), features.store.to_frame(), features.store.vocabulary]

    saes = ("saes/1-mlp-in-x2-k4", "scope/0-mlp-in-x2-k4", "sparsify/layers.1.mlp")
    return dict.fromkeys(saes, lambda path: [load_sae_folder(path), bilens.list_saes(path.parent)]) | {
        "model": bilens.load_model,
        "store": store,
        "sweep": lambda path: str(Sweep.load(path)[1]),
        "classifier": vision.BilinearClassifier.from_pretrained,
        "idx": vision.load_images,
        "images.npz": vision.load_images,
        "circuit.safetensors": lambda path: str(Circuit.load(path).to_page().to_html()),
        "graph.json": lambda path: attribute.from_attribution_graph(read_json(path)),
        "texts.jsonl": load_texts,
    }


def damages(data: bytes, rng: random.Random) -> Iterator[tuple[str, bytes | Callable[[Path], Any]]]:
    """Ways to damage a file: its whole, its bytes, and the values in its JSON (or in its safetensors header)."""
    yield from {"empty": b"", "zeros": bytes(64), "deep": b"[" * 100_000, "digits": b'{"k": ' + b"9" * 6000}.items()
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
            where = edit(value, rng)
            text = json.dumps(value).encode()
            yield where, (len(text).to_bytes(8, "little") + text + data[8 + length :]) if header else text


def edit(value: Any, rng: random.Random, path: str = "") -> str:
    """Replace or take out one value of a JSON tree; where."""
    key = rng.choice(list(value) if isinstance(value, dict) else list(range(len(value))))
    if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.7:
        return edit(value[key], rng, f"{path}.{key}")
    if rng.random() < 0.2:
        del value[key]
        return f"{path}.{key} gone"
    value[key] = rng.choice(IN_JSON)
    return f"{path}.{key} = {value[key]!r}"


def file_cases(f: Fixtures, rng: random.Random) -> Iterator[Case]:
    for name, read in readers(f).items():
        whole = f.root / name
        for file in sorted(p for p in whole.rglob("*") if p.is_file()) if whole.is_dir() else [whole]:
            inner = file.relative_to(whole.parent)
            for what, damage in damages(file.read_bytes(), rng):

                def run(folder: Path, whole=whole, read=read, inner=inner, damage=damage) -> Any:
                    (shutil.copytree if whole.is_dir() else shutil.copy)(whole, folder / whole.name)
                    (folder / inner).unlink()
                    (folder / inner).write_bytes(damage) if isinstance(damage, bytes) else damage(folder / inner)
                    return read(folder / whole.name)

                yield Case("files", f"{name}, {inner}: {what}", run)


# --- command lines ----------------------------------------------------------------------------------------------------


def command_cases(f: Fixtures, rng: random.Random) -> Iterator[Case]:
    given = {"model": f.root / "model", "source": f.root / "model", "saes": f.root / "saes", "data": f.texts}
    given |= {"layer": 1, "feature": 1, "text": TEXTS[0]}
    runner = CliRunner()
    for command, info in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        arguments = [p for p in info.params if p.param_type_name == "argument"]
        page = any(p.name == "out" and p not in arguments for p in info.params)
        for parameter in info.params:
            if getattr(parameter, "is_flag", False):  # takes no value: the command would run as it should
                continue
            for value in NO_FILES if parameter.name == "out" else WORDS:

                def run(
                    folder: Path, command=command, arguments=arguments, page=page, parameter=parameter, value=value
                ):
                    words = {p.name: str(given.get(p.name, folder / "out")) for p in arguments}
                    options = ["--out", str(folder / "out.html")] if page and parameter.name != "out" else []
                    if parameter in arguments:
                        words[parameter.name] = value
                    else:
                        options += [parameter.opts[0], value]
                    result = runner.invoke(cli.app, [command, *words.values(), *options])
                    if result.exception is not None and not isinstance(result.exception, SystemExit):
                        raise result.exception

                yield Case("commands", f"{command} {parameter.opts[0]} {value!r:.30}", run)


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
                signal.alarm(WALL_SECONDS)  # nobody handles these signals: the child ends
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                os.write(send, (verdict(case).replace("\n", " ") + "\n").encode("utf-8", "replace"))
            os._exit(0)
        os.close(send)
        with os.fdopen(receive, "rb") as pipe:
            for line in pipe:
                done += 1
                yield line.decode().strip()
        _, status = os.waitpid(child, 0)
        if status:
            done += 1
            yield "HANG" if os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF) else f"DIED of status {status}"


def verdict(case: Case) -> str:
    with TemporaryDirectory() as folder:
        os.chdir(folder)  # what a case writes under a relative name goes with it
        try:
            case.run(Path(folder))
        except BilensError:
            return "said"
        except BaseException as error:
            if isinstance(error, OSError) and case.group == "commands":  # which say it in one line
                return "said"
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/bilens/" in frame.filename]
            at = f"{frames[-1].filename.split('/bilens/')[-1]}:{frames[-1].lineno}" if frames else "outside"
            full = isinstance(error, MemoryError) or "allocate memory" in str(error)
            return f"{'MEMORY' if full else 'RAW'} {type(error).__name__} at {at}: {str(error)[:160]!r}"
    return "fine"


def main() -> int:
    makers = {"arguments": argument_cases, "files": file_cases, "commands": command_cases}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(makers))
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as root:
        fixtures = Fixtures(Path(root))
        groups = [make for name, make in makers.items() if options.only in (None, name)]
        cases = [case for make in groups for case in make(fixtures, random.Random(options.seed))]
        cases = [case for case in cases if options.match in case.name]
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        counts: Counter[str] = Counter()
        for case, found in zip(cases, attempts(cases, mapped + MEMORY), strict=True):
            counts[found.split()[0]] += 1
            if found not in ("fine", "said"):
                print(f"{case.group} {case.name} -> {found}", flush=True)
    print(f"{len(cases)} cases:", ", ".join(f"{count} {found}" for found, count in counts.most_common()))
    return min(100, sum(counts.values()) - counts["fine"] - counts["said"])


if __name__ == "__main__":
    sys.exit(main())
