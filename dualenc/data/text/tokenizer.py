"""Captions to packed tokens, by the Hugging Face `tokenizers` library."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

from tokenizers import Encoding, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from dualenc.tokens import Tokens
from dualenc.utils.errors import DataError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_LETTERS = 1000  # rarer characters are unknown to a trained vocabulary, but not to a byte-level one

Kind = Literal["wordpiece", "bpe"]  # that are trained; tokenizer.json files of any kind are read


class Tokenizer:
    """Turns texts into `Tokens`.

    Args:
        backend: a tokenizer of the `tokenizers` library with its post-processor.
        context_length: longest text in tokens; what is longer loses its end, but keeps its closing token.
        pad_to: fills shorter texts up to this length, for an encoder that sees its padding (SigLIP); absent, none are.
        pad_id: of the token that does.
    """

    def __init__(self, backend: Backend, context_length: int, pad_to: int | None = None, pad_id: int = 0) -> None:
        self.backend = Backend.from_str(backend.to_str())  # truncation below must not reach the caller's
        self.context_length, self.pad_to, self.pad_id = context_length, pad_to, pad_id
        self.backend.no_padding()
        self.backend.enable_truncation(context_length)
        self.backend.encode_special_tokens = True  # "[SEP]" in a caption is four pieces of text, never the token

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], context_length: int, pad_to: int | None = None, pad_id: int = 0
    ) -> "Tokenizer":
        """Reads `tokenizer.json` or BERT's `vocab.txt`, or the folder that holds one of them.

        Args:
            path: of the file or the folder.
            context_length, pad_to, pad_id: see the class.

        Raises:
            DataError: there is no such file, or it is neither.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
            if not found:
                raise DataError(f"{path} holds neither tokenizer.json nor vocab.txt")
            path = found[0]
        if not path.is_file():
            raise DataError(f"tokenizer {path} does not exist")
        try:
            if path.suffix == ".txt":  # only "\n" ends an entry: U+2028 and its like are entries
                backend = _wordpiece(path.read_text("utf-8").removesuffix("\n").split("\n"))
            else:
                backend = Backend.from_file(str(path))
            return cls(backend, context_length, pad_to, pad_id)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path} is no tokenizer that the tokenizers library reads ({error})") from None

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, context_length: int, kind: Kind = "wordpiece"
    ) -> "Tokenizer":
        """Learns a lower-casing vocabulary of at most `vocab_size` entries.

        The same captions give the same vocabulary, whatever their order. Both kinds put [CLS] before and [SEP] after a
        text and have the ids 0 to 4 for [PAD], [UNK], [CLS], [SEP] and [MASK].

        Args:
            captions: what to learn from.
            vocab_size: entries, special tokens and single letters (or bytes) among them.
            context_length: see the class.
            kind: "wordpiece" as BERT has it (Wu et al. 2016, section 4.1); "bpe" on bytes as GPT-2 has it (Radford et
                al. 2019, section 2.2), to which no character is unknown.

        Raises:
            DataError: `kind` is another one, or `vocab_size` has no room for the special tokens and the letters.
        """
        train = {"wordpiece": _train_wordpiece, "bpe": _train_bpe}.get(kind)
        if train is None:
            raise DataError(f"tokenizer kind {kind!r} cannot be trained: choose wordpiece or bpe")
        return cls(train(captions, vocab_size), context_length)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Packs B texts; an empty one is its opening and closing tokens."""
        return self.pack(self.encode(texts))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, opening and closing tokens among them."""
        return [self._filled(item.ids) for item in self.backend.encode_batch_fast(list(texts))]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of each pair of texts in one, and the segment of each token, as the tokenizer joins pairs.

        What is longer than `context_length` loses tokens at the end of the longer of the two.
        """
        found = self.backend.encode_batch_fast([(one, other) for one, other in pairs])
        return [self._filled(item.ids) for item in found], [self._filled(item.type_ids, 0) for item in found]

    def encode_words(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of each text, and for each token the number of its word in the text, -1 for the special ones.

        Words are what the tokenizer cuts a text into before it looks for pieces in its vocabulary.
        """
        found = self.backend.encode_batch(list(texts))
        words = [
            [
                -1 if number is None or special else number
                for number, special in zip(item.word_ids, item.special_tokens_mask)
            ]
            for item in found
        ]
        return [self._filled(item.ids) for item in found], [self._filled(numbers, -1) for numbers in words]

    def _filled(self, items: list[int], by: int | None = None) -> list[int]:
        missing = (self.pad_to or 0) - len(items)
        return items + [self.pad_id if by is None else by] * missing

    def cut(self, texts: Sequence[str]) -> list[list[int]]:
        """Where to cut each text (in letters) so that no piece has more than `context_length` tokens, special ones too.

        Where there is a blank if possible, or else between words; the end of the text is the last place.

        Raises:
            DataError: there is no room for a text in so few tokens.
        """
        room = self.context_length - self.backend.num_special_tokens_to_add(False)
        if room < 1:
            raise DataError(f"context_length {self.context_length} has no room for a text: raise it")
        found = self._whole.encode_batch(list(texts), add_special_tokens=False)
        places = [_places(text, item, room) for text, item in zip(texts, found)]
        # A piece that stands alone may need more tokens than it did in the text, as where a word is cut.
        pieces = [(i, text[a:b]) for i, text in enumerate(texts) for a, b in pairwise([0, *places[i]])]
        alone = self._whole.encode_batch_fast([piece for _, piece in pieces], add_special_tokens=False)
        for i in sorted({i for (i, _), item in zip(pieces, alone) if len(item) > room}):
            places[i] = _places(texts[i], found[i], room, lambda piece: len(self._plain_ids(piece)))
        return places

    def _plain_ids(self, text: str) -> list[int]:
        return self._whole.encode(text, add_special_tokens=False).ids

    @cached_property
    def _whole(self) -> Backend:
        """The backend without truncation."""
        plain = Backend.from_str(self.backend.to_str())
        plain.no_truncation()
        plain.encode_special_tokens = True
        return plain

    pack = staticmethod(Tokens.pack)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def special(self) -> dict[str, int]:
        """The ids of the special tokens."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    @property
    def mask_id(self) -> int | None:
        """Of the token that hides another; None where there is none."""
        special = self.special
        return special.get("[MASK]", special.get("<mask>"))

    @property
    def fingerprint(self) -> str:
        """Of what it makes of texts."""
        padding = "" if self.pad_to is None else f" filled to {self.pad_to} with {self.pad_id}"
        return hashlib.blake2b((self.backend.to_str() + padding).encode(), digest_size=16).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, without this run's truncation: the length belongs to the text encoder."""
        plain = Backend.from_str(self.backend.to_str())
        plain.no_truncation()
        plain.encode_special_tokens = False
        plain.save(os.fspath(path))

    def __getstate__(self) -> dict[str, Any]:
        return {
            "json": self.backend.to_str(),
            "context_length": self.context_length,
            "pad_to": self.pad_to,
            "pad_id": self.pad_id,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Backend.from_str(state["json"]), state["context_length"], state["pad_to"], state["pad_id"])


