"""The tokenizer classes of transformers that build their steps from settings, whatever `tokenizer.json` says.

transformers 5 takes only the vocabulary from the file for these classes. Normalizer, splitting and the tokens around a
text come from the class and from `tokenizer_config.json`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from dualenc.utils.errors import DataError

# Roles of special tokens, in the order in which transformers adds tokens that a vocabulary lacks.
ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
START, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's special tokens.
# CLIP splits a text into English suffixes first, then into runs of letters, single digits and other runs.
SUFFIXES = "'s|'t|'re|'ve|'m|'ll|'d"
WORDS = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Vocabulary(NamedTuple):
    """The entries of a tokenizer, from `tokenizer.json` or from the files of older formats."""

    entries: Any  # ids by token; for a unigram model, pairs of a token and its score in the order of the ids
    merges: Sequence[tuple[str, str]] = ()  # of byte pairs
    charsmap: bytes | None = None  # of SentencePiece's normalizer
    post_processor: Any = None  # of the file


class TokenizerSettings:
    """Fields of `tokenizer_config.json`, with checked types."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    def flag(self, name: str, default: bool | None) -> Any:
        """Return a field that is true or false, or null where the default is None.

        Raises:
            DataError: If the field has another type.
        """
        value = self.fields.get(name, default)
        if not isinstance(value, bool) and value is not default:
            raise DataError(f"{name} is {value!r}, but it must be true or false")
        return value

    def side(self, name: str, default: str = "right") -> str:
        """Return a field that names a side.

        Raises:
            DataError: If it is neither left nor right.
        """
        value = self.fields.get(name, default)
        if value not in ("left", "right"):
            raise DataError(f"{name} is {value!r}, but it must be left or right")
        return value


Enclose = Callable[[Backend, Vocabulary, TokenizerSettings, Mapping[str, str]], None]


@dataclass(frozen=True)
class TokenizerClass:
    """A tokenizer class of transformers.

    Attributes:
        model: type of its model, as in `tokenizer.json`.
        roles: its special tokens by role, where the config does not name them.
        build: makes the steps before the model from vocabulary, settings and special tokens by role.
        enclose: sets the tokens around a text when all tokens are known, from backend, vocabulary, settings and roles.
        extra: its further special tokens, where the config does not name any.
    """

    model: str
    roles: Mapping[str, str]
    build: Callable[[Vocabulary, TokenizerSettings, Mapping[str, str]], Backend]
    enclose: Enclose
    extra: tuple[str, ...] = ()


