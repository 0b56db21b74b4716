"""The files of a tokenizer, read as `transformers` reads them: vocabulary, settings, added tokens, roles of tokens."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from dualenc.data.text.tokenizer_classes import (
    ALWAYS_PLAIN,
    BY_MODEL,
    CLASSES,
    ORDER,
    PLAIN,
    TokenizerClass,
    TokenizerSettings,
    Vocabulary,
)
from dualenc.utils.decoding import read_text
from dualenc.utils.errors import DataError, ModelError
from dualenc.utils.files import read_json

# Files with a vocabulary, the preferred one first. Others than tokenizer.json are of older formats.
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")
CONFIG = "tokenizer_config.json"
# Roles of special tokens -> the tokens that may have the role if no file says it, the likeliest first.
ROLES = {
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "pad_token": ("[PAD]", "<pad>"),
    "mask_token": ("[MASK]", "<mask>"),
    "bos_token": ("<|startoftext|>", "<s>"),
    "eos_token": ("<|endoftext|>", "</s>"),
}
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


class TokenizerFiles(NamedTuple):
    """A tokenizer as its files describe it.

    Attributes:
        backend: the tokenizer. It truncates only if long texts lose their beginning, to one token from the left.
        roles: its special tokens by role, as far as a file or its class names them.
        split_special_tokens: see `Tokenizer`.
    """

    backend: Backend
    roles: dict[str, str]
    split_special_tokens: bool | None


class _Special(NamedTuple):
    """Tokens that the config files name."""

    added: dict[int, AddedToken]  # by id
    roles: dict[str, AddedToken]
    extra: list[AddedToken]  # further special tokens
    where: str  # what names the ids


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the fields of `tokenizer_config.json`, and those of an older file that transformers merges into them."""
    fields = _object(folder / CONFIG)
    if "added_tokens_decoder" not in fields:
        fields |= _object(folder / "special_tokens_map.json")
    return fields


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """Read the tokenizer of a vocabulary file, with the settings in the files of the same folder.

    Args:
        path: tokenizer.json, vocab.txt, or vocab.json, next to which is merges.txt. A file with another name is read
            as tokenizer.json or, if it ends with `.txt`, as vocab.txt, and the files of its folder are not read.

    Raises:
        DataError: If a file cannot be read, or the files contradict each other; the message names file and key.
    """
    folder = path.parent if path.name in VOCABULARIES else None
    fields = {} if folder is None else read_tokenizer_config(folder)
    text = read_text(path)
    try:
        settings = TokenizerSettings(fields)
        side, split = settings.side("truncation_side"), settings.flag("split_special_tokens", None)
        whole = None if path.name == "vocab.json" or path.suffix == ".txt" else Backend.from_str(text)
        kind, vocabulary = _plan(path, text, whole, fields)
        special = _special(folder, fields, json.loads(text)["added_tokens"] if whole is not None else [])
        roles = dict(kind.roles if kind else {}) | {role: token.content for role, token in special.roles.items()}
        backend = kind.build(vocabulary, settings, roles) if kind and vocabulary else whole
        assert backend is not None
        _add(backend, special, roles, kind)
        if kind and vocabulary:
            kind.enclose(backend, vocabulary, settings, roles)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # The library raises plain Exception.
        raise DataError(f"{path} is not a tokenizer that the tokenizers library can read ({error})") from None
    if whole is not None and "truncation_side" not in fields and whole.truncation:
        side = whole.truncation["direction"]
    backend.no_padding()
    backend.no_truncation()
    if side == "left":
        backend.enable_truncation(1, direction=side)
    return TokenizerFiles(backend, {role: one for role, one in roles.items() if _has(backend, one)}, split)