def _places(text: str, item: Encoding, room: int, count: Callable[[str], int] | None = None) -> list[int]:
    """Where to cut a text into pieces of `room` tokens, and its end; `count` says how many a piece has alone."""
    ends, words = [stop for _, stop in item.offsets], item.word_ids
    places: list[int] = []
    first = start = 0  # token and letter with which the next piece begins

    def fits(stop: int) -> bool:
        return count is None or count(text[start:stop]) <= room

    while first < len(ends) and (len(ends) - first > room or not fits(len(text))):
        top = min(first + room, len(ends))
        can_be = range(top, first, -1)
        blank = [i for i in can_be if text[ends[i - 1] : ends[i - 1] + 1].isspace() or i == len(ends)]
        between = [i for i in can_be if i == len(ends) or words[i] != words[i - 1]]
        found = next((i for i in chain(blank, between, can_be) if fits(ends[i - 1])), None)
        if found is not None:
            first, stop = found, ends[found - 1]
        else:  # alone, even a part of the token is several
            stop = next((stop for stop in range(ends[first] - 1, start, -1) if fits(stop)), start + 1)
            first += stop >= ends[first]
        if start < stop < len(text):
            places.append(stop)
        start = max(start, stop)
    return [*places, len(text)]


def _wordpiece(tokens: list[str]) -> Backend:
    """BERT's tokenizer from its vocabulary; lower-casing unless an ordinary entry has a capital letter."""
    vocab = {token: i for i, token in enumerate(tokens)}
    if missing := [token for token in SPECIAL[1:4] if token not in vocab]:
        raise DataError(f"a BERT vocabulary has the entries {', '.join(missing)}, this one has not")
    cased = any(token != token.lower() for token in tokens if token not in SPECIAL and not token.startswith("["))
    backend = _backend(models.WordPiece(vocab, unk_token="[UNK]"), lowercase=not cased)
    backend.add_special_tokens([token for token in SPECIAL if token in vocab])
    _bracket(backend)
    return backend


def _backend(model: Any, lowercase: bool) -> Backend:
    backend = Backend(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    backend.decoder = decoders.WordPiece()  # type: ignore[assignment]
    return backend


def _bracket(backend: Backend) -> None:
    """[CLS] before and [SEP] after every text."""
    ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )


def _train_wordpiece(captions: Iterable[str], vocab_size: int) -> Backend:
    backend = _backend(models.WordPiece(unk_token="[UNK]"), lowercase=True)
    words = _words(backend, captions)
    alphabet = _alphabet(words)
    inside = {letter for word in words for letter in word[1:]}
    # The trainer would number the pieces "##a" in a hash map's order; given beforehand, ids and ties are fixed.
    given = [*SPECIAL, *alphabet, *(f"##{letter}" for letter in alphabet if letter in inside)]
    _has_room(vocab_size, len(given), "single letters")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=given, show_progress=False, limit_alphabet=len(alphabet)
    )
    backend.train_from_iterator((word for word in sorted(words) for _ in range(words[word])), trainer)
    vocab = backend.get_vocab(with_added_tokens=True)
    return _wordpiece(sorted(vocab, key=vocab.__getitem__))


def _train_bpe(captions: Iterable[str], vocab_size: int) -> Backend:
    backend = Backend(models.BPE())
    space = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.NFC(), space, normalizers.Strip(), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])  # type: ignore[assignment]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    _has_room(vocab_size, len(SPECIAL) + len(letters), "bytes")
    # Its letters are the bytes in order, and it breaks ties by their numbers: nothing of a hash map is left to see.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(captions, trainer)
    _bracket(backend)
    return backend


def _words(backend: Backend, captions: Iterable[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for caption in captions:
        text = backend.normalizer.normalize_str(caption)  # type: ignore[union-attr]
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))  # type: ignore[union-attr]
    return words


def _alphabet(words: Counter[str]) -> list[str]:
    """The letters that most words have, in the order of their code points."""
    letters: Counter[str] = Counter()
    for word, count in words.items():
        letters.update(dict.fromkeys(word, count))
    return sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:MAX_LETTERS])


def _has_room(vocab_size: int, needed: int, what: str) -> None:
    if vocab_size < needed:
        raise DataError(f"vocab_size {vocab_size} is too small: {needed} entries are special tokens and {what}")
