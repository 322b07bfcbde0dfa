"""What an explanation says in one sentence: words from numbers and names, and nothing else."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SECOND_FAMILY = 0.5  # of the largest family's part: a second one with less is not named
WEAK = 0.3  # of the projection: families that make less are one of many
ALMOST_ALL = 0.6  # of what the layer writes: circuits with less are not all there is to say
FEW = 8  # directions: where more are needed, there is no short reason
TAKES_OFF = 0.1  # of what the layer writes: a circuit that takes off less is not named
ERROR = 0.3  # of a projection: more than that is said to be the SAE's error
MEMBERS = 3  # features of a family that are named
READ = 0.1  # of a projection: positions that make less are not quoted
QUOTED = 4  # positions quoted at most
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DENSE = "dense"  # the family of features that fire nearly everywhere, and so mean little
NEAR = 4  # tokens before the one on which it fires: words that a feature needs are looked for there


@dataclass(frozen=True)
class Member:
    """An input feature in a sentence: its number, the words that it needs before it, and of a dense one its words."""

    feature: int
    part: float
    after: str = ""
    words: str = ""

    def __str__(self) -> str:
        return f"{self.feature}{f' {self.words}' * bool(self.words)}{f' after “{self.after}”' * bool(self.after)}"


@dataclass(frozen=True)
class Family:
    """Input features that share a name, and their part of a projection."""

    word: str
    members: tuple[Member, ...]

    @property
    def part(self) -> float:
        return sum(member.part for member in self.members)

    def __str__(self) -> str:
        return self.told()

    def told(self, whole: float | None = None) -> str:
        """The word and the numbers of the features, and their share of a whole projection if that is given."""
        numbers = ", ".join(map(str, self.members[:MEMBERS])) + ", …" * (len(self.members) > MEMBERS)
        share = "" if whole is None else f"; {percent(self.part / whole)}"
        if self.word == DENSE:
            return f"dense features ({numbers}{share})"
        return f"*{self.word}* ({numbers}{share})" if self.word else f"feature {numbers}{share.replace(';', ',')}"


@dataclass(frozen=True)
class Circuit:
    """What a sentence needs of one eigencircuit: what made its projection, and what it gives."""

    families: list[Family]
    contribution: float
    share: float
    projection: float
    error: float


def word(feature: int, name: str, token: str = "") -> tuple[str, str]:
    """The word of a feature's name, and the words that it needs before it.

    `1316 went/go/walk` is `went`, but `walk` on that token; `209 didn't → know` is `know` after `didn't`. The second is
    all the words of a dense one.

    Args:
        feature: its number, with which the name may begin.
        name: the name; a feature that fires nearly everywhere is marked `(dense)`.
        token: the token on which it fires here: the word is this one if the name has it.
    """
    bare = re.sub(rf"^{feature}\b\s*", "", name)
    if bare.endswith("(dense)"):
        return DENSE, bare.removesuffix("(dense)").strip()
    after, _, own = bare.rpartition(" → ")
    words = [one.strip() for one in own.split("/") if one.strip()]
    if token.strip().lower() in map(str.lower, words):
        return token.strip().lower(), after
    return (words[0].lower() if words else ""), after


def families(
    members: Sequence[tuple[int, str, float]], token: str = "", before: Sequence[str] | None = None
) -> list[Family]:
    """Features `(i, name, part)` of one word together, by falling part; the nameless each for itself.

    Args:
        members: the features.
        token: the token on which they fire here.
        before: the tokens before it: words that a feature needs are said if they are among the last few of these.
            `None` says them anyway.
    """
    near = None if before is None else {one.strip().lower() for one in before[-NEAR:]}
    groups: dict[str, list[Member]] = {}
    for i, name, part in sorted(members, key=lambda member: -member[2]):
        key, rest = word(i, name, token)
        dense = key == DENSE
        after = "" if dense else rest if near is None else _said(rest, near)
        groups.setdefault(key or str(i), []).append(Member(i, part, after, rest if dense else ""))
    found = [Family("" if key == str(group[0].feature) else key, tuple(group)) for key, group in groups.items()]
    return sorted(found, key=lambda family: -family.part)


def _said(after: str, near: set[str]) -> str:
    """The one of several alternatives, `said/mom`, whose words are all near; the whole of a name needs them all."""
    alternatives = after.replace("…", " ").split("/")
    return next((one.strip() for one in alternatives if one.strip() and set(one.lower().split()) <= near), "")


def quote(tokens: Sequence[str], shares: Sequence[float]) -> str:
    """The positions that make most of a projection, and the last, in the order of the text.

    Punctuation is quoted at the end alone; ... stands for what is left out.
    """
    last = len(shares) - 1
    large = [place for place in range(last) if shares[place] >= READ and re.search(r"\w", tokens[place])]
    places = sorted([*sorted(large, key=lambda place: -shares[place])[: QUOTED - 1], last])
    words: list[str] = []
    for before, place in zip([None, *places], places, strict=False):
        words += ["…"] * (before is not None and place > before + 1)
        words += [tokens[place].strip()]
    return " ".join(words).replace(" ##", "")


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def tell(circuits: Sequence[Circuit], needed: int, active: bool, written: float, read: str = "") -> str:
    """The sentence: what makes the feature fire, how much of it one direction gives, and what stands against it.

    Args:
        circuits: by falling absolute contribution.
        needed: how many circuits give 80 % of what the layer writes.
        active: whether the feature fires.
        written: what the layer writes along the feature; the shares are of that.
        read: the words of the text that the first circuit is read from.
    """
    pushing = [circuit for circuit in circuits if circuit.share > 0]
    if written <= 0 or not pushing:
        against = [circuit for circuit in circuits if circuit.contribution < 0]
        state = "Fires, although the layer writes against it" if active else "Does not fire"
        return f"{state}: {_made_of(against[0])} takes off {-against[0].contribution:.2g}." if against else f"{state}."
    first, both = pushing[0], pushing[:2]
    two = sum(circuit.share for circuit in both)
    count = NUMBERS[needed] if needed < len(NUMBERS) else str(needed)
    reason = _reason(first, read)
    if first.share >= ALMOST_ALL or len(both) < 2:
        given = f"one direction gives {percent(first.share)}"
    elif two >= ALMOST_ALL:
        given = f"two directions give {percent(two)}"
        if not (_words(both[1]) & _words(first) or _is_weak(both[1])):
            reason += f", and {_reason(both[1])}"
    elif needed > FEW or not _is_known(first, read):
        made = f"read from “{read}”, made of" if read else "made of"
        parts = f"the first of them {percent(first.share)}, {made} {_made_of(first)}"
        return f"{'Fires' if active else 'Does not fire'} for no short reason: {count} directions give 80 %, {parts}."
    else:
        given = f"{count} directions give 80 %, this one {percent(first.share)}"
    sentence = f"{'Fires' if active else 'Does not fire, but would'} {reason}: {given}"
    off = [circuit for circuit in circuits if circuit.share <= -TAKES_OFF]
    if off:
        known = not _is_weak(off[0]) and not _words(off[0]) & _words(first)
        by = f"{_made_of(off[0])} takes" if known else "other directions take"
        taken = sum(-circuit.share for circuit in (off[:1] if known else circuits) if circuit.share < 0)
        sentence += f", although {by} off {percent(taken)}"
    if first.error > ERROR:
        sentence += "; much of the first comes from what the SAE misses"
    return f"{sentence}."


def _leading(circuit: Circuit) -> list[Family]:
    """The family that makes a projection, or the two that do; dense features only where there are no others."""
    pushing = [family for family in circuit.families if family.part > 0]
    named = [family for family in pushing if family.word != DENSE] or pushing
    return named[:1] if len(named) > 1 and named[1].part < SECOND_FAMILY * named[0].part else named[:2]


def _words(circuit: Circuit) -> set[str]:
    return {family.word for family in _leading(circuit)}


def _is_weak(circuit: Circuit) -> bool:
    """Whether the leading families make so little of a projection that they are one of many."""
    return sum(family.part for family in _leading(circuit)) < WEAK * circuit.projection


def _made_of(circuit: Circuit, joined: str = " with ") -> str:
    """The leading families; with shares where they make little, and with dense features where those make more."""
    named = _leading(circuit)
    if not named:
        return "no feature in particular"
    dense = [family for family in circuit.families if family.word == DENSE and family not in named]
    dense = [family for family in dense if family.part > named[0].part]
    weak = sum(family.part for family in named + dense) < WEAK * circuit.projection
    whole = circuit.projection if weak or dense else None
    told = joined.join(family.told(whole) for family in named)
    return told + "".join(f" and {family.told(whole)}" for family in dense) + " among many" * weak


def _is_known(circuit: Circuit, read: str) -> bool:
    """Whether the leading families say why a circuit is large: they make much of it, or have the name of the token."""
    return not _is_weak(circuit) or bool(_words(circuit) & set(read.lower().split()[-1:]))


def _reason(circuit: Circuit, read: str = "") -> str:
    """Why a circuit is large: one family, two that meet, or many features; and the words that it is read from."""
    if read and not _is_known(circuit, read):
        return f"because of “{read}”, read by many features"
    of = "of " * (len(_leading(circuit)) < 2)
    return f"because {of}{_made_of(circuit, ' meets ')}" + f", read from “{read}”" * bool(read)