def _steps(model: Any, normalizer: Any, pre_tokenizer: Any, decoder: Any) -> Backend:
    backend = Backend(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    return backend


def _wordpiece(vocabulary: Vocabulary, settings: TokenizerSettings, roles: Mapping[str, str]) -> Backend:
    """Build BERT's WordPiece (Devlin et al. 2019, section 3; Wu et al. 2016, section 4.1)."""
    if roles["unk_token"] not in vocabulary.entries:
        raise DataError(f"the vocabulary has no {roles['unk_token']}, which stands for unknown words")
    normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=settings.flag("tokenize_chinese_chars", True),
        strip_accents=settings.flag("strip_accents", None),
        lowercase=settings.flag("do_lower_case", True),
    )
    model = models.WordPiece(vocabulary.entries, unk_token=roles["unk_token"])
    return _steps(model, normalizer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##"))


def _byte_level(vocabulary: Vocabulary, settings: TokenizerSettings, roles: Mapping[str, str]) -> Backend:
    """Build GPT-2's byte-level BPE (Radford et al. 2019, section 2.2), which RoBERTa uses."""
    before = pre_tokenizers.ByteLevel(add_prefix_space=settings.flag("add_prefix_space", False))
    model = models.BPE(vocabulary.entries, list(vocabulary.merges))
    return _steps(model, None, before, decoders.ByteLevel())


def _pieces(entries: Any, unknown: int, normalizer: Any, before: Sequence[Any], scheme: str) -> Backend:
    model = models.Unigram(entries, unk_id=unknown, byte_fallback=False)
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    steps = pre_tokenizers.Sequence([*before, metaspace])
    return _steps(model, normalizer, steps, decoders.Metaspace(prepend_scheme=scheme))


def _scheme(settings: TokenizerSettings, otherwise: str = "never") -> str:
    return "always" if settings.flag("add_prefix_space", True) else otherwise


def _precompiled(vocabulary: Vocabulary) -> list[Any]:
    return [] if vocabulary.charsmap is None else [normalizers.Precompiled(vocabulary.charsmap)]


def _xlm_roberta(vocabulary: Vocabulary, settings: TokenizerSettings, roles: Mapping[str, str]) -> Backend:
    normalizer = next(iter(_precompiled(vocabulary)), None)
    before = [pre_tokenizers.WhitespaceSplit()]
    return _pieces(vocabulary.entries, 3, normalizer, before, _scheme(settings))


def _camembert(vocabulary: Vocabulary, settings: TokenizerSettings, roles: Mapping[str, str]) -> Backend:
    unknown = next((i for i, (token, _) in enumerate(vocabulary.entries) if token == roles["unk_token"]), 0)
    normalizer = next(iter(_precompiled(vocabulary)), None)
    before = [pre_tokenizers.WhitespaceSplit()]
    return _pieces(vocabulary.entries, unknown, normalizer, before, _scheme(settings))


def _albert(vocabulary: Vocabulary, settings: TokenizerSettings, roles: Mapping[str, str]) -> Backend:
    steps: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not settings.flag("keep_accents", False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if settings.flag("do_lower_case", True):
        steps.append(normalizers.Lowercase())
    normalizer = normalizers.Sequence([*steps, *_precompiled(vocabulary)])
    return _pieces(vocabulary.entries, 1, normalizer, [pre_tokenizers.WhitespaceSplit()], _scheme(settings))


def _deberta_v2(vocabulary: Vocabulary, settings: TokenizerSettings, roles: Mapping[str, str]) -> Backend:
    unknown = next((i for i, entry in enumerate(vocabulary.entries) if entry == (roles["unk_token"], 0)), 1)
    lower = [normalizers.Lowercase()] if settings.flag("do_lower_case", False) else []
    blanks = normalizers.Replace(Regex("\\s{2,}|[\\n\\r\\t]"), " ")
    normalizer = normalizers.Sequence([*lower, blanks, normalizers.NFC(), normalizers.Strip(left=False, right=True)])
    before = [pre_tokenizers.Punctuation("isolated")] if settings.flag("split_by_punct", False) else []
    return _pieces(vocabulary.entries, unknown, normalizer, before, _scheme(settings, "first"))


def clip_bpe(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    steps: Sequence[normalizers.Normalizer],
    words: str = f"{SUFFIXES}|{WORDS}",
    ends: tuple[str, str] = (START, END),
) -> Backend:
    """Build CLIP's tokenizer: byte-level BPE with marked ends of words, between two special tokens.

    Args:
        vocab: ids of the entries; an entry that ends a word has the suffix "</w>".
        merges: pairs of entries that are merged, in order.
        steps: normalizers that are applied first.
        words: regular expression of the words; the text between matches is dropped.
        ends: first and last token of every text, entries of the vocabulary.
    """
    backend = Backend(models.BPE(vocab, list(merges), unk_token=ends[1], end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence(list(steps))  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.Sequence([  # type: ignore[assignment]
        pre_tokenizers.Split(Regex(words), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.Sequence([  # type: ignore[assignment]
        decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1),
    ])  # fmt: skip
    opening, closing = ((token, vocab[token]) for token in ends)
    backend.post_processor = processors.RobertaProcessing(  # type: ignore[assignment]
        closing, opening, trim_offsets=False, add_prefix_space=False
    )
    backend.add_special_tokens(list(ends))
    return backend


def _clip(vocabulary: Vocabulary, settings: TokenizerSettings, roles: Mapping[str, str]) -> Backend:
    """Build CLIP's tokenizer with the cleaning of transformers."""
    ends = roles["bos_token"], roles["eos_token"]
    if missing := [token for token in ends if token not in vocabulary.entries]:
        raise DataError(f"the vocabulary has no {missing[0]}: it is not a vocabulary of CLIP")
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    return clip_bpe(vocabulary.entries, vocabulary.merges, steps, ends=ends)


def _between(opening: str, closing: str, pair: str) -> Enclose:
    """Return a function that puts the tokens of two roles around a text.

    Args:
        opening: role of the first token.
        closing: role of the last token.
        pair: template of a pair, with the names of the roles.
    """

    def enclose(
        backend: Backend, vocabulary: Vocabulary, settings: TokenizerSettings, roles: Mapping[str, str]
    ) -> None:
        first, last = roles[opening], roles[closing]
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=[first, "$A", last],
            pair=[part.format(first=first, last=last) for part in pair.split()],
            special_tokens=[(token, _id(backend, token)) for token in dict.fromkeys((first, last))],
        )

    return enclose


def _id(backend: Backend, token: str) -> int:
    number = backend.token_to_id(token)
    if number is None:
        raise DataError(f"the vocabulary has no {token}, which is put around each text")
    return number


def _roberta_ends(
    backend: Backend, vocabulary: Vocabulary, settings: TokenizerSettings, roles: Mapping[str, str]
) -> None:
    first, last = ((roles[role], _id(backend, roles[role])) for role in ("cls_token", "sep_token"))
    space, trim = settings.flag("add_prefix_space", False), settings.flag("trim_offsets", True)
    backend.post_processor = processors.RobertaProcessing(last, first, trim, space)  # type: ignore[assignment]


def _keep(backend: Backend, vocabulary: Vocabulary, settings: TokenizerSettings, roles: Mapping[str, str]) -> None:
    """Keep the tokens around a text that the backend was built with."""


def _named(*tokens: str) -> dict[str, str]:
    return {name: token for name, token in zip(ORDER, tokens) if token}


_SEGMENTS = "{first}:0 $A:0 {last}:0 $B:1 {last}:1"
_ONE_SEGMENT = "{first} $A {last} {last} $B {last}"
_BRACKETS = _between("cls_token", "sep_token", _SEGMENTS)
_TAGS = _between("bos_token", "eos_token", _ONE_SEGMENT)
_BERT = TokenizerClass("WordPiece", _named("", "", "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"), _wordpiece, _BRACKETS)


def _albert_ends(
    backend: Backend, vocabulary: Vocabulary, settings: TokenizerSettings, roles: Mapping[str, str]
) -> None:
    """Keep what the file puts around a text, and otherwise take [CLS] and [SEP]."""
    _BRACKETS(backend, vocabulary, settings, roles)
    if vocabulary.post_processor is not None:
        backend.post_processor = vocabulary.post_processor


_ANGLES = _named("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>")
_SQUARES = _named("[CLS]", "[SEP]", "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")

CLASSES = {
    "BertTokenizer": _BERT,
    "DistilBertTokenizer": _BERT,
    "ElectraTokenizer": _BERT,
    "RobertaTokenizer": TokenizerClass("BPE", _ANGLES, _byte_level, _roberta_ends),
    "XLMRobertaTokenizer": TokenizerClass("Unigram", _ANGLES, _xlm_roberta, _TAGS),
    "CamembertTokenizer": TokenizerClass(
        "Unigram", _ANGLES, _camembert, _TAGS, ("<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED")
    ),
    "AlbertTokenizer": TokenizerClass(
        "Unigram", {**_SQUARES, "unk_token": "<unk>", "pad_token": "<pad>"}, _albert, _albert_ends
    ),
    "DebertaV2Tokenizer": TokenizerClass("Unigram", _SQUARES, _deberta_v2, _BRACKETS),
    "CLIPTokenizer": TokenizerClass("BPE", _named(START, END, END, "", END), _clip, _keep),
}
# model_type of a config.json -> the class that transformers takes if no file names one.
BY_MODEL = {
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "electra": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "albert": "AlbertTokenizer",
    "clip": "CLIPTokenizer",
}
ALWAYS_PLAIN = ("modernbert", "siglip2")  # transformers reads tokenizer.json unchanged, whatever class is named
PLAIN = "PreTrainedTokenizerFast"  # the class that reads tokenizer.json unchanged
