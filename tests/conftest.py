"""What the tests share: small random models, a small tokenizer, the reference checkpoint and its layer's tracer."""

import itertools
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from tokenizers.models import WordPiece
from torch import Tensor

from bilens.decompose import Decomposer
from bilens.model.config import config_from_published
from bilens.model.loading import load_model
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.loading import load_sae
from bilens.train.data import SPECIAL_TOKENS, train_tokenizer

pytest_plugins = ["tests.browser"]

# Derandomized: a test that passes here passes again elsewhere. No deadline: a first call may import or compile.
settings.register_profile("bilens", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("bilens")

# Small matrices gain nothing from threads; one makes sums come out in one order.
torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"

SMALL: dict[str, Any] = {"n_head": 2, "n_layer": 2, "n_ctx": 32, "d_model": 16, "d_hidden": 24}


def make_model(
    *, d_vocab: int = 50, seed: int = 0, tokenizer: Any = None, **published: Any
) -> HookedBilinearTransformer:
    """A model of the published config `SMALL | published`, all weights random, biases included.

    Weights are drawn at `1 / sqrt(fan in)`, so that every part (attention, both branches, biases) moves the result by
    far more than a test's tolerance; the initial weights of training would hide mistakes in what is nearly zero.
    """
    d_vocab = d_vocab if tokenizer is None else len(tokenizer)
    cfg = config_from_published(SMALL | published, d_vocab)
    model = HookedBilinearTransformer(cfg, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            std = 0.3 if weight.ndim == 1 else 1.0 if name == "embed.weight" else weight.shape[1] ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model.eval()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """480 short made-up texts: every combination of a few words, 5 to 15 tokens each."""
    who = ["the little fox", "a tired owl", "Mira", "the old gardener", "Tobin", "a green frog"]
    did = ["found", "painted", "lost", "counted", "carried"]
    what = ["a red kite", "three stones", "the silver key", "an empty jar"]
    end = [".", " near the river!", " because it was raining.", " and then went home, very happy."]
    return [f"{a} {b} {c}{d}" for a, b, c, d in itertools.product(who, did, what, end)]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Any:
    """A tokenizer of the published kind with about 100 tokens: the words of `texts`, and every letter.

    The vocabulary is written down rather than trained: training (in `tokenizers`) breaks ties and numbers tokens
    differently from run to run, and then a random model would generate other texts in every run.
    """
    tokenizer = train_tokenizer(texts, vocab_size=200, n_ctx=32)
    words = set(re.findall(r"\w+", " ".join(texts).lower()))
    letters = sorted(set(string.ascii_lowercase) | set(string.digits))
    vocabulary = [*SPECIAL_TOKENS, *".,!'\"", *letters, *("##" + letter for letter in letters)]
    vocabulary += sorted(words - set(letters))
    tokenizer.backend_tokenizer.model = WordPiece({v: i for i, v in enumerate(vocabulary)}, unk_token="[UNK]")
    return tokenizer


@pytest.fixture
def text_model(tokenizer: Any) -> HookedBilinearTransformer:
    """A small random model that reads text; new for every test, so a test may change it."""
    return make_model(tokenizer=tokenizer)


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `datasets` caches goes with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference files and texts beside the repository; without it the test is skipped."""
    if not SHARED.exists():
        pytest.skip(f"the reference files and texts are not here: no folder {SHARED}")
    return SHARED


class Reference(NamedTuple):
    """The reference checkpoint, its prompts, and what the authors' implementation gave for them."""

    folder: Path
    model: HookedBilinearTransformer
    prompts: list[str]
    expected: dict[str, Tensor]


@pytest.fixture(scope="session")
def ts_micro() -> Reference:
    """`shared/reference/ts-micro`; without that folder the test is skipped."""
    folder = SHARED / "reference" / "ts-micro"
    if not folder.exists():
        pytest.skip(f"the reference checkpoint is not here: no folder {folder}")
    return Reference(
        folder,
        load_model(folder, device="cpu"),
        json.loads((folder / "prompts.json").read_text()),
        load_file(folder / "expected.safetensors"),
    )


class Models(NamedTuple):
    """Random models by (MLP biases, normalisation)."""

    by_kind: dict[tuple[bool, bool], HookedBilinearTransformer]

    def __call__(self, bias: bool, normalization: bool) -> HookedBilinearTransformer:
        return self.by_kind[bias, normalization]


@pytest.fixture(scope="session")
def models(tokenizer: Any) -> Models:
    """Never changed by a test."""
    kinds = itertools.product([False, True], repeat=2)
    return Models({(b, n): make_model(tokenizer=tokenizer, bias=b, normalization=n, seed=3) for b, n in kinds})


class Tracer(NamedTuple):
    """The reference layer with its SAEs, and what the authors' implementation gave for it."""

    decomposer: Decomposer
    expected: dict[str, Tensor]


@pytest.fixture(scope="session")
def tracer(ts_micro: Reference) -> Tracer:
    """`shared/reference/ts-micro-scope`; without that folder the test is skipped."""
    folder = SHARED / "reference" / "ts-micro-scope"
    if not folder.exists():
        pytest.skip(f"the reference SAEs are not here: no folder {folder}")
    saes = [load_sae(folder, point, 1, k=8, device="cpu", dtype=torch.float32) for point in ("mlp-in", "mlp-out")]
    return Tracer(Decomposer(ts_micro.model, 1, *saes), load_file(folder / "tracer_expected.safetensors"))
