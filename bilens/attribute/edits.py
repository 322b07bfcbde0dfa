"""What a reader changed on a graph's page, as the page keeps it in its address: nodes pinned, renamed and grouped.

    #graph?n=20&pins=["3-mlp-out/101@15"]&names={"3-mlp-out/101@15":"how"}&groups=[["negation","0-mlp-in/1807@14",...]]

each value as JSON, percent-encoded. A group is its label and the ids of its nodes.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from bilens._core.files import parse_json
from bilens.attribute.circuit_tables import CircuitTables
from bilens.errors import ArgumentError, CheckpointError, nearest

MARK = "#graph?"


@dataclass(frozen=True)
class Edits:
    """Ids of nodes: those pinned, new names by id, and groups with their label first, `None` as they were."""

    pinned: list[str]
    names: dict[str, str]
    supernodes: list[list[str]] | None


def read_edits(address: str, circuit: CircuitTables) -> Edits:
    """The edits in a page's address, or in the part of it from `#graph?` on.

    Raises:
        ArgumentError: another text, or edits of nodes that the circuit has not.
    """
    if not isinstance(address, str) or MARK not in address:
        raise ArgumentError(
            f"{address!r:.80} holds no edits of a graph: they are what the page's address has from {MARK!r} on."
        )
    given = parse_qs(address.split(MARK, 1)[1])

    def read(key: str, kind: type) -> Any:
        try:
            return parse_json(given[key][0], f"{key} of this address", kind) if key in given else kind()
        except CheckpointError as error:
            raise ArgumentError(str(error)) from error

    pins, names, groups = read("pins", list), read("names", dict), read("groups", list)
    known = set(circuit.nodes.id)
    if not all(isinstance(group, list) and group for group in groups):
        raise ArgumentError("groups of this address holds something else than lists of a label and ids.")
    for name in [*pins, *names, *(name for group in groups for name in group[1:])]:
        if not isinstance(name, str) or name not in known:
            raise ArgumentError(
                f"the address names the node {name!r}, which is not in this circuit." + nearest(name, known)
            )
    supernodes = [[str(label), *ids] for label, *ids in groups] if "groups" in given else None
    return Edits(pins, {name: str(text) for name, text in names.items()}, supernodes)
