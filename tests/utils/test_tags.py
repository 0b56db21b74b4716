"""Tags of words against seqeval, on random sequences of which most are not valid."""

import random

import pytest
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB1, IOB2, IOBES, Tokens

from dualenc.utils.tags import SCHEMES, Entity, find_entities

PEERS = {"iob1": IOB1, "iob2": IOB2, "bioes": IOBES}


def draw(scheme: str, longest: int = 9) -> list[str]:
    return random.choices(SCHEMES[scheme].tags(["PER", "creative-work"]), k=random.randint(1, longest))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_entities_equal_seqeval(scheme: str, seed: int) -> None:
    differing = 0
    for _ in range(3000):
        tags = draw(scheme)
        assert [(one.label, one.start, one.stop - 1) for one in find_entities(tags)] == get_entities(tags), tags
        strict = [(one.tag, one.start, one.end) for one in Tokens(tags, PEERS[scheme]).entities]
        assert [tuple(one) for one in SCHEMES[scheme].find_strict(tags)] == strict, tags
        differing += len(strict) < len(find_entities(tags))
    assert differing > 100  # invalid tags, of which the strict reading finds fewer entities


@pytest.mark.parametrize("scheme", SCHEMES)
def test_written_entities_are_valid_and_come_back(scheme: str, seed: int) -> None:
    """Check conversion: whatever tags say, in any scheme, is the same in each scheme, and valid there."""
    for _ in range(1000):
        tags = draw(random.choice(list(SCHEMES)))
        entities = find_entities(tags)
        written = SCHEMES[scheme].write(entities, len(tags))
        assert find_entities(written) == SCHEMES[scheme].find_strict(written) == entities
        again = SCHEMES["bioes"].write(find_entities(written), len(tags))
        assert SCHEMES[scheme].write(find_entities(again), len(tags)) == written


def test_iob1_and_iob2_by_hand() -> None:
    entities = [Entity("X", 0, 2), Entity("X", 2, 3), Entity("Y", 4, 5)]
    assert SCHEMES["iob1"].write(entities, 5) == ["I-X", "I-X", "B-X", "O", "I-Y"]
    assert SCHEMES["iob2"].write(entities, 5) == ["B-X", "I-X", "B-X", "O", "B-Y"]
    assert SCHEMES["bioes"].write(entities, 5) == ["B-X", "E-X", "S-X", "O", "S-Y"]
