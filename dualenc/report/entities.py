"""The evidence behind the metrics of named entities: scores of each type, and the most frequent mistakes in context."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dualenc.report.findings import CONFUSIONS, EXAMPLES, around
from dualenc.report.render import render
from dualenc.utils.tags import Entity


@dataclass(frozen=True)
class TaggedTexts:
    """True and predicted entities of texts.

    Attributes:
        texts: each text, and the first character and the end of each of its words.
        truth: entities of each text, in order.
        predicted: predicted entities of each text, in order.
        types: by type of entity "precision", "recall", "f1", and "true" and "predicted", the numbers of entities.
    """

    texts: Sequence[tuple[str, Sequence[tuple[int, int]]]]
    truth: Sequence[Sequence[Entity]]
    predicted: Sequence[Sequence[Entity]]
    types: Mapping[str, Mapping[str, float]]

    def html(self) -> Markup:
        """See `Findings`."""
        mistakes = self.mistakes()
        worst = sorted(mistakes, key=lambda pair: -len(mistakes[pair]))[:CONFUSIONS]
        return render(
            "entities.jinja",
            types=sorted(self.types.items(), key=lambda item: item[1]["f1"]),
            confusions=[
                {
                    "truth": pair[0],
                    "predicted": pair[1],
                    "n": len(mistakes[pair]),
                    "examples": [self._example(*one) for one in mistakes[pair][:EXAMPLES]],
                }
                for pair in worst
            ],
        )

    def mistakes(self) -> dict[tuple[str, str], list[tuple[int, Entity | None, Entity | None]]]:
        """Return the mistakes by true and predicted type, with the number of the text and both entities.

        A true entity that is not found stands against the first wrong prediction that shares a word with it. The type
        of what is missing is empty; equal types mean that only the words differ.
        """
        found: dict[tuple[str, str], list[tuple[int, Entity | None, Entity | None]]] = {}
        for number, (truth, predicted) in enumerate(zip(self.truth, self.predicted, strict=True)):
            both = set(truth) & set(predicted)
            left = [one for one in predicted if one not in both]
            for one in truth:
                if one in both:
                    continue
                other = next((x for x in left if x.start < one.stop and one.start < x.stop), None)
                left = [x for x in left if x is not other]
                pair = one.label, "" if other is None else other.label
                found.setdefault(pair, []).append((number, one, other))
            for other in left:
                found.setdefault(("", other.label), []).append((number, None, other))
        return found

    def _example(self, number: int, true: Entity | None, predicted: Entity | None) -> dict[str, Any]:
        """Return what the template shows of a mistake: an entity in its text, and the words of the prediction."""
        text, spans = self.texts[number]
        shown = true or predicted
        assert shown is not None  # One of the two is there.
        start, end = spans[shown.start][0], spans[shown.stop - 1][1]
        before, after = around(text, start, end)
        return {
            "before": before,
            "entity": text[start:end],
            "after": after,
            "predicted": predicted and text[spans[predicted.start][0] : spans[predicted.stop - 1][1]],
        }
