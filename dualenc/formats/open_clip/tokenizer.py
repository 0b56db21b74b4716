"""CLIP's byte pairs and open_clip's cleaning of texts, as steps of the `tokenizers` library.

open_clip cleans with `ftfy.fix_text` and a double `html.unescape`. The steps here follow ftfy's order: the HTML
entities of `ENTITIES` by name or number, however often their "&" is escaped; full-width ASCII; curly quotes; control
characters; NFC. White space and, with Python's final sigma, case come last. The following is not done, because no step
can do it or because captions do not need it:

- repair of mojibake ("cafÃ©"), which ftfy guesses at, and of Windows-1252 written as C1 controls;
- other entities, and entities without their ";"; where a text has a "<", ftfy leaves entities to `html.unescape`, which
  does not make curly quotes straight and does not undo an escape of more than two levels;
- ligatures and digraphs of Latin letters; half-width letters;
- terminal escapes, which lose the escape character only;
- letters that are newer than the Unicode version of one of the libraries.
"""

import gzip
import importlib.util
import string
from collections.abc import Mapping
from functools import cache
from html.entities import html5
from pathlib import Path
from typing import Any, Literal, get_args

from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as Backend

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.download import hub_folder
from dualenc.formats.huggingface.tokenizers import (
    END,
    START,
    SUFFIXES,
    TOKENIZER_FILES,
    WORDS,
    clip_bpe,
    padding_token,
    read_tokenizer,
    read_tokenizer_config,
    tokenizer_config,
    tokenizer_of,
)
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.errors import ModelError

Clean = Literal["lower", "whitespace", "canonicalize"]
CLEANS = get_args(Clean)
QUOTES = dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
ENTITIES = "\"'<>–—…‘’“”éèêàáâäãåçíîïñóôöøúüßÀÁÂÄÅÇÈÉÊÍÑÓÔÖØÜ"  # noqa: RUF001
FULL_WIDTH = range(0xFF01, 0xFF5F)  # the printing characters of ASCII, in the same order
CONTROLS = "[\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]+"
# Python's lower() of a sigma that ends a word (Unicode 15.0, table 3-17); the library's step knows no context.
FINAL_SIGMA = r"(?<=\p{Cased}\p{Case_Ignorable}{0,3})Σ(?!\p{Case_Ignorable}*\p{Cased})"
PROBES = (
    "The QUICK brown fox isn't 1234567890 !?#&(){}<>; it's (jumping) over_the lazy-dog's back...",
    "Ünïcödé naïve Straße 漢字とかな 한국어 русский 👍🏽",
    "  two  blanks\tand\nlines  ",
    "",
)


def clip_backend(clean: Clean = "lower") -> Backend:
    """CLIP's tokenizer (Radford et al. 2021, section 2.4), as open_clip's SimpleTokenizer: ids are the same.

    But for what this module does not clean; and for "<start_of_text>" and "<end_of_text>" in a caption, of which
    SimpleTokenizer makes the tokens that open and close a text, and this one what they are made of, as of
    "<|endoftext|>".

    Args:
        clean: what is done to a text before.

    Raises:
        ModelError: open_clip, which has the vocabulary, is not installed.
    """
    return clip_bpe(*_clip_vocabulary(), cleaning(clean), f"(?i:{SUFFIXES})|{WORDS}")


@cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """From the merges that open_clip ships; the library itself, which takes its time, is not imported."""
    found = importlib.util.find_spec("open_clip")
    path = Path(found.origin or "").parent / "bpe_simple_vocab_16e6.txt.gz" if found else Path()
    if not path.is_file():
        raise ModelError("CLIP's vocabulary comes with open_clip, which is not here: pip install open_clip_torch")
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = [(one, other) for one, other in map(str.split, lines[1 : 49152 - 256 - 2 + 1])]
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def _byte_letters() -> list[str]:
    """What stands for a byte (Radford et al. 2019): itself where it prints, or else a letter from U+0100 on."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, prints), *(chr(256 + i) for i in range(256 - len(prints)))]


def cleaning(clean: Clean) -> list[normalizers.Normalizer]:
    """Steps that clean a text as open_clip does.

    Args:
        clean: "whitespace", one blank between words; "lower", that and small letters; "canonicalize", that and no
            punctuation (of ASCII), where "_" is a blank.
    """
    steps: list[normalizers.Normalizer] = [normalizers.Replace(Regex("&(?:(?:amp|AMP|#0*38|#[xX]0*26);)+"), "&")]
    steps += [normalizers.Replace(Regex(_entity(char)), QUOTES.get(char, char)) for char in ENTITIES]
    steps += [normalizers.Replace(chr(code), chr(code - FULL_WIDTH[0] + ord("!"))) for code in FULL_WIDTH]
    steps += [normalizers.Replace(curly, straight) for curly, straight in QUOTES.items()]
    steps += [normalizers.Replace(Regex(CONTROLS), ""), normalizers.NFC()]
    if clean == "canonicalize":
        rest = "".join(f"\\x{ord(mark):02x}" for mark in string.punctuation if mark != "_")
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{rest}]+"), "")]
    if clean != "whitespace":
        steps += [normalizers.Replace(Regex(FINAL_SIGMA), "ς"), normalizers.Lowercase()]
    return [*steps, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]


def _entity(char: str) -> str:
    """A pattern of the ways in which HTML writes a character; numbers may be those of Windows-1252."""
    names = [name for name, meant in html5.items() if meant == char and name.endswith(";")]
    codes = {ord(char), char.encode("cp1252", "ignore")[0] if char.encode("cp1252", "ignore") else ord(char)}
    numbers = [f"#0*{code};|#[xX]0*(?i:{code:x});" for code in sorted(codes)]
    return f"&(?:{'|'.join([*names, *numbers])})"


def tokenizer_folder(folder: Path | None, name: str) -> Path:
    """Return the folder that holds a tokenizer: the model's own, or else that of the repository `name` of the hub."""
    if folder is None or not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt", "vocab.json")):
        return hub_folder(f"hf-hub:{name}", TOKENIZER_FILES)
    return folder


