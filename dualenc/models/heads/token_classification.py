"""Token classification: a tag for each word, from which named entities are read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualenc.data.text.windows import Windows
from dualenc.data.text.words import KeptWords, WordReader, WordSequence
from dualenc.metrics.entities import entity_bootstrap, entity_metrics, outside_baseline, type_scores
from dualenc.models.heads.base import Examples, HeadConfig, HeldOut, Measured
from dualenc.models.heads.class_weights import cross_entropy_sums
from dualenc.models.heads.token_head import TokenHead
from dualenc.models.text_encoder import TextConfig
from dualenc.report import Description
from dualenc.report.entities import TaggedTexts
from dualenc.utils.tags import OUTSIDE, SCHEMES, find_entities, split_tag
from dualenc.utils.text import plural


class MeasuredTags(NamedTuple):
    """The predicted tags of a batch of held-out sentences."""

    loss: float  # sum over the judged words
    judged: int  # number of words that have tokens
    sequences: list[WordSequence]
    predicted: list[list[int]]  # number of each word's predicted tag


class TokenClassification(TokenHead):
    """A tag for each word of a text, by the hidden state of the word's first token (Devlin et al. 2019, section 5.3).

    A word that the tokenizer turns into nothing, such as a control character, is "O".
    """

    own_settings = ("class_weights", "scheme")
    task = "token-classification"
    result_kind = "tags"
    description = Description("sentences", "named entities", ("f1", "precision", "recall", "accuracy"))

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        given = config.class_weights
        self.weights = torch.tensor(given) if isinstance(given, tuple) else None

    @property
    def labels(self) -> tuple[str, ...]:
        """The tags: those that are given, or all tags of the types that are given; see `HeadConfig.labels`."""
        given = self.config.labels
        return given if OUTSIDE in given else SCHEMES[self.config.scheme].tags(given)

    def check(self) -> None:
        """See `Head.check`."""
        where, scheme = f"a head of kind {self.config.kind}", SCHEMES.get(self.config.scheme)
        if scheme is None:
            raise ValueError(f"{where}: scheme {self.config.scheme!r} must be {' or '.join(SCHEMES)}")
        super().check()
        if not self.config.labels:
            raise ValueError(f"{where} needs labels: types of entities, such as PER, or tags, such as O, B-PER, I-PER")
        if self.config.class_weights == "balanced":
            raise ValueError(f"{where}: class_weights must be a number for each of the tags {', '.join(self.labels)}")
        tags = [split_tag(tag) for tag in self.labels if tag != OUTSIDE]
        if wrong := [f"{prefix}-{label}" for prefix, label in tags if prefix not in [*scheme.prefixes] or not label]:
            raise ValueError(
                f"{where}: label {wrong[0].rstrip('-')!r} is not a tag of scheme {scheme.name}: name types of entities "
                f"without {OUTSIDE!r}, such as PER, or all tags, such as {', '.join(scheme.tags(['PER']))}"
            )
        twice = [label for _, label in tags if split_tag(label)[0] in ("B", "I", "E", "S") and split_tag(label)[1]]
        if OUTSIDE not in self.config.labels and twice:
            raise ValueError(f"{where}: labels must be types of entities alone, or tags with {OUTSIDE!r} among them")

    def window_reader(self) -> WordReader:
        """See `Head.window_reader`."""
        return WordReader(self.labels, self.config.scheme)

    def build(self, text: TextConfig) -> nn.Module:
        """See `Head.build`."""
        return self.layers(text, len(self.labels))

    def loss(self, logits: Tensor, labels: Tensor | None, group: Any = None) -> Tensor:
        """Return the sum of the cross entropy of t words, see `Head.loss`."""
        assert labels is not None
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    def sums(self, examples: Examples, group: Any = None) -> tuple[Tensor, Tensor | int]:
        """Return the sum of the loss, in which words are weighted by their tags, and that of the weights."""
        assert examples.labels is not None
        if self.weights is not None:  # They stay on the device: a copy in each step would wait for its work.
            self.weights = self.weights.to(examples.logits.device)
        return cross_entropy_sums(examples.logits.float(), examples.labels, self.weights)

    def observe(self, examples: Examples) -> MeasuredTags:
        """Return the sentences with their predicted tags; see `Head.observe`."""
        assert examples.windows is not None
        loss = self.loss(examples.logits, examples.labels).item()
        predicted = self._per_word(examples.logits.argmax(-1).tolist(), examples.windows, self.labels.index(OUTSIDE))
        sequences = [kept.sequence for kept in examples.windows.kept]
        return MeasuredTags(loss, examples.number, sequences, predicted)

    def metrics(self, states: Sequence[MeasuredTags], held_out: HeldOut) -> Measured:
        """Compute `entity_metrics` with intervals, and the baseline of always "O"; see `Head.metrics`."""
        sequences = [sequence for state in states for sequence in state.sequences]
        truth = [[self.labels[i] for i in sequence.tags or ()] for sequence in sequences]
        predicted = [[self.labels[i] for i in tags] for state in states for tags in state.predicted]
        found = entity_metrics(truth, predicted, self.config.scheme)
        intervals = entity_bootstrap(truth, predicted, self.config.scheme).intervals()
        judged = sum(state.judged for state in states)
        found["loss"] = sum(state.loss for state in states) / max(1, judged)
        texts = [(sequence.text, sequence.spans) for sequence in sequences]
        findings = TaggedTexts(
            texts,
            [find_entities(tags) for tags in truth],
            [find_entities(tags) for tags in predicted],
            {label: score._asdict() for label, score in type_scores(truth, predicted).items()},
        )
        missing = sum(map(len, truth)) - judged
        notes = (f"{plural(missing, 'word')} without tokens counted as {OUTSIDE}",) if missing else ()
        return Measured(found, intervals, outside_baseline(truth), len(truth), f"always {OUTSIDE}", findings, notes)

    def metric_names(self) -> Sequence[str]:
        """See `Head.metric_names`."""
        measured = ("f1", "precision", "recall", "f1_macro", "f1_strict", "accuracy", "loss")
        return (*measured, "baseline_f1", "baseline_accuracy")

    def answers(self, examples: Examples) -> list[dict[str, Any]]:
        """Return the "text" of each sample and its "entities", a list of label, start, end, text and score.

        The places are those of characters of the text. The score is the mean of the probabilities of the words' tags.
        """
        assert examples.windows is not None
        scores, best = examples.logits.detach().float().softmax(-1).max(-1)
        tags = self._per_word(best.tolist(), examples.windows, self.labels.index(OUTSIDE))
        chances = self._per_word(scores.tolist(), examples.windows, 1.0)
        return [
            self._answer(kept.sequence, [self.labels[i] for i in row], chance)
            for kept, row, chance in zip(examples.windows.kept, tags, chances, strict=True)
        ]

    def _answer(self, sequence: WordSequence, tags: list[str], scores: list[float]) -> dict[str, Any]:
        """Return the prediction for a text from the tags of its words and their probabilities."""
        text, spans = sequence.text, sequence.spans
        found = []
        for label, first, stop in find_entities(tags):
            start, end = spans[first][0], spans[stop - 1][1]
            score = sum(scores[first:stop]) / (stop - first)
            found.append({"label": label, "start": start, "end": end, "text": text[start:end], "score": score})
        return {"text": text, "entities": found}

    def _per_word(self, values: Sequence[Any], windows: Windows, missing: Any) -> list[list[Any]]:
        """Return for each sample the values of its words.

        Args:
            values: value of each judged token.
            windows: the samples.
            missing: value of words without tokens.
        """
        out, at = [], 0
        for kept in windows.kept:
            assert isinstance(kept, KeptWords)
            row = [missing] * len(kept.sequence.spans)
            for number, value in zip(kept.judged, values[at : at + len(kept.judged)], strict=True):
                row[number] = value
            at += len(kept.judged)
            out.append(row)
        return out
