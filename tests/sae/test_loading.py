"""Finding and reading SAEs: parity with the authors' outputs, both formats, and every way a source can be wrong."""

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import bilens.model.files
import bilens.sae.loading
from bilens.attribute import freeze
from bilens.errors import ArgumentError, CheckpointError, ModelNotFoundError, SAEMismatchError
from bilens.model.hook_points import POINT_TO_HOOK, hook_of, point_of
from bilens.sae.loading import SAEEntry, folder_name, list_saes, load_sae, load_sae_folder, load_saes, sae_source
from bilens.sae.scope import ScopeSAE
from tests.conftest import make_model
from tests.random_saes import make_sae

SCOPE = Path(__file__).parents[3] / "shared" / "reference" / "ts-micro-scope"
REFERENCES = sorted(path.parent.name for path in SCOPE.glob("*/expected.safetensors"))
needs_reference = pytest.mark.skipif(not REFERENCES, reason="the reference SAEs (shared/reference) are not here")

D, EXPANSION, K = 8, 2, 3
D_SAE = D * EXPANSION


def published(
    root, point="mlp-in", layer=0, expansion=EXPANSION, k=K, tag=None, bilinear=False, bias=False, seed=0
) -> Path:
    """Write a random SAE in the published format."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    d_sae = expansion * D
    rows = (2 if bilinear else 1) * d_sae
    tensors = {"w_enc.weight": draw(rows, D), "w_dec.weight": draw(D, d_sae), "b_dec": draw(D)}
    if bias:
        tensors["w_enc.bias"] = draw(rows)
    folder = root / folder_name(point, layer, expansion, k, tag)
    folder.mkdir(parents=True)
    written = {
        "point": [point, layer],
        "target": None,
        "d_model": D,
        "expansion": expansion,
        "k": k,
        "n_ctx": 16,
        "bilinear_encoder": bilinear,
        "encoder_bias": bias,
        "normalize": 3.0,  # in configs, but never applied
        "tag": tag,
    }
    (folder / "config.json").write_text(json.dumps(written))
    save_file(tensors, folder / "model.safetensors")
    return folder


def saelens(root, point="mlp-out", layer=1, hook_name=None, dtype="float16") -> Path:
    """Write a random SAE in SAELens' format, by SAELens."""
    torch.manual_seed(layer)
    sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=D_SAE, k=K))
    sae.cfg.metadata.hook_name = hook_name
    folder = root / folder_name(point, layer, EXPANSION, K)
    sae.to(dtype=getattr(torch, dtype)).save_model(folder)
    return folder


@pytest.fixture
def scope(tmp_path):
    published(tmp_path, "mlp-out", 1)
    published(tmp_path, "mlp-in", 1)
    published(tmp_path, "mlp-in", 1, k=5)
    published(tmp_path, "mlp-in", 10, tag="long-run")
    published(tmp_path, "mlp-in", 10)
    saelens(tmp_path, "resid-mid", 1)
    (tmp_path / "notes").mkdir()
    pickled = tmp_path / "3-mlp-in-x2-k3"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"never opened")
    return tmp_path


# --- parity -----------------------------------------------------------------------------------------------------------


@needs_reference
def test_all_seven_references_are_there():
    assert len(REFERENCES) == 7
    assert {entry.folder for entry in list_saes(SCOPE)} == set(REFERENCES)


@needs_reference
@pytest.mark.parametrize("name", REFERENCES)
def test_parity_with_the_authors_outputs(name):
    (entry,) = (entry for entry in list_saes(SCOPE) if entry.folder == name)
    sae = load_sae(SCOPE, entry.point, entry.layer, entry.expansion, entry.k)
    expected = load_file(SCOPE / name / "expected.safetensors")
    with torch.no_grad():
        recons, cache = sae.run_with_cache(expected["x"])
    assert_close(cache["hook_sae_acts_pre"], expected["pre_acts"], atol=1e-4, rtol=0)
    assert_close(cache["hook_sae_acts_post"], expected["feature_acts"], atol=1e-4, rtol=0)
    assert_close(recons, expected["reconstruction"], atol=1e-4, rtol=0)
    assert sae.cfg.metadata.hook_name == entry.hook_name
    assert (cache["hook_sae_acts_post"] < 0).any() == (entry.k == 200)
    assert sae.cfg.bilinear_encoder == (entry.k == 6)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINT_TO_HOOK)
