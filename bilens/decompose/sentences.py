"""What an explanation says in one sentence: words from numbers and names, and nothing else."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SECOND_FAMILY = 0.35  # of the largest family's part: a second one with less is not named
WEAK = 0.3  # of the projection: families that make less are one of many
ALMOST_ALL = 0.6  # of what the layer writes: circuits with less are not all there is to say
TAKES_OFF = 0.1  # of what the layer writes: a circuit that takes off less is not named
ERROR = 0.3  # of a projection: more than that is said to be the SAE's error
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Family:
    """Input features that share a name, and their part of a projection."""

    word: str
    features: tuple[int, ...]
    part: float

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.features[:3])) + (", …" if len(self.features) > 3 else "")
        return f"*{self.word}* ({numbers})" if self.word else f"feature{'s'[: len(self.features) - 1]} {numbers}"


@dataclass(frozen=True)
class Circuit:
    """What a sentence needs of one eigencircuit: what made its projection, and what it gives."""

    families: list[Family]
    contribution: float
    share: float
    projection: float
    error: float


def word(feature: int, name: str) -> str:
    """The first word of a feature's name, without the number: `1765 something/thing` is `something`."""
    bare = re.sub(rf"^{feature}\b\s*", "", name)
    return bare.split("/")[0].strip()


def families(members: Sequence[tuple[int, str, float]]) -> list[Family]:
    """Features `(i, name, part)` by their first word, by falling part; the nameless each for itself."""
    groups: dict[str, list[tuple[int, float]]] = {}
    for i, name, part in members:
        groups.setdefault(word(i, name).lower() or str(i), []).append((i, part))
    found = []
    for key, group in groups.items():
        group.sort(key=lambda member: -member[1])
        found.append(
            Family("" if key == str(group[0][0]) else key, tuple(i for i, _ in group), sum(p for _, p in group))
        )
    return sorted(found, key=lambda family: -family.part)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def tell(circuits: Sequence[Circuit], needed: int, active: bool, written: float) -> str:
    """The sentence: what makes the feature fire, how much of it one direction gives, and what stands against it.

    Args:
        circuits: by falling absolute contribution.
        needed: how many circuits give 80 % of what the layer writes.
        active: whether the feature fires.
        written: what the layer writes along the feature; the shares are of that.
    """
    pushing = [circuit for circuit in circuits if circuit.share > 0]
    if written <= 0 or not pushing:
        against = [circuit for circuit in circuits if circuit.contribution < 0]
        state = "Fires, although the layer writes against it" if active else "Does not fire"
        return f"{state}: {_made_of(against[0])} takes off {-against[0].contribution:.2g}." if against else f"{state}."
    verb, first, rest = "Fires because" if active else "Does not fire, although", pushing[0], pushing[1:2]
    two = sum(circuit.share for circuit in pushing[:2])
    if first.share >= ALMOST_ALL or not rest:
        sentence = f"{verb} {_reason(first)}: one direction gives {percent(first.share)}"
    elif two >= ALMOST_ALL:
        reasons = list(dict.fromkeys(map(_reason, pushing[:2])))
        sentence = f"{verb} {', and '.join(reasons)}: two directions give {percent(two)}"
    else:
        count = NUMBERS[needed] if needed < len(NUMBERS) else str(needed)
        sentence = (
            f"{verb} {_reason(first)}, in many directions: the first gives {percent(first.share)}, {count} give 80 %"
        )
    off = [circuit for circuit in circuits if circuit.share <= -TAKES_OFF]
    if off:
        sentence += f", although {_made_of(off[0])} takes off {percent(-off[0].share)}"
    if first.error > ERROR:
        sentence += "; much of that comes from what the SAE misses"
    return f"{sentence}."


def _leading(circuit: Circuit) -> list[Family]:
    """The family that makes a projection, or the two that do."""
    pushing = [family for family in circuit.families if family.part > 0][:2]
    return pushing[:1] if len(pushing) == 2 and pushing[1].part < SECOND_FAMILY * pushing[0].part else pushing


def _made_of(circuit: Circuit) -> str:
    named = _leading(circuit)
    if not named:
        return "no feature in particular"
    words = " with ".join(map(str, named))
    return words + " among many" * (sum(family.part for family in named) < WEAK * circuit.projection)


def _reason(circuit: Circuit) -> str:
    named = _made_of(circuit)
    return named.replace(" with ", " meets ") if len(_leading(circuit)) == 2 else f"of {named}"
