"""Texts as words with tags, for heads that judge words: sentences of files, and texts that are split into words."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Regex, pre_tokenizers

from dualenc.data.text.dataset import text_field
from dualenc.data.text.formats import TAGS, TEXT, WORDS
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.data.text.windows import Window, Windowed, WindowReader
from dualenc.utils.decoding import text_problem
from dualenc.utils.errors import BadSample, DataError, warn_once
from dualenc.utils.tags import SCHEMES, Entity, SchemeName, find_entities, split_tag
from dualenc.utils.text import did_you_mean, plural, quoted

if TYPE_CHECKING:
    from dualenc.data.text.files import Line, TextIndex

ENTITIES = "entities"  # field of a JSON object with a text
OVERLAP = 4  # A window shares a quarter of its tokens with the one before it.
_CHINESE = (  # as BERT's tokenizer, which treats each as a word
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f"
)
# The words of BERT: blanks end them, and a punctuation mark or a Chinese character is a word of its own.
_SPLIT = pre_tokenizers.Sequence(
    [
        pre_tokenizers.BertPreTokenizer(),
        pre_tokenizers.Split(Regex(f"[{_CHINESE}]"), "isolated"),
    ]
)


class WordSequence(NamedTuple):
    """A text and its words."""

    text: str
    spans: list[tuple[int, int]]  # first character of each of the n words, and the character after its last one
    tags: list[int] | None = None  # (n,) number of each word's tag

    @property
    def words(self) -> list[str]:
        """The n words."""
        return [self.text[start:stop] for start, stop in self.spans]


class KeptWords(NamedTuple):
    """A sentence, and which of its words the judged tokens stand for."""

    sequence: WordSequence
    judged: list[int]  # number of the word of each judged token, window by window; words without tokens are missing


def split_text(text: str) -> WordSequence:
    """Split a text into words as BERT does: at blanks, and around each punctuation mark and Chinese character."""
    return WordSequence(text, [span for _, span in _SPLIT.pre_tokenize_str(text)])


def join_words(words: Sequence[str]) -> WordSequence:
    """Return the text of words: a blank is between each two of them."""
    stops = list(accumulate(words, lambda stop, word: stop + 1 + len(word), initial=-1))[1:]
    return WordSequence(" ".join(words), [(stop - len(word), stop) for word, stop in zip(words, stops, strict=True)])


@dataclass(frozen=True)
class WordReader(WindowReader):
    """Reader of words and their tags.

    A line has `tokens` and `tags`, as the sentences of a `.conll`, or a `text` and its `entities`: first character,
    character after the last one, and type of each. Tags of another scheme, and tags that the scheme does not allow,
    are read as `find_entities` does, and become tags of the scheme.

    Attributes:
        names: tags that the head knows.
        scheme: scheme of these tags.
    """

    names: tuple[str, ...]
    scheme: SchemeName

    @property
    def facts(self) -> list[Any]:
        """See `WindowReader.facts`."""
        return ["words", self.scheme, list(self.names), OVERLAP]

    def check(self, index: "TextIndex", head: str) -> None:
        """Read all tags; see `WindowReader.check`. Sentences whose tags do not follow the scheme are counted."""
        converted: list[str] = []
        bad: list[BadSample] = []
        for sample in index:
            try:
                fields = sample.read()
                sequence = _sequence(sample, fields)
                given = self._given(sample, fields, sequence)
            except BadSample as error:
                bad.append(error)
                continue
            tags = self._in_scheme(given)
            for i, (one, other) in enumerate(zip(given, tags, strict=True)):
                if unknown := one if not self._knows(one) else other if other not in self.names else "":
                    hint = did_you_mean(unknown, self.names, f"it has {', '.join(self.names[:20])}")
                    raise DataError(
                        f"{sample.at_word(i)}: tag {quoted(unknown)} is not a tag of head {head!r} ({hint}): add its "
                        f"type to model.heads.{head}.labels, or correct the line"
                    )
            if differing := [i for i, (one, other) in enumerate(zip(given, tags)) if one != other]:
                converted.append(f"{sample.at_word(differing[0])}: {given[differing[0]]} became {tags[differing[0]]}")
        if len(bad) == len(index):
            raise DataError(f"no sample of {index.parts[0]} has words with tags, as head {head!r} reads them: {bad[0]}")
        if converted:
            warn_once(
                f"head {head}: the tags of {plural(len(converted), 'sentence')} of {len(index):,} do not follow its "
                f"scheme {self.scheme}; they were converted (the first is {converted[0]})"
            )

    def read(self, sample: "Line", labeled: bool) -> WordSequence:
        """Return the words of a line, and their tags; see `WindowReader.read`."""
        fields = sample.read()
        sequence = _sequence(sample, fields)
        if not labeled:
            return sequence
        tags = self._in_scheme(self._given(sample, fields, sequence))
        if unknown := [tag for tag in tags if tag not in self.names]:
            raise BadSample(sample, "it has a tag that the head does not know", quoted(unknown[0]))
        return sequence._replace(tags=[self.names.index(tag) for tag in tags])

    def texts(self, item: WordSequence) -> list[str]:
        """See `WindowReader.texts`."""
        return [item.text]

    def windows(self, items: Sequence[WordSequence], tokenizer: Tokenizer) -> list[Windowed]:
        """Return the windows of texts; the first token of each word is judged in the window that shows most around it.

        See `WindowReader.windows`.
        """
        room = tokenizer.context_length - tokenizer.backend.num_special_tokens_to_add(False)
        overlap = max(room, 0) // OVERLAP
        encoded = tokenizer.encode_split([item.words for item in items], overlap)
        return [_windowed(item, windows, room - overlap) for item, windows in zip(items, encoded, strict=True)]

    def _given(self, sample: "Line", fields: dict[str, Any], sequence: WordSequence) -> list[str]:
        """Return the tags of a line as it has them.

        Raises:
            BadSample: If it does not have a tag for each word.
        """
        if WORDS not in fields:
            entities = _entities(sample, fields, sequence)
            return SCHEMES[self.scheme].write(entities, len(sequence.spans))
        tags = fields.get(TAGS)
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise BadSample(sample, f"it does not have {TAGS!r}, a tag for each word")
        if len(tags) != len(sequence.spans):
            raise BadSample(
                sample, "it does not have one tag for each word", f"{len(tags)} for {len(sequence.spans)} words"
            )
        return tags

    def _in_scheme(self, tags: Sequence[str]) -> list[str]:
        return SCHEMES[self.scheme].write(find_entities(tags), len(tags))

    def _knows(self, tag: str) -> bool:
        """Return whether a tag is one of the head, or one that another scheme has for one of its types."""
        prefix, label = split_tag(tag)
        types = {split_tag(name)[1] for name in self.names}
        return tag in self.names or (prefix in ("B", "I", "E", "S") and label != "" and label in types)


def _sequence(sample: "Line", fields: dict[str, Any]) -> WordSequence:
    """Return the words of a line.

    Raises:
        BadSample: If it has neither words nor a text.
    """
    if WORDS in fields:
        words = fields[WORDS]
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            raise BadSample(sample, f"its field {WORDS!r} is not a list of words")
        sequence = join_words(words)
        if (problem := text_problem(sequence.text)) not in (None, "empty"):  # A word may be an invisible character.
            raise BadSample(sample, f"its field {WORDS!r} holds a text {problem}")
        return sequence
    if TEXT not in fields:
        raise BadSample(sample, f"it has neither a field {WORDS!r} nor {TEXT!r}")
    return split_text(text_field(sample, fields, TEXT))


def _entities(sample: "Line", fields: dict[str, Any], sequence: WordSequence) -> list[Entity]:
    """Return the entities of a text, in order, as words.

    Raises:
        BadSample: If an entity is not a place in the text with a type, or does not begin and end where words do, or
            two of them overlap.
    """
    given = fields.get(ENTITIES)
    if not isinstance(given, list):
        raise BadSample(sample, f"its field {ENTITIES!r} is not a list of [start, end, label]")
    found: list[Entity] = []
    for one in given:
        match one:
            case [int(start), int(stop), str(label)] if 0 <= start < stop <= len(sequence.text) and label:
                inside = [i for i, (a, b) in enumerate(sequence.spans) if a < stop and b > start]
            case _:
                raise BadSample(sample, "an entity is not [start, end, label] in its text", quoted(str(one)))
        if not inside or sequence.spans[inside[0]][0] < start or sequence.spans[inside[-1]][1] > stop:
            raise BadSample(
                sample, "an entity does not begin and end where words do", quoted(sequence.text[start:stop])
            )
        found.append(Entity(label, inside[0], inside[-1] + 1))
    found.sort(key=lambda entity: entity.start)
    if twice := [other for one, other in pairwise(found) if other.start < one.stop]:
        start, stop = sequence.spans[twice[0].start][0], sequence.spans[twice[0].stop - 1][1]
        raise BadSample(sample, "two of its entities overlap", quoted(sequence.text[start:stop]))
    return found


def _windowed(item: WordSequence, windows: Sequence[tuple[list[int], list[int]]], step: int) -> Windowed:
    """Choose for each word the window in which its first token is judged.

    Args:
        item: the words.
        windows: ids, and the word of each token, of windows that begin `step` tokens after each other.
        step: see `windows`.
    """
    best: dict[int, tuple[int, int, int]] = {}  # word -> tokens on its shorter side, window, place in the window
    seen = 0  # tokens of the text in the windows so far
    first: dict[int, int] = {}  # word -> number of its first token in the text
    for number, (_, words) in enumerate(windows):
        own = [i for i, word in enumerate(words) if word >= 0]
        for i, place in enumerate(own):
            word, at = words[place], number * step + i
            if at >= seen:
                first.setdefault(word, at)
            around = min(i, len(own) - 1 - i)
            if first[word] == at and (word not in best or around > best[word][0]):
                best[word] = around, number, place
        seen = max(seen, number * step + len(own))
    kept, judged = [], []
    for number, (ids, words) in enumerate(windows):
        places = sorted(place for _, window, place in best.values() if window == number)
        if places or len(windows) == 1:
            own = [words[place] for place in places]
            kept.append(Window(ids, None, places, [] if item.tags is None else [item.tags[word] for word in own]))
            judged += own
    return Windowed(kept, KeptWords(item, judged))
