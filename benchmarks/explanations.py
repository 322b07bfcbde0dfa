"""How many parts explain a feature where it fires: eigencircuits against pairs, over random firings.

    python benchmarks/explanations.py TEXTS [N]

TEXTS is what `bilens.train.data.load_texts` takes, and should be held out: eigencircuits are fitted on the texts that
come with the bundled model. What is needed for 80 % is what `Explanation.needed` counts.
"""

import random
import sys
from statistics import median

import bilens
from bilens.train.data import load_texts

FIRINGS_PER_TEXT = 3
ROW = "{:8} eigenpairs {:4}  where it fires {:4}  pairs {:5}   largest alone {:4.0%} and {:4.0%}"


def main(texts_path: str, n: int = 500) -> None:
    model, texts, choose = bilens.load_model(), load_texts(texts_path), random.Random(0)
    found = []
    for layer in range(model.cfg.n_layers):
        d = bilens.Decomposer.from_pretrained(model, layer)
        fit, rows = d.firing(), []
        while len(rows) < n // model.cfg.n_layers:
            tokens = model.to_tokens(choose.choice(texts), truncate=True)
            activations = d.output_view.activations(d.run(tokens)[1][0])
            activations[0] = 0
            for position, feature in choose.sample(activations.gt(0).nonzero().tolist(), FIRINGS_PER_TEXT):
                text = tokens[0, : position + 1]
                plain = d.attribute(text, feature, position)
                fitted = d.attribute(text, feature, position, fit=fit).explanation
                told = plain.explanation
                needed = (told.needed(), fitted.needed(), plain.pairs_needed())
                rows.append((*needed, told.shares[0].item(), fitted.shares[0].item()))
        rows = rows[: n // model.cfg.n_layers]
        found += rows
        print(ROW.format(f"layer {layer}", *map(median, zip(*rows, strict=True))), flush=True)
    print(ROW.format("all", *map(median, zip(*found, strict=True))))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