def test_points_and_hooks_are_inverse(point):
    assert point_of(hook_of(point, 12)) == (point, 12)


def test_names_of_hooks():
    assert hook_of("mlp-in", 0) == "blocks.0.ln2.hook_normalized"
    assert hook_of("attn-out", 3) == "blocks.3.hook_attn_out"
    with pytest.raises(SAEMismatchError, match=r"Did you mean 'blocks\.2\.hook_mlp_out'"):
        point_of("blocks.2.hook_mlp_outs")
    with pytest.raises(SAEMismatchError, match="has no published point"):
        point_of("ln_final.hook_scale")


def test_a_misspelt_point_names_the_nearest(scope):
    with pytest.raises(SAEMismatchError, match="Did you mean 'mlp-in'"):
        load_sae(scope, "mlp_in", 1)


# --- listing and choosing ---------------------------------------------------------------------------------------------


def test_listing(scope):
    saes = list_saes(scope)
    assert [entry.folder for entry in saes] == [
        "1-resid-mid-x2-k3",
        "1-mlp-in-x2-k3",
        "1-mlp-in-x2-k5",
        "1-mlp-out-x2-k3",
        "10-mlp-in-x2-k3",
        "10-mlp-in-x2-k3-long-run",
    ]
    assert saes[0].format == "saelens"
    assert saes[-1] == SAEEntry(
        "10-mlp-in-x2-k3-long-run", "mlp-in", 10, 2, 3, "long-run", "blocks.10.ln2.hook_normalized", "published"
    )
    frame = saes.to_frame()
    assert list(frame.columns) == ["folder", "point", "layer", "expansion", "k", "tag", "hook_name", "format"]
    assert frame.query("layer == 10").k.tolist() == [3, 3]


def test_a_folder_that_does_not_say_its_hook(tmp_path):
    """What SAELens wrote of an SAE without a hook: the message says which file to put it in, and then it loads."""
    folder = tmp_path / "saes" / "mine"
    make_sae("topk").save_model(folder)
    message = r"mine/cfg\.json does not say which hook .* add 'hook_name' to its 'metadata'"
    for call in (
        lambda: load_sae(tmp_path / "saes", "mlp-out", 1),
        lambda: load_sae(folder, "mlp-out", 1),
        lambda: load_sae_folder(folder),
    ):
        with pytest.raises(ModelNotFoundError, match=message):
            call()
    with pytest.warns(UserWarning, match=message):
        list_saes(tmp_path / "saes")
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.1.hook_mlp_out"
    (folder / "cfg.json").write_text(json.dumps(config))
    assert load_sae(tmp_path / "saes", "mlp-out", 1).cfg.metadata.hook_name == "blocks.1.hook_mlp_out"
    with pytest.raises(ModelNotFoundError, match=r"it holds mine \(blocks\.1\.hook_mlp_out\)"):
        load_sae(tmp_path / "saes", "mlp-out", 2)


def test_an_empty_listing_is_an_empty_frame(tmp_path):
    assert list_saes(tmp_path).to_frame().shape == (0, 8)


def test_what_is_unique_need_not_be_said(scope):
    assert load_sae(scope, "mlp-out", 1).cfg.metadata.hook_name == "blocks.1.hook_mlp_out"
    assert load_sae(scope, "mlp-in", 1, k=5).cfg.k == 5
    assert load_sae(str(scope), "mlp-in", 10, tag="long-run").cfg.d_sae == D_SAE
    assert load_sae(scope, "mlp-in", 10, tag="").cfg.d_sae == D_SAE


def test_several_that_fit_are_named(scope):
    with pytest.raises(SAEMismatchError, match=r"2 SAEs .* 1-mlp-in-x2-k3, 1-mlp-in-x2-k5.*k="):
        load_sae(scope, "mlp-in", 1)
    with pytest.raises(SAEMismatchError, match="tag=''"):
        load_sae(scope, "mlp-in", 10, 2, 3)


def test_none_that_fits_names_what_there_is(scope):
    with pytest.raises(
        ModelNotFoundError, match=r"'1-mlp-in-x2-k4'; of that point and layer it holds 1-mlp-in-x2-k3, 1"
    ):
        load_sae(scope, "mlp-in", 1, 2, 4)
    with pytest.raises(ModelNotFoundError, match=r"'11-mlp-in-x\*-k3'; it holds .*Did you mean '10?-mlp-in-x2-k3'"):
        load_sae(scope, "mlp-in", 11, k=3)


