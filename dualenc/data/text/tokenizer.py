"""Tokenizers: texts to packed tokens, with the `tokenizers` library of Hugging Face."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

from tokenizers import Encoding, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from dualenc.data.text.tokenizer_classes import PLAIN
from dualenc.data.text.tokenizer_files import CONFIG, ROLES, VOCABULARIES, read_tokenizer_files
from dualenc.tokens import Tokens
from dualenc.utils.errors import DataError
from dualenc.utils.files import write_json

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_LETTERS = 1000  # Rarer characters are unknown to a trained WordPiece vocabulary.

Kind = Literal["wordpiece", "bpe"]  # The kinds that are trained; a tokenizer.json of any kind is read.


class Tokenizer:
    """A tokenizer that turns texts into `Tokens`.

    Args:
        backend: a tokenizer of the `tokenizers` library with its post-processor.
        context_length: longest text in tokens. A longer text loses its end, or its beginning if the backend truncates
            on the left, but keeps its opening and closing tokens.
        pad_to: length to which shorter texts are padded, for an encoder that sees its padding (SigLIP); None for no
            padding.
        pad_id: id of the padding token.
        roles: special tokens by role as in transformers, such as {"mask_token": "<mask>"}. A role that is left out has
            the token with a usual name, such as [MASK] or <mask>, if there is one.
        split_special_tokens: what a special token is that is written in a text. True: text, which is split. False: the
            token. None: text if it has a role or is put around texts, such as [SEP]; otherwise the token.

    Attributes:
        backend: a copy of the backend, in which exactly those special tokens are marked that are text if written in a
            text. `save` writes the marks of the original.

    Example:
        >>> import dualenc
        >>> tokenizer = dualenc.Tokenizer.train(["a cat", "a dog"], vocab_size=40, context_length=8)
        >>> tokens = tokenizer(["a cat", "a"])
        >>> tokens.offsets.tolist()  # each text has [CLS], its tokens and [SEP]; the texts are sorted by length
        [0, 3, 7]
    """

    def __init__(
        self,
        backend: Backend,
        context_length: int,
        pad_to: int | None = None,
        pad_id: int = 0,
        roles: Mapping[str, str] | None = None,
        split_special_tokens: bool | None = None,
    ) -> None:
        self.context_length, self.pad_to, self.pad_id = context_length, pad_to, pad_id
        self.roles, self.split_special_tokens = _all_roles(backend, roles or {}), split_special_tokens
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(token.content for token in added.values() if token.special)
        # The library reads tokens that are not special as tokens wherever they are written, and splits special ones.
        own = {*self.roles.values(), *_ends(backend)}
        split = {None: own & {token.content for token in added.values()}, True: self._special, False: set[str]()}
        # The caller's tokenizer must keep its own truncation: this is a copy.
        self.backend = _flagged(backend, split[split_special_tokens])
        self.backend.no_padding()
        self.backend.enable_truncation(context_length, direction=(backend.truncation or {}).get("direction", "right"))
        self.backend.encode_special_tokens = True

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], context_length: int, pad_to: int | None = None, pad_id: int = 0
    ) -> "Tokenizer":
        """Read `tokenizer.json`, BERT's `vocab.txt`, or `vocab.json` and `merges.txt` of RoBERTa or CLIP.

        The files next to it, such as `tokenizer_config.json`, apply as in transformers; see `read_tokenizer_files`.

        Args:
            path: the file, or a folder that holds one of them.
            context_length, pad_to, pad_id: see the class.

        Raises:
            DataError: If there is no such file, it cannot be read as a tokenizer, or the settings contradict it.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in VOCABULARIES if (path / name).is_file()]
            if not found:
                raise DataError(f"{path} holds neither tokenizer.json nor vocab.txt")
            path = found[0]
        if not path.is_file():
            raise DataError(f"tokenizer {path} does not exist")
        files = read_tokenizer_files(path)
        return cls(files.backend, context_length, pad_to, pad_id, files.roles, files.split_special_tokens)

    def replace(self, **changes: Any) -> "Tokenizer":
        """Return a copy with other arguments of the class, such as `split_special_tokens`."""
        return Tokenizer(**{**self.__getstate__(), "backend": self._original(), **changes})

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, context_length: int, kind: Kind = "wordpiece"
    ) -> "Tokenizer":
        """Train a lower-casing vocabulary of at most `vocab_size` entries.

        The same captions give the same vocabulary in any order. Both kinds put [CLS] before and [SEP] after a text and
        have the ids 0 to 4 for [PAD], [UNK], [CLS], [SEP] and [MASK].

        Args:
            captions: the training texts.
            vocab_size: the number of entries, including special tokens and single letters (or bytes).
            context_length: see the class.
            kind: "wordpiece" as in BERT (Wu et al. 2016, section 4.1), or "bpe" on bytes as in GPT-2 (Radford et al.
                2019, section 2.2), which knows every character.

        Raises:
            DataError: If `kind` is another one, or `vocab_size` is too small for the special tokens and the letters.
        """
        train = {"wordpiece": _train_wordpiece, "bpe": _train_bpe}.get(kind)
        if train is None:
            raise DataError(f"tokenizer kind {kind!r} cannot be trained: choose wordpiece or bpe")
        return cls(train(captions, vocab_size), context_length)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size:,} entries, at most {self.context_length} tokens a text)"

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenize and pack B texts; an empty text has its opening and closing tokens only."""
        return self.pack(self.encode(texts))

    def encode(self, texts: Sequence[str], masks: bool = False) -> list[list[int]]:
        """Return the ids of each text, including the opening and closing tokens.

        Args:
            texts: the texts.
            masks: whether the mask token that is written in a text is that token, whatever `split_special_tokens` says.
        """
        backend = self._reading_masks if masks else self.backend
        return [self._padded(item.ids) for item in backend.encode_batch_fast(list(texts))]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
        """Return the ids of each pair of texts, joined as the tokenizer does it, and the segment of each token.

        A pair longer than `context_length` loses tokens at the end of the longer text.
        """
        encodings = self.backend.encode_batch_fast([(one, other) for one, other in pairs])
        segments = [self._padded(encoding.type_ids, 0) for encoding in encodings]
        return [self._padded(encoding.ids) for encoding in encodings], segments

    def encode_whole(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the encoding of each text, of any length and without special tokens."""
        return self._untruncated.encode_batch(list(texts), add_special_tokens=False)

    def encode_whole_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoding]:
        """Return the encoding of each pair of texts, joined as the tokenizer does it, of any length."""
        return self._untruncated.encode_batch(list(pairs))

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return len(self._untruncated.encode(text, add_special_tokens=False).ids)

    def encode_words(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Return the ids of each text, and for each token the number of its word in the text, -1 for special tokens.

        Words are the parts into which the tokenizer splits a text before it looks up subwords in its vocabulary.
        """
        encodings = self.backend.encode_batch(list(texts))
        words = [
            [
                -1 if number is None or special else number
                for number, special in zip(encoding.word_ids, encoding.special_tokens_mask)
            ]
            for encoding in encodings
        ]
        return [self._padded(encoding.ids) for encoding in encodings], [self._padded(row, -1) for row in words]

    def encode_split(self, texts: Sequence[Sequence[str]], overlap: int) -> list[list[tuple[list[int], list[int]]]]:
        """Return the tokens of texts that are given as words, in windows of at most `context_length` tokens.

        Each word is tokenized by itself, as it stands after a blank, even where the tokenizer does not put a blank
        before a text: the second word of "New York" and a text "York" then have the same tokens.

        Args:
            texts: words of each text. A word may have no tokens.
            overlap: number of tokens that a window shares with the one before it.

        Returns:
            For each window of each text the ids, and for each token the number of its word, -1 for special tokens.

        Raises:
            DataError: If `context_length` leaves no token more than `overlap`.
        """
        room = self.context_length - self.backend.num_special_tokens_to_add(False)
        if room <= overlap:
            raise DataError(f"context_length {self.context_length} has no room for windows of words: raise it")
        backend = self._after_blank
        backend.enable_truncation(self.context_length, stride=overlap)
        encodings = backend.encode_batch(list(map(list, texts)), is_pretokenized=True)
        found = []
        for encoding in encodings:
            windows = [encoding, *encoding.overflowing]
            words = [[-1 if number is None else number for number in window.word_ids] for window in windows]
            found.append([(self._padded(w.ids), self._padded(row, -1)) for w, row in zip(windows, words)])
        return found

    @cached_property
    def _after_blank(self) -> Backend:
        """The tokenizer with a blank before each text, for tokenizers whose words begin with their blank."""
        fields = json.loads(self.backend.to_str())
        parts = [fields["pre_tokenizer"] or {}]
        for part in parts:
            parts += part.get("pretokenizers", [])
            if part.get("type") == "ByteLevel":
                part["add_prefix_space"] = True
            if part.get("type") == "Metaspace":
                part["prepend_scheme"] = "always"
        backend = Backend.from_str(json.dumps(fields))
        backend.encode_special_tokens = True
        return backend

    def _padded(self, row: list[int], value: int | None = None) -> list[int]:
        missing = (self.pad_to or 0) - len(row)
        return row + [self.pad_id if value is None else value] * missing

    def cut(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the letters at which to cut each text so that every piece fits into `context_length` tokens.

        Special tokens count. A cut is at a blank if possible, otherwise between words; the last cut is the end of the
        text.

        Raises:
            DataError: If `context_length` leaves no token to a text.
        """
        room = self.context_length - self.backend.num_special_tokens_to_add(False)
        if room < 1:
            raise DataError(f"context_length {self.context_length} has no room for a text: raise it")
        encodings = self.encode_whole(texts)
        cuts = [_cuts(text, encoding, room) for text, encoding in zip(texts, encodings)]
        # A piece may need more tokens alone than within the text, for example where a word is cut.
        pieces = [(i, text[a:b]) for i, text in enumerate(texts) for a, b in pairwise([0, *cuts[i]])]
        alone = self._untruncated.encode_batch_fast([piece for _, piece in pieces], add_special_tokens=False)
        for i in sorted({i for (i, _), encoding in zip(pieces, alone) if len(encoding) > room}):
            cuts[i] = _cuts(texts[i], encodings[i], room, self.count)
        return cuts

    @cached_property
    def _untruncated(self) -> Backend:
        backend = Backend.from_str(self.backend.to_str())
        backend.no_truncation()
        backend.encode_special_tokens = True
        return backend

    pack = staticmethod(Tokens.pack)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def special(self) -> dict[str, int]:
        """The ids of the special tokens."""
        found = {token: self.backend.token_to_id(token) for token in sorted({*self._special, *self.roles.values()})}
        return {token: i for token, i in found.items() if i is not None}

    @property
    def mask_id(self) -> int | None:
        """The id of the mask token; None if there is no such token."""
        return self.id_of("mask_token")

    def id_of(self, role: str) -> int | None:
        """Return the id of the token with a role, such as "pad_token"; None if there is no such token."""
        token = self.roles.get(role)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def truncation_side(self) -> str:
        """The side from which a text that is too long loses tokens: "right" or "left"."""
        return (self.backend.truncation or {})["direction"]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the ids that it gives to texts."""
        padding = "" if self.pad_to is None else f" filled to {self.pad_to} with {self.pad_id}"
        return hashlib.blake2b((self.backend.to_str() + padding).encode(), digest_size=16).hexdigest()

    def settings(self, every_role: bool = True) -> dict[str, Any]:
        """Return what `tokenizer_config.json` must say of this tokenizer, in the words of transformers.

        Args:
            every_role: False for the settings without which reading tokenizer.json gives another tokenizer.
        """
        backend = self._original()
        by_name = {} if every_role else _all_roles(backend, {})
        said = {role: token for role, token in self.roles.items() if by_name.get(role) != token}
        side = {} if self.truncation_side == "right" else {"truncation_side": self.truncation_side}
        split = self.split_special_tokens
        return {**said, **side, **({} if split is None else {"split_special_tokens": split})}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` without truncation, because the context length belongs to the text encoder.

        Settings for which the file has no place are written to `tokenizer_config.json` next to it.
        """
        backend = self._original()
        backend.no_truncation()
        Path(path).write_text(backend.to_str(pretty=True), "utf-8")  # `save` of the library raises no OSError
        if settings := self.settings(every_role=False):
            write_json(Path(path).parent / CONFIG, {"tokenizer_class": PLAIN, **settings})

    def _original(self) -> Backend:
        """Return the backend with the flags of its special tokens."""
        return _flagged(self.backend, self._special)

    @cached_property
    def _reading_masks(self) -> Backend:
        added = self.backend.get_added_tokens_decoder().values()
        text = {token.content for token in added if token.special} - {self.roles.get("mask_token")}
        backend = _flagged(self.backend, text)
        backend.encode_special_tokens = True
        return backend

    def __getstate__(self) -> dict[str, Any]:
        names = ("context_length", "pad_to", "pad_id", "roles", "split_special_tokens")
        return {"backend": self._original().to_str(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**{**state, "backend": Backend.from_str(state["backend"])})


def _all_roles(backend: Backend, given: Mapping[str, str]) -> dict[str, str]:
    """Return the special tokens by role: the given ones, and for the other roles those with a usual name."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    roles = {}
    for role, names in ROLES.items():
        usual = (
            one for one in names if one in special or (role != "mask_token" and backend.token_to_id(one) is not None)
        )
        if token := given.get(role) or next(usual, None):
            roles[role] = token
    return roles


def _ends(backend: Backend) -> list[str]:
    """Return the tokens that are put around a text."""
    nothing, processor = backend.encode("", add_special_tokens=False), backend.post_processor
    return [] if processor is None else processor.process(nothing).tokens


def _flagged(backend: Backend, special: Collection[str]) -> Backend:
    """Return a copy of a backend, in which these of its added tokens are special, and no others."""
    text = backend.to_str()
    if any(token.special != (token.content in special) for token in backend.get_added_tokens_decoder().values()):
        fields = json.loads(text)
        for token in fields["added_tokens"]:
            token["special"] = token["content"] in special
        text = json.dumps(fields)
    return Backend.from_str(text)


def _cuts(text: str, encoding: Encoding, room: int, count: Callable[[str], int] | None = None) -> list[int]:
    """Return the letters at which to cut a text into pieces of at most `room` tokens, and the end of the text.

    Args:
        text: the text.
        encoding: the tokens of the whole text.
        room: most tokens of a piece.
        count: the number of tokens that a piece has alone; None where it has as many as within the text.
    """
    ends, words = [stop for _, stop in encoding.offsets], encoding.word_ids
    cuts: list[int] = []
    first = start = 0  # The token and the letter with which the next piece begins.

    def fits(stop: int) -> bool:
        return count is None or count(text[start:stop]) <= room

    while first < len(ends) and (len(ends) - first > room or not fits(len(text))):
        top = min(first + room, len(ends))
        candidates = range(top, first, -1)
        blanks = [i for i in candidates if text[ends[i - 1] : ends[i - 1] + 1].isspace() or i == len(ends)]
        between = [i for i in candidates if i == len(ends) or words[i] != words[i - 1]]
        best = next((i for i in chain(blanks, between, candidates) if fits(ends[i - 1])), None)
        if best is not None:
            first, stop = best, ends[best - 1]
        else:  # Even one token of the text is more than `room` tokens when it stands alone.
            stop = next((stop for stop in range(ends[first] - 1, start, -1) if fits(stop)), start + 1)
            first += stop >= ends[first]
        if start < stop < len(text):
            cuts.append(stop)
        start = max(start, stop)
    return [*cuts, len(text)]


def _wordpiece(tokens: list[str]) -> Backend:
    """Build BERT's lower-casing tokenizer from its vocabulary."""
    backend = _backend(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.add_special_tokens(list(SPECIAL))
    _bracket(backend)
    return backend


def _backend(model: Any) -> Backend:
    backend = Backend(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    backend.decoder = decoders.WordPiece()  # type: ignore[assignment]
    return backend


def _bracket(backend: Backend) -> None:
    """Put [CLS] before and [SEP] after every text."""
    ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )


def _train_wordpiece(captions: Iterable[str], vocab_size: int) -> Backend:
    backend = _backend(models.WordPiece(unk_token="[UNK]"))
    words = _words(backend, captions)
    alphabet = _alphabet(words)
    inside = {letter for word in words for letter in word[1:]}
    # The trainer would number "##a" and its like in the order of a hash map. As special tokens they have fixed ids.
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
    # The trainer breaks ties by the ids of the letters, which are the bytes in order: no hash map decides.
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
    """Return the letters that most words have, in the order of their code points."""
    letters: Counter[str] = Counter()
    for word, count in words.items():
        letters.update(dict.fromkeys(word, count))
    return sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:MAX_LETTERS])


def _has_room(vocab_size: int, needed: int, what: str) -> None:
    if vocab_size < needed:
        raise DataError(f"vocab_size {vocab_size} is too small: {needed} entries are special tokens and {what}")
