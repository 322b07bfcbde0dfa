"""How exact attributions are: the completeness error over random (text, feature, position) triples.

    python benchmarks/completeness.py TEXTS [N]

TEXTS is what `bilens.train.data.load_texts` takes. Errors are relative to the sum of the absolute parts.
"""

import random
import sys

import torch

import bilens
from bilens.train.data import load_texts


def main(texts_path: str, n: int = 1000) -> None:
    model = bilens.load_model()
    texts = load_texts(texts_path)
    choose = random.Random(0)
    errors, active = [], 0
    for layer in range(model.cfg.n_layers):
        decomposer = bilens.Decomposer(
            model,
            layer,
            bilens.load_sae(model.cfg.model_name, "mlp-in", layer),
            bilens.load_sae(model.cfg.model_name, "mlp-out", layer),
        )
        d_sae = decomposer.output_view.d_sae
        for _ in range(n // model.cfg.n_layers):
            tokens = model.to_tokens(choose.choice(texts))
            result = decomposer.attribute(tokens, choose.randrange(d_sae), choose.randrange(tokens.shape[1]))
            errors.append(result.relative_error)
            active += result.active
    relative = torch.tensor(errors)
    print(f"{len(errors)} triples ({active} active): median {relative.median():.1e}, largest {relative.max():.1e}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