def _object(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file; none if the file is missing."""
    if not path.is_file():
        return {}
    try:
        fields = read_json(path)
    except ModelError as error:
        raise DataError(str(error)) from None
    if not isinstance(fields, dict):
        raise DataError(f"{path} must hold an object, in braces")
    return fields


def _has(backend: Backend, token: str) -> bool:
    return backend.token_to_id(token) is not None


def _plan(
    path: Path, text: str, whole: Backend | None, fields: dict[str, Any]
) -> tuple[TokenizerClass | None, Vocabulary | None]:
    """Return the class that transformers makes of the files, and its vocabulary; no class for tokenizer.json itself.

    Args:
        path: the vocabulary file.
        text: its content.
        whole: the tokenizer of the file, if it is a tokenizer.json.
        fields: fields of `tokenizer_config.json`. If nothing says whether texts are converted to lower case, the
            capital letters of vocab.txt say it.
    """
    model = _object(path.parent / "config.json") if path.name in VOCABULARIES else {}
    family = model.get("model_type")
    name = fields.get("tokenizer_class") or model.get("tokenizer_class") or BY_MODEL.get(str(family)) or PLAIN
    name = PLAIN if family in ALWAYS_PLAIN else str(name)
    kind = CLASSES.get(name.removesuffix("Fast"))
    if whole is not None:
        return kind, None if kind is None else _taken(text, whole, kind, name)
    if path.name == "vocab.json":
        vocabulary = _read_bpe(path)
        usual, wanted = CLASSES["RobertaTokenizer" if "<s>" in vocabulary.entries else "CLIPTokenizer"], "BPE"
    else:  # Only "\n" ends an entry, because U+2028 and its like are entries.
        tokens = text.removesuffix("\n").split("\n")
        vocabulary = Vocabulary({token: i for i, token in enumerate(tokens)})
        usual, wanted = CLASSES["BertTokenizer"], "WordPiece"
        if "do_lower_case" not in fields and any(one != one.lower() for one in tokens if not one.startswith("[")):
            if family is not None:
                raise DataError(
                    f"some entries have capital letters, but without do_lower_case in {CONFIG} transformers converts "
                    'texts to lower case: write {"do_lower_case": false} there'
                )
            fields["do_lower_case"] = False
    if (kind is None and name != PLAIN) or (kind or usual).model != wanted:
        raise DataError(
            f"tokenizer_class {name} cannot be read from this file: save a tokenizer.json with transformers "
            "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )
    return kind or usual, vocabulary


def _read_bpe(path: Path) -> Vocabulary:
    """Read vocab.json and merges.txt."""
    try:
        return Vocabulary(*models.BPE.read_file(str(path), str(path.parent / "merges.txt")))
    except Exception as error:  # The library raises plain Exception.
        raise DataError(f"with merges.txt it cannot be read ({error})") from None


def _taken(text: str, whole: Backend, kind: TokenizerClass, name: str) -> Vocabulary:
    """Return the parts of a tokenizer.json that a class keeps.

    Raises:
        DataError: If the file has another model than the class.
    """
    if (found := type(whole.model).__name__) != kind.model:
        raise DataError(
            f"its model is {found}, but transformers reads it with the class {name}, whose model is {kind.model}: "
            f'write {{"tokenizer_class": "{PLAIN}"}} into {CONFIG} to use the file unchanged'
        )
    fields = json.loads(text)
    entries, merges = fields["model"]["vocab"], fields["model"].get("merges", [])
    normalizer = fields["normalizer"] or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    charsmaps = (base64.b64decode(one["precompiled_charsmap"]) for one in steps if one.get("type") == "Precompiled")
    return Vocabulary(
        entries if isinstance(entries, dict) else [(token, score) for token, score in entries],
        [(first, second) for first, second in (one.split(" ") if isinstance(one, str) else one for one in merges)],
        next(charsmaps, None),
        whole.post_processor,
    )


def _token(value: Any, special: bool = True) -> AddedToken | None:
    """Return a token that a config file gives as a string or with its flags; None if it gives none.

    Raises:
        DataError: If the value is something else.
    """
    if isinstance(value, str):
        return AddedToken(value, special=special)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags: dict[str, Any] = {name: value[name] for name in FLAGS if name in value}
        return AddedToken(**{"special": special, **flags})
    if value is not None:
        raise DataError(f"a special token must be a string or an object with content, not {value!r}")
    return None


def _special(folder: Path | None, fields: Mapping[str, Any], in_file: list[dict[str, Any]]) -> _Special:
    """Return the tokens that the config files name, and those of tokenizer.json.

    Args:
        folder: folder of `added_tokens.json`; None if there is none.
        fields: fields of `tokenizer_config.json`. Its `added_tokens_decoder` stands for the tokens of all other files.
        in_file: the tokens that tokenizer.json adds to its vocabulary.
    """
    roles = {role: token for role in ROLES if (token := _token(fields.get(role))) is not None}
    named = fields.get("extra_special_tokens") or fields.get("additional_special_tokens") or []
    others = {key: one for key, one in fields.items() if key.endswith("_token") and key not in ROLES}
    values = [one for one in others.values() if isinstance(one, str | dict)]
    values += named.values() if isinstance(named, dict) else named if isinstance(named, list) else [named]
    extra = [token for one in values if (token := _token(one)) is not None]
    where, added = CONFIG, {}
    if "added_tokens_decoder" in fields:
        given = fields["added_tokens_decoder"] or {}
    else:
        special = {token.content for token in [*roles.values(), *extra]}
        where, older = (
            "added_tokens.json or tokenizer.json",
            {} if folder is None else _object(folder / "added_tokens.json"),
        )
        given = {
            i: {"content": one, "normalized": one not in special, "special": one in special} for one, i in older.items()
        }
        given |= {token["id"]: token for token in in_file}
    for number, one in given.items():
        if not str(number).isdigit() or (token := _token(one, special=False)) is None:
            raise DataError(f"{where}: the added token {one!r} must have a number as its id, not {number!r}")
        added[int(number)] = token
    return _Special(added, roles, extra, where)


def _add(backend: Backend, special: _Special, roles: Mapping[str, str], kind: TokenizerClass | None) -> None:
    """Add tokens to a vocabulary in the order of transformers: those with ids, those with roles, further ones.

    Raises:
        DataError: If a token gets another id than the one that the files give it.
    """
    known = {_flags(token) for token in backend.get_added_tokens_decoder().values()}
    new = [token for _, token in sorted(special.added.items()) if _flags(token) not in known]
    contents = {flags[0] for flags in known} | {token.content for token in new}
    extra = special.extra or [AddedToken(one, special=True) for one in (kind.extra if kind else ())]
    by_role = [special.roles.get(role) or AddedToken(roles[role], special=True) for role in ORDER if role in roles]
    for token in [*by_role, *extra]:
        if token.content not in contents:
            new.append(token)
            contents.add(token.content)
    for token in new:
        token.special = token.special or token.content in roles.values()
    # A class names tokens that the vocabulary may lack. They would have ids after its end, which the encoder lacks.
    said = {token.content for token in [*special.added.values(), *special.roles.values()]}
    unsaid = {one for one in roles.values() if one not in said}
    missing = [token for token in new if not _has(backend, token.content)]
    if all(token.content in unsaid for token in missing):
        new = [token for token in new if token not in missing]
    backend.add_tokens(new)
    for number, token in special.added.items():
        if (found := backend.token_to_id(token.content)) != number:
            raise DataError(
                f"{special.where} gives the added token {token.content!r} the id {number}, but with this vocabulary "
                f"its id is {found}"
            )


def _flags(token: AddedToken) -> tuple[Any, ...]:
    return tuple(getattr(token, name) for name in FLAGS)
