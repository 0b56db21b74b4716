"""Tokenizers of text checkpoints: reading their files, and writing those that `transformers` looks for."""

from pathlib import Path
from typing import Any

from tokenizers import normalizers

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.data.text.tokenizer_classes import PLAIN
from dualenc.data.text.tokenizer_files import VOCABULARIES, read_tokenizer_config
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.errors import DataError, ModelError

TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def longest(folder: Path, context_length: int) -> int:
    """Return the length of the longest text in tokens: the tokenizer's limit, and at most that of the encoder."""
    fields = _config(folder)
    length = fields.get("model_max_length", fields.get("max_len"))
    return min(int(length), context_length) if isinstance(length, int | float) and length > 0 else context_length


def padding_token(folder: Path) -> int | None:
    """Return the id of a tokenizer's padding token, or None if its config files do not name one."""
    if _config(folder).get("pad_token") is None or not (folder / "tokenizer.json").is_file():
        return None
    return _read(folder, 1).id_of("pad_token")


def read_tokenizer(folder: Path, text: TextConfig, length: int, lowercase: bool = False) -> Tokenizer:
    """Read the tokenizer of a checkpoint as transformers does, with the settings of `tokenizer_config.json`.

    Args:
        folder: folder with tokenizer.json; or BERT's vocab.txt; or vocab.json and merges.txt of RoBERTa or CLIP.
        text: architecture of the encoder.
        length: length of the longest text in tokens.
        lowercase: True to convert texts to lower case before all other steps.

    Raises:
        ModelError: If the folder does not have these files, they cannot be read, or they contradict each other.
    """
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ModelError(
            f"{folder} has no tokenizer.json: save one there with transformers "
            "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )
    if text.pad_to is not None and (side := _config(folder).get("padding_side", "right")) != "right":
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: padding_side {side!r} is not supported, because the encoder sees its "
            "padding, which dualenc writes on the right"
        )
    tokenizer = _read(folder, length)
    if lowercase:
        tokenizer = normalized_first(tokenizer, [normalizers.Lowercase()])
    return padded_for(tokenizer, text)


def normalized_first(tokenizer: Tokenizer, steps: list[normalizers.Normalizer]) -> Tokenizer:
    """Return a tokenizer with steps that normalize a text before all others."""
    changed = tokenizer.replace()
    own = changed.backend.normalizer
    changed.backend.normalizer = normalizers.Sequence([*steps, *([own] if own is not None else [])])  # type: ignore[assignment]
    return changed


def padded_for(tokenizer: Tokenizer, text: TextConfig) -> Tokenizer:
    """Return a tokenizer that pads texts if the encoder attends to padding."""
    pad_to = None if text.pad_to is None else min(text.pad_to, tokenizer.context_length)
    if (tokenizer.pad_to, tokenizer.pad_id) == (pad_to, text.pad_id):
        return tokenizer  # A copy of a large vocabulary takes a second.
    return tokenizer.replace(pad_to=pad_to, pad_id=text.pad_id)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_tokenizer_config(folder)
    except DataError as error:
        raise ModelError(str(error)) from None


def _read(folder: Path, length: int) -> Tokenizer:
    try:
        return Tokenizer.from_file(folder, length)
    except DataError as error:
        raise ModelError(str(error)) from None


def tokenizer_config(tokenizer: Tokenizer, text: TextConfig) -> dict[str, Any]:
    """Return the fields of a `tokenizer_config.json` with which AutoTokenizer reads tokenizer.json unchanged.

    Args:
        tokenizer: the tokenizer.
        text: architecture of the encoder.
    """
    settings = tokenizer.settings()
    if text.pad_to is not None and (token := tokenizer.backend.id_to_token(text.pad_id)) is not None:
        settings["pad_token"] = token
    # CLIP has no padding token. Any token serves, since a causal tower never attends to padding after the text.
    if "eos_token" in settings:
        settings.setdefault("pad_token", settings["eos_token"])
    inputs = ["input_ids", *(["token_type_ids"] if text.types > 1 else []), "attention_mask"]
    return {
        "tokenizer_class": PLAIN,
        "model_max_length": tokenizer.context_length,
        "model_input_names": inputs,
        "clean_up_tokenization_spaces": False,
        **settings,
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
