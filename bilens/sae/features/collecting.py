"""The pass of a feature store: the model over a corpus, statistics out, stopped and resumed at any moment.

    1. each process takes its groups of texts (`bilens.sae.features.corpus`), runs the model to the last hook needed,
       encodes with every SAE, and keeps where features fire
    2. a group's firings go into the process' statistics all at once, never half of them
    3. every so often, and on Ctrl-C, a process writes its statistics and how far it is to a file of its own
    4. a start finds such files: process 0 merges them into `base.safetensors`, which knows every group done so far; all
       go on with what is left, with empty statistics; so a pass may be resumed by another number of processes
    5. at the end process 0 merges base and files: the statistics of the corpus, whatever happened on the way

A file belongs to the base of its generation; those of an older one, which a kill between writing the base and deleting
them leaves behind, are already in the base and are ignored. Processes share the folder.
"""

import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core import parallel
from bilens._core.files import open_tensors, parse_json, write_atomically
from bilens.errors import SAEMismatchError
from bilens.model.attached import encode, splice_hooks
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.features.corpus import Batch, Corpus, batches
from bilens.sae.features.examples import stop_after
from bilens.sae.features.statistics import LARGEST, Array, FeatureStatistics, Firings, Places

BASE_FILE = "base.safetensors"
ENCODED_AT_ONCE = 2**25  # activations of one SAE in memory, 128 MB


