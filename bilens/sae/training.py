"""Training SAEs with SAELens: several hooks from one pass over the model.

    1. texts -> packed contexts (as for the language model: each starts with [BOS])
    2. SAELens' `MultiSAETrainingRunner` runs the model once per batch and trains one top-k SAE per hook
    3. decoder norms are folded, the SAEs are stored in SAELens' format, in half precision

SAELens does the training; here is what it is given and what becomes of its result.
"""

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TopKTrainingSAEConfig, TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from safetensors.torch import save_file
from torch import Tensor

from bilens.data import TokenizedTexts, load_texts, pack
from bilens.files import write_atomically
from bilens.model import HookedBilinearTransformer
from bilens.sae.loading import folder_name, hook_of, load_sae_folder, point_of


@dataclass(frozen=True)
class SAETrainConfig:
    """Everything that decides a run, the model and data apart.

    Args:
        expansion: features per dimension: `d_sae = expansion * d_model`.
        k: active features per token.
        tokens: training tokens, the same for every hook.
        batch_size: tokens per step.
        lr: peak learning rate of Adam, warmed up over the first 2 % and decayed linearly over the last `decay`.
        decay: share of the steps.
        bf16: autocast to bfloat16.
        seed: of weights, order and mixing.
    """

    expansion: int = 8
    k: int = 32
    tokens: int = 4_000_000
    batch_size: int = 1024
    lr: float = 1e-3
    decay: float = 0.5
    bf16: bool = True
    seed: int = 0


def train_saes(
    model: HookedBilinearTransformer,
    data: str | os.PathLike[str] | Sequence[str],
    out: str | os.PathLike[str],
    config: SAETrainConfig | None = None,
    *,
    hooks: Sequence[str] | None = None,
    column: str = "text",
) -> dict[str, SAE[Any]]:
    """Train top-k SAEs and write each to `out/{layer}-{point}-x{expansion}-k{k}` in SAELens' format, half precision.

    The configuration goes into each SAE's `cfg.metadata.training`.

    Args:
        model: whose activations.
        data: texts, or where to load them (see `bilens.data.load_texts`).
        out: the folder of the SAE folders.
        config: `None` takes the defaults.
        hooks: names such as `blocks.1.ln2.hook_normalized`; `None` takes the input and output of every MLP.
        column: the field that holds the text.

    Returns:
        The SAEs by folder name, as `load_sae` gives them.

    Raises:
        HookNameError: the model has no such hook.
        SAEMismatchError: a hook with no published point name, hence no folder name.
    """
    from datasets import Dataset
    from sae_lens import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig

    config, out = config or SAETrainConfig(), Path(out)
    if hooks is None:
        layers = range(model.cfg.n_layers)
        hooks = [hook_of(point, layer) for layer in layers for point in ("mlp-in", "mlp-out")]
    names = {}
    for hook in hooks:
        model.check_hook_name(hook)
        point, layer = point_of(hook)
        names[folder_name(point, layer, config.expansion, config.k)] = hook

    texts = load_texts(data, column=column) if isinstance(data, str | os.PathLike) else list(data)
    n_ctx = model.cfg.n_ctx
    pieces = TokenizedTexts.from_texts(texts, model.tokenizer).pieces(n_ctx)
    # SAELens starts the data over by itself; epochs of different orders mix better than repeats of one.
    n_rows = -(-config.tokens // n_ctx)
    rows: list[Tensor] = []
    while sum(len(part) for part in rows) < n_rows:
        rows.append(pack(pieces, n_ctx, config.seed * 1_000_003 + len(rows)))
    dataset = Dataset.from_dict({"input_ids": torch.cat(rows)[:n_rows].numpy()})

    torch.manual_seed(config.seed)
    steps = config.tokens // config.batch_size
    runner_config = MultiSAETrainingRunnerConfig(
        saes={
            name: TopKTrainingSAEConfig(
                d_in=model.cfg.d_model,
                d_sae=config.expansion * model.cfg.d_model,
                k=config.k,
                # Adam's steps do not scale with the activations: bring every hook to the same size (folded afterwards).
                normalize_activations="expected_average_only_in",
                device=model.cfg.device or "cpu",
            )
            for name in names
        },
        hook_names=names,
        model_name=model.cfg.model_name,
        model_class_name=type(model).__name__,
        dataset_path=data.__fspath__() if isinstance(data, os.PathLike) else data if isinstance(data, str) else "",
        streaming=False,
        context_size=n_ctx,
        training_tokens=config.tokens,
        store_batch_size_prompts=16,
        n_batches_in_buffer=16,
        train_batch_size_tokens=config.batch_size,
        n_batches_for_norm_estimate=10,
        prepend_bos=True,
        lr=config.lr,
        lr_warm_up_steps=max(1, steps // 50),
        lr_decay_steps=round(config.decay * steps),
        lr_end=0.0,
        dead_feature_window=max(10, min(500, steps // 10)),
        feature_sampling_window=max(10, min(1000, steps // 2)),
        autocast=config.bf16,
        autocast_lm=config.bf16,
        device=model.cfg.device or "cpu",
        seed=config.seed,
        checkpoint_path=None,
        output_path=None,
        logger=_silent_logger(),
    )
    runner = MultiSAETrainingRunner(runner_config, override_dataset=dataset, override_model=model)
    trained = runner.run()
    out.mkdir(parents=True, exist_ok=True)
    for name, sae in trained.items():
        sae.cfg.metadata.training = asdict(config)
        save_half(sae, out / name)
    return {name: load_sae_folder(out / name) for name in names}


def save_half(sae: Any, folder: Path) -> None:
    """An SAE as an inference SAE in SAELens' format, in float16; the decoder norms of a trained one are folded."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().float().clone() for name, tensor in sae.state_dict().items()}
    if isinstance(sae, TrainingSAE):
        sae.process_state_dict_for_saving_inference(state)
        cfg = sae.cfg.get_inference_sae_cfg_dict()
        if "rescale_acts_by_decoder_norm" in cfg:
            cfg["rescale_acts_by_decoder_norm"] = False
    else:
        sae.process_state_dict_for_saving(state)
        cfg = sae.cfg.to_dict()
    cfg |= {"dtype": "float16", "device": "cpu"}
    tensors = {name: tensor.half().contiguous() for name, tensor in state.items()}
    write_atomically(folder / SAE_WEIGHTS_FILENAME, lambda path: save_file(tensors, path))
    write_atomically(folder / SAE_CFG_FILENAME, lambda path: path.write_text(json.dumps(cfg, indent=1, default=str)))


def _silent_logger() -> Any:
    from sae_lens import LoggingConfig

    warnings.filterwarnings("ignore", message=".*reproducible from configuration.*")
    return LoggingConfig(log_to_wandb=False)
