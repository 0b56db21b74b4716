"""Tags of words: entities that are written as one tag a word, in the schemes IOB1, IOB2 and BIOES.

A tag is "O" outside of entities, or a prefix and the type of the entity, such as "B-PER". The prefixes mean begin,
inside, end and single (Ramshaw and Marcus 1995; Tjong Kim Sang and Veenstra 1999).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

OUTSIDE = "O"
SchemeName = Literal["iob2", "iob1", "bioes"]


class Entity(NamedTuple):
    """An entity: its type, its first word, and the word after its last one."""

    label: str
    start: int
    stop: int


def split_tag(tag: str) -> tuple[str, str]:
    """Return the prefix and the type of a tag; the type of "O" is empty."""
    prefix, _, label = tag.partition("-")
    return prefix, label


def find_entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of the tags of a text, in any of the schemes, as conlleval reads them.

    Tags that no scheme allows have a meaning, too: an entity begins where a tag continues nothing, and ends where its
    type does. Valid tags of all three schemes give the entities that they mean.
    """
    found: list[Entity] = []
    last, begin = (OUTSIDE, ""), 0
    for i, tag in enumerate([*map(split_tag, tags), (OUTSIDE, "")]):
        goes_on = tag[0] in ("I", "E") and last[0] in ("B", "I") and tag[1] == last[1]
        if not goes_on:
            if last[0] != OUTSIDE:
                found.append(Entity(last[1], begin, i))
            begin = i
        last = tag
    return found


# Pairs of prefixes of neighboring words -> the condition on their types.
_Pairs = Mapping[str, Literal["any", "same", "different"]]


@dataclass(frozen=True)
class Scheme:
    """A way to write entities as tags.

    Attributes:
        name: its name.
        prefixes: its prefixes, in the order in which `tags` writes them.
        write_one: function of an entity, and of the one before it or None, that returns the prefixes of its words.
        begins: neighbors of which the second begins an entity; a blank is any prefix.
        goes_on: neighbors of which the second continues the entity of the first.
        ends: neighbors between which an entity ends.
    """

    name: SchemeName
    prefixes: str
    write_one: Callable[[Entity, Entity | None], str]
    begins: _Pairs
    goes_on: _Pairs
    ends: _Pairs

    def tags(self, labels: Iterable[str]) -> tuple[str, ...]:
        """Return all tags for some types of entities, "O" first."""
        return OUTSIDE, *(f"{prefix}-{label}" for label in labels for prefix in self.prefixes)

    def write(self, entities: Iterable[Entity], number: int) -> list[str]:
        """Return the tags of a text of `number` words for entities that are in order and do not overlap."""
        tags = [OUTSIDE] * number
        last = None
        for entity in entities:
            for i, prefix in enumerate(self.write_one(entity, last), entity.start):
                tags[i] = f"{prefix}-{entity.label}"
            last = entity
        return tags

    def find_strict(self, tags: Sequence[str]) -> list[Entity]:
        """Return the entities that are written as the scheme allows, as seqeval's strict mode reads them."""
        pairs = [*map(split_tag, tags), (OUTSIDE, "")]
        found: list[Entity] = []
        at, before = 0, (OUTSIDE, "")
        while at < len(tags):
            start, at = at, at + 1
            if _holds(self.begins, before, pairs[start]):
                while _holds(self.goes_on, pairs[at - 1], pairs[at]):
                    at += 1
                if _holds(self.ends, pairs[at - 1], pairs[at]):
                    found.append(Entity(pairs[start][1], start, at))
            before = pairs[at - 1]
        return found


def _holds(rules: _Pairs, one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Return whether rules hold for two neighboring tags."""
    same = one[1] == other[1]
    for pair in (one[0] + other[0], f" {other[0]}", f"{one[0]} "):
        if pair in rules:
            return {"any": True, "same": same, "different": not same}[rules[pair]]
    return False


def _iob1(entity: Entity, last: Entity | None) -> str:
    """Return prefixes of which the first is "B" only where another entity of the same type ends before it."""
    touches = last is not None and last.stop == entity.start and last.label == entity.label
    return "I" * (entity.stop - entity.start) if not touches else _iob2(entity, last)


def _iob2(entity: Entity, last: Entity | None) -> str:
    return "B" + "I" * (entity.stop - entity.start - 1)


def _bioes(entity: Entity, last: Entity | None) -> str:
    size = entity.stop - entity.start
    return "S" if size == 1 else "B" + "I" * (size - 2) + "E"


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "iob2", "BI", _iob2,
            begins={" B": "any"},
            goes_on={"BI": "same", "II": "same"},
            ends={"IO": "any", "II": "different", "IB": "any", "BO": "any", "BI": "different", "BB": "any"},
        ),
        Scheme(
            "iob1", "BI", _iob1,
            begins={"OI": "any", "II": "different", "BI": "any", "IB": "same", "BB": "same"},
            goes_on={"BI": "same", "II": "same"},
            ends={"II": "different", "IO": "any", "IB": "any", "BO": "any", "BI": "different", "BB": "same"},
        ),
        Scheme(
            "bioes", "BIES", _bioes,
            begins={" B": "any", " S": "any"},
            goes_on={"BI": "same", "BE": "same", "II": "same", "IE": "same"},
            ends={"S ": "any", "E ": "any"},
        ),
    )
}  # fmt: skip