def test_long_listings_are_cut(tmp_path):
    for layer in range(15):
        published(tmp_path, layer=layer)
    with pytest.raises(ModelNotFoundError, match=r"11-mlp-in-x2-k3, \.\.\. \(15 in all\)"):
        load_sae(tmp_path, "mlp-in", 99)


def test_unknown_sources(tmp_path):
    with pytest.raises(ModelNotFoundError, match="not a bundled model"):
        list_saes("no such/thing/at all")
    with pytest.raises(ModelNotFoundError, match="holds no SAE folder"):
        load_sae(tmp_path, "mlp-in", 0)
    with pytest.raises(ModelNotFoundError, match="is no SAE folder"):
        load_sae_folder(tmp_path)


# --- the published format ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_published_weights_arrive_under_saelens_names(tmp_path, bilinear, bias):
    folder = published(tmp_path, bilinear=bilinear, bias=bias)
    stored = load_file(folder / "model.safetensors")
    before = torch.get_rng_state()
    sae = load_sae(tmp_path, "mlp-in", 0, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(sae, ScopeSAE)
    assert torch.equal(sae.W_enc, stored["w_enc.weight"].T)
    assert torch.equal(sae.W_dec, stored["w_dec.weight"].T)
    assert torch.equal(sae.b_dec, stored["b_dec"])
    assert torch.equal(sae.b_enc, stored.get("w_enc.bias", torch.zeros(sae.W_enc.shape[1])))
    assert (sae.cfg.device, sae.cfg.dtype, sae.cfg.metadata.context_size) == ("cpu", "float32", 16)
    sae.save_model(tmp_path / "saved" / folder.name)
    again = load_sae(tmp_path / "saved", "mlp-in", 0, device="cpu")
    x = torch.randn(4, D)
    assert_close(again(x), sae(x), rtol=0, atol=0)


def test_absent_switches_mean_a_plain_encoder(tmp_path):
    folder = published(tmp_path)
    needed = {"point": ["mlp_in", 0], "d_model": D, "expansion": EXPANSION, "k": K}  # the underscore is published, too
    (folder / "config.json").write_text(json.dumps(needed))
    sae = load_sae_folder(folder)
    assert not sae.cfg.bilinear_encoder
    assert sae.b_enc.abs().sum() == 0


def test_precision(tmp_path):
    folder = published(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert load_sae(tmp_path, "mlp-in", 0).W_enc.dtype == torch.float32
    for dtype, expected in (("auto", torch.float16), ("float64", torch.float64), (torch.bfloat16, torch.bfloat16)):
        sae = load_sae(tmp_path, "mlp-in", 0, dtype=dtype)
        assert sae.W_enc.dtype == sae.dtype == expected
        assert sae.cfg.dtype == str(expected).removeprefix("torch.")
    with pytest.raises(ValueError, match="Did you mean 'float32'"):
        load_sae(tmp_path, "mlp-in", 0, dtype="flaot32")


def test_attn_out_is_moved_behind_the_residual_scale(tmp_path):
    n_layers, scale = 3, 6**-0.5
    published(tmp_path / "attn", "attn-out", 2, bias=True)
    published(tmp_path / "same", "resid-mid", 2, bias=True)
    sae = load_sae(tmp_path / "attn", "attn-out", 2, n_layers=n_layers, dtype=torch.float64)
    raw = load_sae(tmp_path / "same", "resid-mid", 2, dtype=torch.float64)  # the same weights, unmoved
    attention = torch.randn(4, D, dtype=torch.float64)
    assert_close(sae.encode(scale * attention), raw.encode(attention))
    assert_close(sae(scale * attention), scale * raw(attention))
    # Saved by SAELens it belongs to the hook already, and is not moved again.
    sae.save_model(tmp_path / "saved" / "2-attn-out-x2-k3")
    again = load_sae(tmp_path / "saved", "attn-out", 2, dtype=torch.float64)
    assert_close(again(attention), sae(attention), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [{"n_layers": 3}, {"n_layers": 2, "scale_attn": False}], ids=str)
def test_an_attn_out_sae_is_refused_by_a_model_of_another_scale(tmp_path, wrong):
    """What was folded into it goes with it, also through SAELens' format."""
    model, tokens = make_model(d_model=D), torch.tensor([1, 2, 3])
    published(tmp_path / "scope", "attn-out")
    fits = load_sae(tmp_path / "scope", "attn-out", 0, n_layers=2)
    assert freeze(model, tokens, fits).saes
    model.add_sae(fits)
    model.reset_saes()
    load_sae(tmp_path / "scope", "attn-out", 0, **wrong).save_model(tmp_path / "saved" / "0-attn-out-x2-k3")
    other = load_sae(tmp_path / "saved", "attn-out", 0)
    for use in (lambda: model.add_sae(other), lambda: freeze(model, tokens, other)):
        with pytest.raises(SAEMismatchError, match=r"by 0\.5\. Load it with n_layers=2, scale_attn=True"):
            use()


@pytest.mark.parametrize("n_layers", [None, 0])
def test_attn_out_asks_for_the_number_of_layers(tmp_path, n_layers):
    published(tmp_path, "attn-out")
    with pytest.raises(SAEMismatchError, match=rf"n_layers= .*got {n_layers}"):
        load_sae(tmp_path, "attn-out", 0, n_layers=n_layers)


def rewrite(folder, **changes):
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def rewrite_config(folder, file="config.json", **changes):
    config = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(config))


DAMAGE = {
    "NaN": (lambda f: rewrite(f, b_dec=torch.full((D,), torch.nan)), "b_dec holds 8 values that are NaN"),
    "missing": (lambda f: rewrite(f, b_dec=None), "no tensor 'b_dec'"),
    "shape": (lambda f: rewrite(f, b_dec=torch.zeros(D + 1)), r"b_dec has shape \(9,\), the config asks for \(8,\)"),
    "left over": (lambda f: rewrite(f, lookup=torch.zeros(2)), r"\['lookup'\] have no place"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(b"\x40" * 50), "A truncated download"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has config.json but no model.safetensors"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files(tmp_path, kind):
    folder = published(tmp_path)
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_sae(tmp_path, "mlp-in", 0)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"k": "3"}, CheckpointError, "k is '3', expected a positive integer"),
        ({"d_model": 0}, CheckpointError, "d_model is 0"),
        ({"point": "mlp-in"}, CheckpointError, r"expected \[name, layer\]"),
        ({"bilinear_encoder": True}, CheckpointError, r"the config asks for \(32, 8\)"),
        ({"encoder_bias": True}, CheckpointError, r"no tensor 'w_enc\.bias'"),
        ({"point": ["mlp-in", 1]}, SAEMismatchError, "describes the SAE '1-mlp-in-x2-k3'"),
        ({"k": 4}, SAEMismatchError, "describes the SAE '0-mlp-in-x2-k4'"),
        ({"target": ["mlp-out", 0]}, SAEMismatchError, "is a transcoder"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, config, error, message):
    rewrite_config(published(tmp_path), **config)
    with pytest.raises(error, match=message):
        load_sae(tmp_path, "mlp-in", 0)


def test_a_needed_key_that_is_missing_is_named(tmp_path):
    folder = published(tmp_path)
    (folder / "config.json").write_text(json.dumps({"point": ["mlp-in", 0], "d_modle": D, "expansion": 2, "k": 3}))
    with pytest.raises(CheckpointError, match=r"no 'd_model'.*Did you mean 'd_modle'"):
        load_sae(tmp_path, "mlp-in", 0)


def test_more_active_features_than_features(tmp_path):
    published(tmp_path, k=D_SAE + 1)
    with pytest.raises(CheckpointError, match="k 17 is more than"):
        load_sae(tmp_path, "mlp-in", 0)


def test_a_target_that_is_the_point_is_an_autoencoder(tmp_path):
    rewrite_config(published(tmp_path), target=["mlp-in", 0])
    assert load_sae(tmp_path, "mlp-in", 0).cfg.k == K


# --- SAELens' format --------------------------------------------------------------------------------------------------


def test_saelens_folders_load_in_single_precision(tmp_path):
    folder = saelens(tmp_path)
    assert load_file(folder / "sae_weights.safetensors")["W_enc"].dtype == torch.float16
    sae = load_sae(tmp_path, "mlp-out", 1)
    assert isinstance(sae, TopKSAE)
    assert sae.W_enc.dtype == sae.dtype == torch.float32
    assert sae.cfg.dtype == "float32"
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_mlp_out"
    assert_close(sae.W_enc.half(), SAE.load_from_disk(folder).W_enc)
    assert load_sae(tmp_path, "mlp-out", 1, dtype="auto").dtype == torch.float16


def test_a_saelens_folder_of_another_hook_is_refused(tmp_path):
    saelens(tmp_path, hook_name="blocks.0.hook_mlp_out")
    with pytest.raises(SAEMismatchError, match=r"was trained on blocks\.0\.hook_mlp_out"):
        load_sae(tmp_path, "mlp-out", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 5}, r"W_dec has shape \(16, 8\), the config"),
        ({"architecture": "unheard_of"}, "KeyError: 'unheard_of'"),
        ({"normalize_activations": "twice"}, "normalize_activations must be"),
    ],
)
def test_saelens_configs_that_do_not_fit(tmp_path, changes, message):
    rewrite_config(saelens(tmp_path), "cfg.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_sae(tmp_path, "mlp-out", 1)


def test_saelens_weights_with_nan_or_cut_off(tmp_path):
    path = saelens(tmp_path) / "sae_weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(CheckpointError, match="truncated download"):
        load_sae(tmp_path, "mlp-out", 1)
    path.write_bytes(whole)
    save_file(load_file(path) | {"b_dec": torch.full((D,), torch.inf)}, path)
    with pytest.raises(CheckpointError, match="b_dec holds 8 values"):
        load_sae(tmp_path, "mlp-out", 1)


# --- bundled ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    for module in (bilens.model.files, bilens.sae.loading):
        monkeypatch.setattr(module, "PRETRAINED", tmp_path)
    (tmp_path / "ts-tiny").mkdir()
    (tmp_path / "ts-tiny" / "config.json").write_text("{}")
    return tmp_path / "ts-tiny" / "saes"


def test_bundled_saes_go_by_the_models_name(bundled):
    saelens(bundled)
    assert [entry.folder for entry in list_saes("ts-tiny")] == ["1-mlp-out-x2-k3"]
    assert load_sae("ts-tiny", "mlp-out", 1).cfg.dtype == "float32"
    with pytest.raises(ModelNotFoundError, match="Did you mean 'ts-tiny'"):
        list_saes("ts-tinny")


def test_a_bundled_model_without_saes_lists_none(bundled):
    assert list_saes("ts-tiny") == ()


# --- folders that go by no name of ours -------------------------------------------------------------------------------


def test_a_saelens_folder_of_any_name_goes_by_its_hook(tmp_path):
    """`sae.save_model("mysaes/x")`: the folder of it, and the folder itself, are sources."""
    folder = saelens(tmp_path, hook_name="blocks.1.hook_mlp_out").rename(tmp_path / "x")
    for source in (tmp_path, folder, str(folder)):
        (entry,) = list_saes(source)
        assert entry == SAEEntry("x", "mlp-out", 1, EXPANSION, K, "x", "blocks.1.hook_mlp_out", "saelens")
        assert load_sae(source, "mlp-out", 1, EXPANSION, K, "x").cfg.metadata.hook_name == entry.hook_name
    assert load_sae_folder(folder).cfg.k == K
    saelens(tmp_path)  # another one on the same hook
    with pytest.raises(SAEMismatchError, match=r"2 SAEs .* fit: 1-mlp-out-x2-k3, x"):
        load_sae(tmp_path, "mlp-out", 1)
    assert len(list_saes(folder)) == 1
    rewrite_config(folder, "cfg.json", metadata={})
    with pytest.raises(ModelNotFoundError, match=r"is no SAE folder: .*or a cfg.json that names its hook"):
        load_sae_folder(folder)


def test_a_source_without_saes_says_so(tmp_path):
    with pytest.warns(UserWarning, match="holds no SAE folder: expected the name"):
        assert not list_saes(tmp_path)


def sparsify(root, name="layers.1.mlp", signed=None, **changes) -> Path:
    """Write a random top-k SAE as EleutherAI's sparsify does."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (D_SAE, D), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D), "b_dec": (D,)}
    tensors = {key: torch.randn(*shape, generator=generator) for key, shape in shapes.items()}
    config = {"activation": "topk", "expansion_factor": EXPANSION, "normalize_decoder": True, "num_latents": 0}
    config |= {"k": K, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D} | changes
    (root / name).mkdir(parents=True)
    (root / name / "cfg.json").write_text(json.dumps(config | ({} if signed is None else {"signed": signed})))
    save_file(tensors, root / name / "sae.safetensors")
    return root / name


@pytest.mark.parametrize("signed", [None, False, True])
@pytest.mark.parametrize("name", ["layers.1.mlp", "transformer.h.1.mlp", "1-mlp-out-x2-k3"])
def test_a_sparsify_sae_computes_what_its_library_does(tmp_path, name, signed):
    """`b_dec` is taken off, the k largest are kept, negatives set to zero unless `signed`, `b_dec` is added."""
    held = load_file(sparsify(tmp_path, name, signed) / "sae.safetensors")
    (entry,) = list_saes(tmp_path)
    assert (entry.point, entry.layer, entry.expansion, entry.k, entry.format) == ("mlp-out", 1, 2, K, "sparsify")
    sae = load_sae(tmp_path, "mlp-out", 1, device="cpu", dtype="float64")
    held = {key: tensor.double() for key, tensor in held.items()}
    x = 0.2 * torch.randn(50, D, dtype=torch.float64)
    pre = (x - held["b_dec"]) @ held["encoder.weight"].T + held["encoder.bias"] - 4.0  # few are positive
    with torch.no_grad():
        sae.b_enc -= 4.0
        values, indices = pre.topk(K)
        kept = values if signed else values.relu()
        assert (values < 0).any()
        assert_close(sae.encode(x), torch.zeros_like(pre).scatter(-1, indices, kept))
        assert_close(sae(x), (kept[..., None] * held["W_dec"][indices]).sum(1) + held["b_dec"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"transcode": True}, SAEMismatchError, "transcode is True"),
        ({"skip_connection": True}, SAEMismatchError, "skip_connection is True"),
        ({"activation": "groupmax"}, SAEMismatchError, "activation is 'groupmax'"),
        ({"num_latents": 24}, CheckpointError, r"the config asks for \(24, 8\)"),
        ({"k": D_SAE + 1}, CheckpointError, "k 17 is more than"),
        ({"k": "x"}, CheckpointError, "k is 'x', expected a positive integer"),
        ({"signed": "false"}, CheckpointError, "signed is 'false', expected true or false"),
    ],
)
def test_sparsify_configs_that_do_not_fit(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        load_sae_folder(sparsify(tmp_path, **changes))


# --- what a SAELens configuration may not say -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": None}, CheckpointError, "k is None"),
        *[({"k": k}, CheckpointError, "k is .*, expected a positive integer") for k in (0, -1, "x", 1.5, True)],
        ({"k": 10**9}, CheckpointError, "k 1000000000 is more than"),
        ({"k": 4}, SAEMismatchError, "holds an SAE of 16 features of 8 inputs, k 4, which is not what its name says"),
        ({"d_sae": 10**12}, CheckpointError, r"W_dec has shape \(16, 8\), the config's d_sae is 1000000000000"),
        ({"apply_b_dec_to_input": "false"}, CheckpointError, "apply_b_dec_to_input is 'false', expected true or false"),
        ({"metadata": 5}, CheckpointError, "metadata|no SAELens configuration"),
        ({"architecture": None}, CheckpointError, "has no 'architecture'"),
        ({"architecture": ["topk"]}, CheckpointError, "has no 'architecture'"),
    ],
)
def test_saelens_configs_are_read_to_the_letter(tmp_path, changes, error, message):
    folder = saelens(tmp_path)
    rewrite_config(folder, "cfg.json", **changes)
    with pytest.raises(error, match=message):
        load_sae_folder(folder)


@pytest.mark.parametrize("key", ["k", "architecture", "d_in"])
def test_a_missing_key_of_saelens_is_no_default(tmp_path, key):
    """SAELens would take k 100 and the standard architecture."""
    folder = saelens(tmp_path)
    config = json.loads((folder / "cfg.json").read_text())
    del config[key]
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"no '{key}'"):
        load_sae_folder(folder)


def test_a_folder_named_after_another_width_is_refused(tmp_path):
    folder = saelens(tmp_path).rename(tmp_path / "1-mlp-out-x8-k3")
    with pytest.raises(SAEMismatchError, match=r"16 features of 8 inputs.*not what its name says"):
        load_sae_folder(folder)


@torch.no_grad()
def test_a_normalisation_that_was_never_folded_is_applied_or_refused(tmp_path):
    """With the numbers that SAELens keeps beside the weights the SAE is that of the raw inputs; without, no SAE."""
    plain = load_sae_folder(saelens(tmp_path, dtype="float64"), device="cpu", dtype="float64")
    x = torch.randn(20, D, dtype=torch.float64)
    matrix, mean = torch.randn(D, D, dtype=torch.float64) + 3 * torch.eye(D), torch.randn(D, dtype=torch.float64)
    scaler = ActivationScaler(scaling_factor=2.5)
    whitening = ActivationScaler(whitening=ActivationWhitening(mean, matrix, matrix.inverse()))
    for kind, one in {"expected_average_only_in": scaler, "covariance_whitening": whitening}.items():
        folder = saelens(tmp_path / kind, dtype="float64")
        rewrite_config(folder, "cfg.json", normalize_activations=kind)
        with pytest.raises(SAEMismatchError, match=f"normalize_activations is '{kind}'.* never folded"):
            load_sae_folder(folder)
        one.save(str(folder / "activation_scaler.json"))
        sae = load_sae_folder(folder, device="cpu", dtype="float64")
        assert_close(sae.encode(x), plain.encode(one.scale(x)))
        assert_close(sae(x), one.unscale(plain(one.scale(x))))


def test_an_sae_that_the_dtype_has_no_room_for(tmp_path):
    folder = published(tmp_path)
    rewrite(folder, b_dec=torch.full((D,), 1e6))
    with pytest.raises(CheckpointError, match="b_dec holds 8 values that are NaN or infinite"):
        load_sae_folder(folder, dtype="float16")


def test_other_weights_beside_a_config_are_named(tmp_path):
    folder = saelens(tmp_path)
    (folder / "sae_weights.safetensors").rename(folder / "weights.pt")
    with pytest.raises(
        CheckpointError, match=r"cfg.json but no sae_weights.safetensors; it holds cfg.json, weights.pt"
    ):
        load_sae_folder(folder)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_point_and_layer_the_wrong_way_round():
    with pytest.raises(ArgumentError, match="Are point and layer swapped"):
        load_sae("ts-tiny", 0, "mlp-in")


@pytest.mark.parametrize("layer", ["[01]", "../", "1", "*", None, [0], 1.0, True, -1], ids=repr)
def test_only_a_whole_number_is_a_layer(scope, layer):
    with pytest.raises(ArgumentError, match=r"layer is .* a whole number from 0"):
        load_sae(scope, "mlp-in", layer)


@pytest.mark.parametrize("wrong", [{"k": "3"}, {"k": 0}, {"expansion": 1.5}, {"expansion": "*"}, {"tag": 5}], ids=str)
def test_what_is_asked_for_is_checked(scope, wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        load_sae(scope, "mlp-in", 1, **wrong)


@pytest.mark.parametrize(
    "source", [None, 5, b"ts-tiny", ["ts-tiny"], "", "a\0b", "x" * 300], ids=lambda s: repr(s)[:20]
)
def test_sources_that_are_none(source):
    for read in (list_saes, lambda source: load_sae(source, "mlp-in", 0), load_sae_folder):
        with pytest.raises(ArgumentError, match=r"^(source|folder) "):
            read(source)


def test_the_saes_of_a_source_come_by_layer():
    """Those of `load_sae`, one at each point, and only of layers that have them."""
    found = load_saes("ts-tiny")
    hooks = [hook for i in range(4) for hook in (f"blocks.{i}.ln2.hook_normalized", f"blocks.{i}.hook_mlp_out")]
    assert [sae.cfg.metadata.hook_name for sae in found] == hooks
    one = load_saes("ts-tiny", ["mlp-out"], [2], device="cpu")
    assert len(one) == 1
    assert torch.equal(one[0].W_dec, load_sae("ts-tiny", "mlp-out", 2, device="cpu").W_dec)


def test_which_saes_of_a_source_is_asked_as_of_one(scope):
    assert [sae.cfg.k for sae in load_saes(scope, ["mlp-in"], [1], k=5)] == [5]
    with pytest.raises(SAEMismatchError, match="Say which by"):
        load_saes(scope, ["mlp-in"])
    with pytest.raises(ModelNotFoundError, match="holds no SAE"):
        load_saes(scope, ["mlp-in"], [7])
    with pytest.raises(ModelNotFoundError, match="holds no SAE"):
        load_saes(scope, ["resid-pre"])
    with pytest.raises(ArgumentError, match=r"expected a list of them: \['mlp-in'\]"):
        load_saes(scope, "mlp-in")


def test_models_without_saes_say_so():
    with pytest.raises(ModelNotFoundError, match="say where they are"):
        sae_source("my-own")
