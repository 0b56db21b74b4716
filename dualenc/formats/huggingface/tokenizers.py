"""Tokenizers of text checkpoints: reading their files, and writing those that `transformers` looks for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.decoding import read_text
from dualenc.utils.errors import DataError, ModelError
from dualenc.utils.files import read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
START, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's special tokens.
# CLIP splits a text into English suffixes first, then into runs of letters, single digits and other runs.
SUFFIXES = "'s|'t|'re|'ve|'m|'ll|'d"
WORDS = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# Roles of special tokens in transformers -> the tokens that may have the role, the likeliest first.
ROLES = {
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "pad_token": ("[PAD]", "<pad>"),
    "mask_token": ("[MASK]", "<mask>"),
    "bos_token": ("<|startoftext|>", "<s>"),
    "eos_token": ("<|endoftext|>", "</s>"),
}


def longest(folder: Path, context_length: int) -> int:
    """Return the length of the longest text in tokens: the tokenizer's limit, and at most that of the encoder."""
    length = read_tokenizer_config(folder).get("model_max_length")
    return min(int(length), context_length) if isinstance(length, int | float) and length > 0 else context_length


def padding_token(folder: Path) -> int | None:
    """Return the id of a tokenizer's padding token, or None if its files do not name one."""
    token = _content(read_tokenizer_config(folder).get("pad_token"))
    if not isinstance(token, str) or not (folder / "tokenizer.json").is_file():
        return None
    return _read_backend(folder / "tokenizer.json").token_to_id(token)


def read_tokenizer(folder: Path, text: TextConfig, length: int, lowercase: bool = False) -> Tokenizer:
    """Read the tokenizer of a checkpoint.

    Args:
        folder: folder with tokenizer.json; or BERT's vocab.txt; or vocab.json and merges.txt of RoBERTa or CLIP.
        text: architecture of the encoder.
        length: length of the longest text in tokens.
        lowercase: True to convert texts to lower case before all other steps.

    Raises:
        ModelError: If the folder does not have these files, or they cannot be read.
    """
    if (folder / "tokenizer.json").is_file():
        backend = _read_backend(folder / "tokenizer.json")
    elif (folder / "vocab.txt").is_file():
        backend = _read_wordpiece(folder)
    elif all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        backend = _read_roberta_bpe(folder) if text.position_offset else _read_clip_bpe(folder)
    else:
        raise ModelError(
            f"{folder} has no tokenizer.json: save one there with transformers "
            "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )
    if lowercase:
        steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer is not None else [])]
        backend.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    return tokenizer_of(backend, text, length)


def tokenizer_of(backend: Backend, text: TextConfig, length: int) -> Tokenizer:
    """Return a backend as the tokenizer of an encoder, padding texts if the encoder attends to padding."""
    pad_to = None if text.pad_to is None else min(text.pad_to, length)
    return Tokenizer(backend, length, pad_to, text.pad_id)


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the merged fields of a tokenizer's config files."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # The later file takes precedence.
        if (folder / name).is_file():
            fields = read_json(folder / name)
            found |= fields if isinstance(fields, dict) else {}
    return found


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _read_backend(path: Path) -> Backend:
    try:
        return Backend.from_str(read_text(path))
    except Exception as error:  # The library raises plain Exception.
        raise ModelError(f"{path} cannot be read by the tokenizers library ({error})") from None


def _read_wordpiece(folder: Path) -> Backend:
    """Read BERT's WordPiece tokenizer; only the config says if it converts texts to lower case."""
    about = read_tokenizer_config(folder)
    try:
        backend = Tokenizer.from_file(folder / "vocab.txt", 1).backend
    except DataError as error:
        raise ModelError(str(error)) from None
    backend.no_truncation()
    if "do_lower_case" in about:
        backend.normalizer = normalizers.BertNormalizer(  # type: ignore[assignment]
            lowercase=bool(about["do_lower_case"]),
            strip_accents=about.get("strip_accents"),
            handle_chinese_chars=bool(about.get("tokenize_chinese_chars", True)),
        )
    return backend


