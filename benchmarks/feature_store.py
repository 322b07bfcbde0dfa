"""Throughput of the feature store's pass against a plain loop over batches and features, on the same texts in one run.

    OMP_NUM_THREADS=1 python benchmarks/feature_store.py TEXTS [N_TEXTS]

TEXTS is what `bilens.train.data.load_texts` takes. The loop finds less (frequency, mean, maximum and top contexts; no
random contexts, no tokens, no histogram, nothing on disk) and pads batches in the order of the texts, as one would
write it. Times are the process' own: what else the machine does is left out.
"""

import sys
import tempfile
from time import process_time

import torch

import bilens
from bilens.sae import FeatureStoreConfig, build_feature_store
from bilens.train.data import load_texts

N_TOP, BEFORE, AFTER = 12, 12, 6


@torch.no_grad()
def plain_loop(model, sae, texts, batch_size=16):
    """Frequency, mean, maximum and the strongest contexts of every feature, one feature at a time."""
    d_sae, hook = sae.cfg.d_sae, sae.cfg.metadata.hook_name
    fired, total, maximum, n_tokens = torch.zeros(d_sae), torch.zeros(d_sae), torch.zeros(d_sae), 0
    top = [[] for _ in range(d_sae)]
    for at in range(0, len(texts), batch_size):
        batch = texts[at : at + batch_size]
        tokens, mask = model.to_tokens(batch), model.attention_mask(batch)
        mask[:, 0] = 0
        _, cache = model.run_with_cache(tokens, names_filter=hook)
        acts = sae.encode(cache[hook]) * mask[..., None]
        n_tokens += int(mask.sum())
        fired += (acts != 0).sum((0, 1))
        total += acts.sum((0, 1))
        maximum = torch.maximum(maximum, acts.amax((0, 1)))
        for feature in range(d_sae):
            strongest, places = acts[:, :, feature].max(1)  # one per text
            for row in strongest.topk(min(N_TOP, len(batch))).indices.tolist():
                value, place = strongest[row].item(), int(places[row])
                if value > 0 and (len(top[feature]) < N_TOP or value > top[feature][-1][0]):
                    low = max(1, place - BEFORE)
                    window = slice(low, place + AFTER + 1)
                    found = (value, at + row, tokens[row, window].tolist(), acts[row, window, feature].tolist())
                    top[feature] = sorted([*top[feature], found], key=lambda entry: -entry[0])[:N_TOP]
    return fired / n_tokens, total / n_tokens, maximum, top, n_tokens


def main(texts_path: str, n_texts: int = 300) -> None:
    model = bilens.load_model()
    sae = bilens.load_sae(model.cfg.model_name, "mlp-out", 1)
    texts = load_texts(texts_path)[:n_texts]
    # The loop cuts longer texts off.
    texts = [text for text in texts if model.to_tokens(text, truncate=False).shape[1] <= model.cfg.n_ctx]
    model.run_with_cache(model.to_tokens(texts[:4]))  # what is only done once

    start = process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = FeatureStoreConfig(n_top=N_TOP, before=BEFORE, after=AFTER)
        store = build_feature_store(model, {"1-mlp-out": sae}, texts, folder, config=config)
        ours = process_time() - start
        frame, records = store.to_frame(), list(store["1-mlp-out"])
    start = process_time()
    frequency, _, _, top, n_tokens = plain_loop(model, sae, texts)
    plain = process_time() - start

    assert store.n_tokens == n_tokens
    # In other batches float32 sums come out in another order, and a top-k may let another feature through.
    assert (torch.tensor(frame.frequency.values) - frequency).abs().max() < 1e-4
    gaps = [
        abs(context.activation - entry[0])
        for record, entries in zip(records, top, strict=True)
        for context, entry in zip(record.top, entries, strict=False)
    ]
    print(f"{n_tokens} tokens, {sae.cfg.d_sae} features; strongest activations agree to {max(gaps):.0e}")
    print(f"feature store {n_tokens / ours:8.0f} tok/s")
    print(f"plain loop    {n_tokens / plain:8.0f} tok/s")
    print(f"ratio         {plain / ours:8.2f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
