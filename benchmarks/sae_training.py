"""Training SAEs: `bilens.train_saes` against SAELens' own `MultiSAETrainingRunner`.

    python benchmarks/sae_training.py [DATA]

The bundled model, the same texts (of DATA, or made up), the same hooks, SAE configurations and steps; interleaved, so
that a slow moment of the machine hits both; medians of `REPEATS` of whole runs, tokenization and saving left out.
"""

import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from sae_lens import LoggingConfig, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig, TopKTrainingSAEConfig

import bilens
from bilens.sae.train.activations import PackedRows
from bilens.sae.train.training import SAERun, SAETrainConfig, Target
from bilens.train.data import TokenizedTexts, load_texts, pack

REPEATS = 3
CONFIG = SAETrainConfig(tokens=32 * 1024, checkpoint_every=1_000_000)
HOOKS = ["blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"]


def main() -> None:
    warnings.simplefilter("ignore")
    model = bilens.load_model("ts-tiny")
    made_up = [f"Once there were {n} foxes who wanted to see the sea. " * 20 for n in range(400)]
    texts = load_texts(sys.argv[1])[:1000] if len(sys.argv) > 1 else made_up
    pieces = TokenizedTexts.from_texts(texts, model.tokenizer).pieces(model.cfg.n_ctx)
    seconds: dict[str, list[float]] = {"SAELens' runner": [], "bilens.train_saes": []}
    for _ in range(REPEATS):
        for name, run in zip(seconds, (saelens(model, pieces), ours(model, pieces)), strict=True):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{CONFIG.tokens / median:8.0f} tokens/s  {name} ({len(HOOKS)} SAEs, {torch.get_num_threads()} threads)")
    theirs, own = medians.values()
    print(f"ratio: {theirs / own:.2f}")


def ours(model, pieces):
    """A run of `train_saes`, from token pieces."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as out:
            targets = [Target.of(hook, CONFIG) for hook in HOOKS]
            SAERun(model, targets, PackedRows(pieces, model.cfg.n_ctx, 0), CONFIG, Path(out)).fit()

    return run


def saelens(model, pieces):
    """A run of SAELens' runner with the same SAEs, schedules and precision."""
    steps = CONFIG.n_steps
    rows = pack(pieces, model.cfg.n_ctx, 0)
    config = MultiSAETrainingRunnerConfig(
        saes={
            hook: TopKTrainingSAEConfig(
                d_in=model.cfg.d_model,
                d_sae=CONFIG.expansion * model.cfg.d_model,
                k=CONFIG.k,
                normalize_activations="expected_average_only_in",
            )
            for hook in HOOKS
        },
        hook_names={hook: hook for hook in HOOKS},
        model_name=model.cfg.model_name,
        model_class_name=type(model).__name__,
        dataset_path="",
        streaming=False,
        context_size=model.cfg.n_ctx,
        training_tokens=CONFIG.tokens,
        store_batch_size_prompts=16,
        n_batches_in_buffer=4,
        train_batch_size_tokens=CONFIG.batch_size,
        n_batches_for_norm_estimate=8,
        lr=CONFIG.lr,
        lr_end=CONFIG.lr,
        lr_warm_up_steps=max(1, steps // 50),
        lr_decay_steps=round(CONFIG.decay * steps),
        dead_feature_window=max(10, min(500, steps // 10)),
        feature_sampling_window=max(10, min(1000, steps // 2)),
        autocast=CONFIG.bf16,
        autocast_lm=CONFIG.bf16,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    data = Dataset.from_dict({"input_ids": rows.repeat(-(-2 * CONFIG.tokens // rows.numel()), 1).numpy()})
    return MultiSAETrainingRunner(config, override_dataset=data, override_model=model).run


if __name__ == "__main__":
    main()