def open_clip_tokenizer(text_cfg: Mapping[str, Any], folder: Path | None, text: TextConfig) -> Tokenizer:
    """The tokenizer of a model of open_clip, that cleans texts as open_clip does as far as `clip_tokens` can.

    Ids, padding among them, are those of its `SimpleTokenizer` or `HFTokenizer`; but a special token that is written in
    a text is text, and makes no token.

    Args:
        text_cfg: of its config: `hf_tokenizer_name`, `tokenizer_kwargs`; CLIP's byte pairs without a name.
        folder: of the model, whose tokenizer files are taken; absent, or without such, those of the named repository.
        text: the encoder's architecture.

    Raises:
        ModelError: a setting is none that dualenc computes, another token fills texts than `text.pad_id`, or files are
            missing; names the key or the file.
    """
    name, options = text_cfg.get("hf_tokenizer_name") or "", dict(text_cfg.get("tokenizer_kwargs") or {})
    clean = options.pop("clean", "whitespace" if name else "lower")
    options |= {"tokenizer_mode": text_cfg.get("tokenizer_mode")}
    if refused := [key for key, value in options.items() if value]:
        raise ModelError(
            f"text_cfg: {refused[0]} {options[refused[0]]!r} is none that dualenc computes: such a model can be "
            "measured with the spec open_clip:ARCH/PRETRAINED, not imported"
        )
    if clean not in CLEANS:
        raise ModelError(f"text_cfg: tokenizer_kwargs: clean {clean!r} is none of {', '.join(CLEANS)}")
    if not name:
        _fills_with(0, text, "open_clip's SimpleTokenizer")
        return tokenizer_of(clip_backend(clean), text, text.context_length)
    folder = tokenizer_folder(folder, name)
    for side in ("padding_side", "truncation_side"):
        if (value := read_tokenizer_config(folder).get(side, "right")) != "right":
            raise ModelError(f"{folder / 'tokenizer_config.json'}: {side} {value!r} is none that dualenc computes")
    backend = read_tokenizer(folder, text, text.context_length).backend
    _fills_with(padding_token(folder), text, str(folder))
    steps = [*cleaning(clean), *([backend.normalizer] if backend.normalizer is not None else [])]
    backend.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    return tokenizer_of(backend, text, text.context_length)


def _fills_with(pad_id: int | None, text: TextConfig, where: str) -> None:
    """Refuses another padding than an encoder that sees it has known."""
    if text.pad_to is not None and pad_id != text.pad_id:
        raise ModelError(f"{where} pads with the id {pad_id}, text.pad_id is {text.pad_id}")


def open_clip_tokenizer_config(tokenizer: Tokenizer, text: TextConfig) -> dict[str, Any]:
    """What `text_cfg` of an open_clip config says of a tokenizer whose tokenizer.json lies in the same folder.

    open_clip has no setting that leaves texts alone. "whitespace" does least: entities, curly quotes and runs of blanks
    are cleaned before the tokenizer sees them, see `clip_tokens`; texts without these have the same ids. And where a
    special token is written in a text, its tokenizer takes it for one.

    Args:
        tokenizer: the tokenizer; nothing is said of CLIP's, which open_clip has itself.
        text: the architecture that it is for.

    Raises:
        ModelError: it has no token to pad with, as open_clip always does.
    """
    if _is_clip(tokenizer) and (text.pad_to is None or text.pad_id == 0):
        return {}
    if "pad_token" not in tokenizer_config(tokenizer, text):
        raise ModelError("the tokenizer has no padding token ([PAD] or <pad>), without which open_clip cannot use it")
    return {"hf_tokenizer_name": "tokenizer.json", "tokenizer_kwargs": {"clean": "whitespace"}}


def _is_clip(tokenizer: Tokenizer) -> bool:
    """Whether it makes the ids of open_clip's SimpleTokenizer of clean texts, as far as some tell."""
    if tokenizer.vocab_size != 49408 or tokenizer.special.get(END) != 49407:
        return False
    plain, own = (Tokenizer(backend, tokenizer.context_length) for backend in (clip_backend(), tokenizer.backend))
    return own.backend.get_vocab() == plain.backend.get_vocab() and own.encode(PROBES) == plain.encode(PROBES)
