"""Captions to packed tokens, by the Hugging Face `tokenizers` library."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from dualenc.data.shards import DataError
from dualenc.tokens import Tokens

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_LETTERS = 1000  # rarer characters are unknown to a trained vocabulary


class Tokenizer:
    """Turns texts into `Tokens`.

    Args:
        backend: a tokenizer of the `tokenizers` library with its post-processor.
        context_length: longest text in tokens; what is longer loses its end, but keeps its closing token.
    """

    def __init__(self, backend: Backend, context_length: int) -> None:
        self.backend = Backend.from_str(backend.to_str())  # truncation below must not reach the caller's
        self.context_length = context_length
        self.backend.no_padding()
        self.backend.enable_truncation(context_length)
        self.backend.encode_special_tokens = True  # "[SEP]" in a caption is four pieces of text, never the token

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], context_length: int) -> "Tokenizer":
        """Reads `tokenizer.json` or BERT's `vocab.txt`, or the folder that holds one of them.

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
                return cls(_wordpiece(path.read_text("utf-8").removesuffix("\n").split("\n")), context_length)
            return cls(Backend.from_file(str(path)), context_length)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path} is no tokenizer that the tokenizers library reads ({error})") from None

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int) -> "Tokenizer":
        """Learns a lower-casing WordPiece vocabulary of at most `vocab_size` entries (Wu et al. 2016, section 4.1).

        The same captions give the same vocabulary, whatever their order.

        Raises:
            DataError: `vocab_size` has no room for the special tokens and the letters.
        """
        backend = _backend(models.WordPiece(unk_token="[UNK]"), lowercase=True)
        words: Counter[str] = Counter()
        for caption in captions:
            text = backend.normalizer.normalize_str(caption)  # type: ignore[union-attr]
            words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))  # type: ignore[union-attr]
        letters: Counter[str] = Counter()
        for word, count in words.items():
            letters.update(dict.fromkeys(word, count))
        alphabet = sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:MAX_LETTERS])
        inside = {letter for word in words for letter in word[1:]}
        # The trainer would number the pieces "##a" in a hash map's order; given beforehand, ids and ties are fixed.
        given = [*SPECIAL, *alphabet, *(f"##{letter}" for letter in alphabet if letter in inside)]
        if vocab_size < len(given):
            raise DataError(
                f"vocab_size {vocab_size} is too small: {len(given)} entries are special tokens and single letters"
            )
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=given, show_progress=False, limit_alphabet=len(alphabet)
        )
        backend.train_from_iterator((word for word in sorted(words) for _ in range(words[word])), trainer)
        vocab = backend.get_vocab(with_added_tokens=True)
        return cls(_wordpiece(sorted(vocab, key=vocab.__getitem__)), context_length)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Packs B texts; an empty one is its opening and closing tokens."""
        encoded = self.backend.encode_batch_fast(list(texts))
        return Tokens.pack([item.ids for item in encoded])

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, without this run's truncation: the length belongs to the text encoder."""
        plain = Backend.from_str(self.backend.to_str())
        plain.no_truncation()
        plain.encode_special_tokens = False
        plain.save(os.fspath(path))

    def __getstate__(self) -> dict[str, Any]:
        return {"json": self.backend.to_str(), "context_length": self.context_length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Backend.from_str(state["json"]), state["context_length"])


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
