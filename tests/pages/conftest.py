"""Results of hostile names, for the pages that show them."""

import pandas as pd
import pytest
import torch

from bilens.decompose.gallery import GalleryEntry, MotifGallery
from bilens.decompose.motifs import MOTIFS
from bilens.sae.features.examples import Example


@pytest.fixture
def gallery(hostile) -> MotifGallery:
    n = len(hostile)
    example = Example(hostile, torch.linspace(-1, 1, n).tolist(), n // 2)
    entries = [
        GalleryEntry(
            layer=1,
            kind=kind,
            output=5,
            i=1,
            j=2,
            output_name=f"5 {hostile[place]}",
            i_name=f"1 {hostile[place + 1]}",
            j_name=f"2 {hostile[place + 2]}",
            table=(0.1, 0.2, 2.0),
            measured=(-1.0, -0.5, -0.5, 3.0),
            fires=(0.0, 0.1, 0.1, 0.9),
            counts=(100, 40, 40, 30),
            typical=4.0,
            strength=0.5,
            part=1.5,
            whole=3.0,
            x=torch.tensor([0.0, 1.0, 2.0, 3.0]),
            y=torch.tensor([-1.0, 1.0, 0.0, 2.0]),
            z=torch.tensor([-1.0, 0.0, 1.0, 2.0]),
            case=torch.tensor([0, 1, 2, 3]),
            examples=(example,),
            wholes=(2.5,),
            promoted=(hostile[0],),
            alike=tuple((f"6 {token}", "1", "2") for token in hostile[:12]),
        )
        for place, kind in enumerate(MOTIFS[:3])
    ]
    counts = pd.DataFrame(
        [{"layer": 1, "kind": kind, "in_weights": 900, "measured": 40, "held": 9, "families": 7} for kind in MOTIFS]
    )
    return MotifGallery(entries, counts, 210)