def _read_roberta_bpe(folder: Path) -> Backend:
    """Read RoBERTa's tokenizer: GPT-2's byte-level BPE (Radford et al. 2019, section 2.2), between <s> and </s>."""
    vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    space = bool(read_tokenizer_config(folder).get("add_prefix_space", False))
    try:
        backend = Backend(models.BPE.from_file(vocab, merges))
    except Exception as error:  # The library raises plain Exception.
        raise ModelError(f"{vocab} and merges.txt cannot be read ({error})") from None
    known = backend.get_vocab()
    if missing := [token for token in ("<s>", "</s>") if token not in known]:
        raise ModelError(f"{vocab} has no {missing[0]}: it is not a vocabulary of RoBERTa")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.post_processor = processors.RobertaProcessing(  # type: ignore[assignment]
        ("</s>", known["</s>"]), ("<s>", known["<s>"]), add_prefix_space=space
    )
    special = [token for token in ("<s>", "</s>", "<unk>", "<pad>") if token in known]
    backend.add_special_tokens(special)
    if "<mask>" in known:
        from tokenizers import AddedToken

        backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return backend


def clip_bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
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
    backend = Backend(models.BPE(vocab, merges, unk_token=ends[1], end_of_word_suffix="</w>"))
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


def _read_clip_bpe(folder: Path) -> Backend:
    """Read CLIP's tokenizer, with the cleaning and splitting of transformers."""
    about, path = read_tokenizer_config(folder), folder / "vocab.json"
    ends = tuple(_content(about.get(role)) or usual for role, usual in (("bos_token", START), ("eos_token", END)))
    try:
        vocab, merges = models.BPE.read_file(str(path), str(folder / "merges.txt"))
    except Exception as error:  # The library raises plain Exception.
        raise ModelError(f"{path} and merges.txt cannot be read ({error})") from None
    if missing := [token for token in ends if token not in vocab]:
        raise ModelError(
            f"{path} has no {missing[0]}: it is not a vocabulary of CLIP, and the encoder is not a RoBERTa"
        )
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    try:
        return clip_bpe(vocab, merges, steps, ends=(ends[0], ends[1]))
    except Exception as error:  # A merge may name a token that is not in the vocabulary.
        raise ModelError(f"{path} and merges.txt cannot be read ({error})") from None


def tokenizer_config(tokenizer: Tokenizer, text: TextConfig) -> dict[str, Any]:
    """Return the fields of a `tokenizer_config.json` with which AutoTokenizer reads tokenizer.json unchanged.

    Args:
        tokenizer: the tokenizer.
        text: architecture of the encoder.
    """
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    special = tokenizer.special
    roles = {}
    for role, tokens in ROLES.items():
        found = [token for token in tokens if token in special or (role != "mask_token" and token in vocab)]
        if found:
            roles[role] = found[0]
    if text.pad_to is not None and (token := tokenizer.backend.id_to_token(text.pad_id)) is not None:
        roles["pad_token"] = token
    # CLIP has no padding token. Any token serves, since a causal tower never attends to padding after the text.
    if "eos_token" in roles:
        roles.setdefault("pad_token", roles["eos_token"])
    inputs = ["input_ids", *(["token_type_ids"] if text.types > 1 else []), "attention_mask"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.context_length,
        "model_input_names": inputs,
        "clean_up_tokenization_spaces": False,
        **roles,
    }


def check_closing(family: str, eos_id: int | None, tokenizer: Tokenizer, text: TextConfig, where: str) -> None:
    """Refuse a text tower that transformers would pool at another token than the one that closes a text.

    Args:
        family: family of the text tower.
        eos_id: `eos_token_id` of its config.
        tokenizer: its tokenizer.
        text: its architecture.
        where: model or file, for the error.

    Raises:
        ModelError: If transformers takes the largest id for the closing token, as in the first configs of CLIP.
    """
    ids = tokenizer.backend.encode("").ids
    if family == "clip_text_model" and eos_id == 2 and ids and ids[-1] < text.vocab_size - 1:
        raise ModelError(
            f"{where}: with eos_token_id 2 transformers pools a causal text tower at the largest id of a text, as the "
            f"first configs of CLIP mean it, and not at the token that closes a text, whose id is {ids[-1]}"
        )
