"""How many features two squares follow where they fire, by how the squares are found: the test of the paper's figure 9.

    python benchmarks/fidelity.py TEXTS [--first 150] [--fit TEXTS] [--features 400]

`TEXTS` is what `bilens.train.data.load_texts` takes, of texts that the SAEs were not trained on. The squares are found
on the bundled stories, or on those of `--fit`, and measured on the first of the others. Of every layer of the bundled
model some of the features that fire on at least 20 tokens are drawn at random.
"""

import argparse

import torch

import bilens
from bilens.decompose import Decomposer
from bilens.train.data import load_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts")
    parser.add_argument("--first", type=int, default=150)
    parser.add_argument("--fit")
    parser.add_argument("--features", type=int, default=400)
    options = parser.parse_args()
    texts = load_texts(options.texts)[: options.first]
    model = bilens.load_model()
    for layer in range(model.cfg.n_layers):
        d = Decomposer(model, layer, output_sae=bilens.load_sae("ts-tiny", "mlp-out", layer))
        measured, fit = d.firing(texts), d.firing(None if options.fit is None else load_texts(options.fit))
        often = (measured.n_active >= 20).nonzero().flatten()
        order = torch.randperm(len(often), generator=torch.Generator().manual_seed(11))
        found = d.fidelity(measured, often[order[: options.features]], 2, fit=fit)
        print(f"layer {layer}\n{found.to_frame().round(3).to_string(index=False)}", flush=True)


if __name__ == "__main__":
    main()