@dataclass
class PassState:
    """Statistics of every SAE over some groups of texts."""

    vocabulary: Array  # how often each token occurs where features are looked at
    saes: dict[str, FeatureStatistics]
    n_texts: int = 0

    @property
    def n_tokens(self) -> int:
        return int(self.vocabulary.sum())

    def merge(self, other: "PassState") -> None:
        """Add the statistics of other groups."""
        self.vocabulary += other.vocabulary
        self.n_texts += other.n_texts
        for name, statistics in self.saes.items():
            statistics.merge(other.saes[name])

    def arrays(self) -> dict[str, Array]:
        """Everything by name; views, not copies."""
        parts = {f"{i}.{key}": a for i, s in enumerate(self.saes.values()) for key, a in s.arrays().items()}
        return {"vocabulary": self.vocabulary} | parts

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write it, whole or not at all."""
        metadata = {"facts": json.dumps(dict(facts) | {"n_texts": self.n_texts})}
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays().items()}
        write_atomically(path, lambda beside: save_file(arrays, beside, metadata=metadata))

    def load(self, path: Path) -> None:
        """Take over what `save` wrote."""
        with open_tensors(path, "np", "Delete the folder and build the store again.") as file:
            self.vocabulary[...] = file.get_tensor("vocabulary")
            for i, statistics in enumerate(self.saes.values()):
                statistics.load(lambda name, i=i: file.get_tensor(f"{i}.{name}"))  # type: ignore[misc]
        self.n_texts = read_facts(path)["n_texts"]


@dataclass
class Done:
    """Groups that are in the base: all below `below`, and the `ahead` ones."""

    generation: int = 0
    below: int = 0
    ahead: set[int] = field(default_factory=set)

    def __contains__(self, group: int) -> bool:
        return group < self.below or group in self.ahead

    def add(self, rank: int, world: int, next_group: int) -> None:
        """The groups of one process before `next_group`."""
        first = self.below + (rank - self.below) % world
        self.ahead.update(range(first, next_group, world))
        while self.below in self.ahead:
            self.ahead.remove(self.below)
            self.below += 1


class FeaturePass:
    """One pass over a corpus.

    Args:
        model: the model.
        saes: the SAEs by name.
        corpus: the texts.
        new_state: gives empty statistics.
        folder: the folder of the checkpoints, which exists.
        batch_texts, batch_tokens: texts in a group, tokens in a forward pass.
        checkpoint_seconds: between checkpoints.
    """

    def __init__(
        self,
        model: HookedBilinearTransformer,
        saes: Mapping[str, Any],
        corpus: Corpus,
        new_state: Any,
        folder: Path,
        *,
        batch_texts: int,
        batch_tokens: int,
        checkpoint_seconds: float,
    ):
        self.model, self.saes, self.corpus, self.new_state, self.folder = model, saes, corpus, new_state, folder
        self.batch_texts, self.batch_tokens = batch_texts, batch_tokens
        self.checkpoint_seconds = checkpoint_seconds
        self.hooks = {name: splice_hooks(model, sae, f"the SAE {name!r}")[0] for name, sae in saes.items()}
        self.stop = stop_after(list(self.hooks.values()))
        self.state: PassState = new_state()
        self.done = Done()
        self.next_group = 0

    def run(self) -> PassState:
        """Do what is left; the statistics of the whole corpus, in process 0 (those of a part in the others)."""
        if parallel.is_main():
            self._consolidate()
        parallel.barrier()
        self.done = self._read_base()
        self._run_groups()
        if not parallel.is_main():
            self.save()
        parallel.barrier()
        if parallel.is_main():
            self._merge_others()
        return self.state

    def _run_groups(self) -> None:
        world, rank = parallel.world_size(), parallel.rank()
        among = f" (process 0 of {world})" if world > 1 else ""
        bar = tqdm(desc=f"looking at features{among}", unit="tok", unit_scale=True, disable=rank > 0, mininterval=0.5)
        saved = monotonic()
        self.next_group = self.done.below
        try:
            for group, texts in self.corpus.groups(self.batch_texts, self.done.below):
                if group % world == rank and group not in self.done:
                    found = [self._forward(batch) for batch in self._batches(group, texts)]
                    with _uninterrupted():
                        for places, firings in found:
                            self._add(places, firings)
                        self.state.n_texts += len(texts)
                        self.next_group = group + 1
                    bar.update(sum(len(places.ids) for places, _ in found))
                    of = f"/{self.corpus.n_texts}" if self.corpus.n_texts else ""
                    bar.set_postfix_str(f"text {group * self.batch_texts + len(texts)}{of}", refresh=False)
                    if monotonic() - saved >= self.checkpoint_seconds:
                        self.save()
                        saved = monotonic()
        except KeyboardInterrupt:
            self.save()
            bar.write(f"interrupted after {self.state.n_tokens} tokens of this run; run the same again to go on.")
            raise
        finally:
            bar.close()

    def _batches(self, group: int, texts: list[str]) -> Iterator[Batch]:
        first = group * self.batch_texts
        model = self.model
        return batches(texts, first, model._require_tokenizer(), model.cfg.n_ctx, self.batch_tokens, bool(model.n_bos))

    @torch.no_grad()
    def _forward(self, batch: Batch) -> tuple[Places, dict[str, Firings]]:
        """Where features fire in one batch."""
        names = sorted(set(self.hooks.values()))
        _, cache = self.model.run_with_cache(
            batch.tokens.to(self.model.cfg.device),
            names_filter=names,
            stop_at_layer=self.stop,
            return_cache_object=False,
        )
        mask = batch.mask.to(self.model.cfg.device)
        at = {hook: cache[hook][mask] for hook in names}
        return batch.places, {name: self._firings(name, at[hook], batch.places) for name, hook in self.hooks.items()}

    def _firings(self, name: str, x: Tensor, places: Places) -> Firings:
        sae = self.saes[name]
        parts: list[tuple[Tensor, ...]] = []
        size = max(1, ENCODED_AT_ONCE // sae.cfg.d_sae)
        for start in range(0, len(x), size):
            acts = encode(sae, x[None, start : start + size])[0].float()
            at, fires = acts.nonzero(as_tuple=True)
            parts.append((at.cpu() + start, fires.cpu(), acts[at, fires].cpu()))
        place, feature, value = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        # Written so that NaN fails it.
        bad = np.flatnonzero(~(np.abs(value) < LARGEST))
        if len(bad):
            where = place[bad[0]]
            raise SAEMismatchError(
                f"feature {feature[bad[0]]} of the SAE {name!r} is {value[bad[0]]} at text {places.text[where]}, "
                f"position {places.position[where]}; expected a finite activation below {LARGEST:.0e}."
            )
        return Firings(place, feature, value)

    def _add(self, places: Places, firings: Mapping[str, Firings]) -> None:
        self.state.vocabulary += np.bincount(places.ids, minlength=len(self.state.vocabulary))
        for name, found in firings.items():
            self.state.saes[name].add(found, places)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write this process' statistics and how far it is."""
        facts = {
            "generation": self.done.generation,
            "rank": parallel.rank(),
            "world": parallel.world_size(),
            "next_group": self.next_group,
        }
        self.state.save(self.folder / f"process-{parallel.rank()}.safetensors", facts)

    def _files(self, generation: int) -> list[Path]:
        """The processes' files that are not in the base yet."""
        files = sorted(self.folder.glob("process-*.safetensors"))
        return [path for path in files if read_facts(path)["generation"] == generation]

    def _read_base(self) -> Done:
        path = self.folder / BASE_FILE
        if not path.exists():
            return Done()
        facts = read_facts(path)
        return Done(facts["generation"], facts["below"], set(facts["ahead"]))

    def _consolidate(self) -> None:
        """Put what an earlier run left into the base."""
        done = self._read_base()
        files = self._files(done.generation)
        if files:
            merged: PassState = self.new_state()
            if (self.folder / BASE_FILE).exists():
                merged.load(self.folder / BASE_FILE)
            for path in files:
                self._merge_file(merged, path)
                facts = read_facts(path)
                done.add(facts["rank"], facts["world"], facts["next_group"])
            facts = {"generation": done.generation + 1, "below": done.below, "ahead": sorted(done.ahead)}
            merged.save(self.folder / BASE_FILE, facts)
        for path in self.folder.glob("process-*.safetensors"):
            path.unlink()

    def _merge_others(self) -> None:
        """Add the base and the other processes' files to this process' statistics."""
        own = self.folder / "process-0.safetensors"
        others = [path for path in self._files(self.done.generation) if path != own]
        base = [self.folder / BASE_FILE] if (self.folder / BASE_FILE).exists() else []
        for path in base + others:
            self._merge_file(self.state, path)

    def _merge_file(self, into: PassState, path: Path) -> None:
        part: PassState = self.new_state()
        part.load(path)
        into.merge(part)


def read_facts(path: Path) -> dict[str, Any]:
    """What a state's file says about itself."""
    remedy = "Delete the folder and build the store again."
    with open_tensors(path, "np", remedy) as file:
        return parse_json((file.metadata() or {}).get("facts", ""), f"'facts' of {path}", dict, remedy)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is over (signals reach the main thread alone)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
