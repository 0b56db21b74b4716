"""Tokenizers of text checkpoints: the files that there are, and those that `transformers` looks for."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dualenc.data.shards import DataError
from dualenc.data.tokenizer import Tokenizer
from dualenc.folders import ModelError, read_json
from dualenc.models.text import TextConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
# What transformers calls the special tokens, and the tokens themselves, the likeliest first.
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
    """Tokens of the longest text: what the tokenizer's config says, but no more than the encoder takes."""
    length = _about(folder).get("model_max_length")
    return min(int(length), context_length) if isinstance(length, int | float) and length > 0 else context_length


def padding_token(folder: Path) -> int | None:
    """The id of the token that a tokenizer pads with, where its files say so."""
    token = _about(folder).get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str) or not (folder / "tokenizer.json").is_file():
        return None
    return _backend(folder / "tokenizer.json").token_to_id(token)


def read_tokenizer(folder: Path, text: TextConfig, length: int, lowercase: bool = False) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        folder: with tokenizer.json; or BERT's vocab.txt; or RoBERTa's vocab.json and merges.txt.
        text: the encoder's architecture.
        length: longest text in tokens.
        lowercase: texts are lower-cased before all else.

    Raises:
        ModelError: there is none of these files, or they cannot be read.
    """
    if (folder / "tokenizer.json").is_file():
        backend = _backend(folder / "tokenizer.json")
    elif (folder / "vocab.txt").is_file():
        backend = _wordpiece(folder)
    elif all((folder / name).is_file() for name in ("vocab.json", "merges.txt")) and text.position_offset:
        backend = _byte_pairs(folder)
    else:
        raise ModelError(
            f"{folder} holds no tokenizer.json: save one there with transformers "
            "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )
    if lowercase:
        steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer is not None else [])]
        backend.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    pad_to = None if text.pad_to is None else min(text.pad_to, length)
    return Tokenizer(backend, length, pad_to, text.pad_id)


def _about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            fields = read_json(folder / name)
            found |= fields if isinstance(fields, dict) else {}
    return found


def _backend(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path} is no tokenizer that the tokenizers library reads ({error})") from None


def _wordpiece(folder: Path) -> Backend:
    """BERT's, whose vocabulary does not say whether it is of small letters: the config does."""
    about = _about(folder)
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


def _byte_pairs(folder: Path) -> Backend:
    """RoBERTa's: pairs of bytes as GPT-2 has them (Radford et al. 2019, section 2.2), between <s> and </s>."""
    vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    space = bool(_about(folder).get("add_prefix_space", False))
    try:
        backend = Backend(models.BPE.from_file(vocab, merges))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{vocab} and merges.txt cannot be read ({error})") from None
    known = backend.get_vocab()
    if missing := [token for token in ("<s>", "</s>") if token not in known]:
        raise ModelError(f"{vocab} has no {missing[0]}: it is no vocabulary of RoBERTa's")
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


def tokenizer_config(tokenizer: Tokenizer, text: TextConfig) -> dict[str, Any]:
    """What `tokenizer_config.json` says, so that transformers' AutoTokenizer reads tokenizer.json as it is.

    Args:
        tokenizer: the tokenizer.
        text: the architecture that it is for.
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
    if "eos_token" in roles:  # CLIP has none of its own; what it is does not matter to a causal tower
        roles.setdefault("pad_token", roles["eos_token"])
    inputs = ["input_ids", *(["token_type_ids"] if text.types > 1 else []), "attention_mask"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.context_length,
        "model_input_names": inputs,
        "clean_up_tokenization_spaces": False,
        **roles,
    }
