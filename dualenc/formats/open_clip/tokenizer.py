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
from dualenc.data.text.tokenizer_classes import END, START, SUFFIXES, WORDS, clip_bpe
from dualenc.data.text.tokenizer_files import VOCABULARIES, read_tokenizer_config
from dualenc.formats.download import hub_folder
from dualenc.formats.huggingface.tokenizers import (
    TOKENIZER_FILES,
    normalized_first,
    padded_for,
    padding_token,
    read_tokenizer,
    tokenizer_config,
)
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.decoding import decode_text
from dualenc.utils.errors import ModelError

Clean = Literal["lower", "whitespace", "canonicalize"]
CLEANS = get_args(Clean)
QUOTES = dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
ENTITIES = "\"'<>–—…‘’“”éèêàáâäãåçíîïñóôöøúüßÀÁÂÄÅÇÈÉÊÍÑÓÔÖØÜ"  # noqa: RUF001
FULL_WIDTH = range(0xFF01, 0xFF5F)  # The printable characters of ASCII, in the same order.
CONTROLS = "[\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]+"
# Python's lower() of a sigma that ends a word (Unicode 15.0, table 3-17). The library's step ignores the context.
FINAL_SIGMA = r"(?<=\p{Cased}\p{Case_Ignorable}{0,3})Σ(?!\p{Case_Ignorable}*\p{Cased})"
PROBES = (
    "The QUICK brown fox isn't 1234567890 !?#&(){}<>; it's (jumping) over_the lazy-dog's back...",
    "Ünïcödé naïve Straße 漢字とかな 한국어 русский 👍🏽",
    "  two  blanks\tand\nlines  ",
    "",
)


def clip_backend(clean: Clean = "lower") -> Backend:
    """Build CLIP's tokenizer (Radford et al. 2021, section 2.4), which gives the ids of open_clip's SimpleTokenizer.

    Ids differ where this module does not clean a text as ftfy does. They also differ for "<start_of_text>" and
    "<end_of_text>" in a caption: SimpleTokenizer turns them into the opening and closing tokens, this tokenizer treats
    them as text, like "<|endoftext|>".

    Args:
        clean: the cleaning of a text before it is split.

    Raises:
        ModelError: If open_clip, which ships the vocabulary, is not installed.
    """
    return clip_bpe(*_clip_vocabulary(), cleaning(clean), f"(?i:{SUFFIXES})|{WORDS}")


@cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read vocabulary and merges from the file that open_clip ships, without importing the library, which is slow."""
    spec = importlib.util.find_spec("open_clip")
    path = Path(spec.origin or "").parent / "bpe_simple_vocab_16e6.txt.gz" if spec else Path()
    if not path.is_file():
        raise ModelError("CLIP's vocabulary comes with open_clip, which is not installed: pip install open_clip_torch")
    lines = decode_text(gzip.decompress(path.read_bytes())).split("\n")
    merges = [(left, right) for left, right in map(str.split, lines[1 : 49152 - 256 - 2 + 1])]
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def _byte_letters() -> list[str]:
    """Return the letters for the 256 bytes (Radford et al. 2019): printable bytes first, then letters above U+00FF."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def cleaning(clean: Clean) -> list[normalizers.Normalizer]:
    """Return the steps that clean a text as open_clip does.

    Args:
        clean: "whitespace" leaves one blank between words; "lower" also lower-cases; "canonicalize" also turns "_" into
            a blank and removes the other punctuation of ASCII.
    """
    steps: list[normalizers.Normalizer] = [normalizers.Replace(Regex("&(?:(?:amp|AMP|#0*38|#[xX]0*26);)+"), "&")]
    steps += [normalizers.Replace(Regex(_entity(char)), QUOTES.get(char, char)) for char in ENTITIES]
    steps += [normalizers.Replace(chr(code), chr(code - FULL_WIDTH[0] + ord("!"))) for code in FULL_WIDTH]
    steps += [normalizers.Replace(curly, straight) for curly, straight in QUOTES.items()]
    steps += [normalizers.Replace(Regex(CONTROLS), ""), normalizers.NFC()]
    if clean == "canonicalize":
        marks = "".join(f"\\x{ord(mark):02x}" for mark in string.punctuation if mark != "_")
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{marks}]+"), "")]
    if clean != "whitespace":
        steps += [normalizers.Replace(Regex(FINAL_SIGMA), "ς"), normalizers.Lowercase()]
    return [*steps, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]


def _entity(char: str) -> str:
    """Return a pattern of the entities for a character, by name or by number, also by its number in Windows-1252."""
    names = [name for name, value in html5.items() if value == char and name.endswith(";")]
    codes = {ord(char), *char.encode("cp1252", "ignore")}
    numbers = [f"#0*{code};|#[xX]0*(?i:{code:x});" for code in sorted(codes)]
    return f"&(?:{'|'.join([*names, *numbers])})"


def tokenizer_folder(folder: Path | None, name: str) -> Path:
    """Return the folder of a tokenizer: the model's own, otherwise the download of the hub's repository `name`."""
    if folder is None or not any((folder / file).is_file() for file in VOCABULARIES):
        return hub_folder(f"hf-hub:{name}", TOKENIZER_FILES)
    return folder


def open_clip_tokenizer(text_cfg: Mapping[str, Any], folder: Path | None, text: TextConfig) -> Tokenizer:
    """Return the tokenizer of an open_clip model, which cleans texts as far as `cleaning` can.

    The ids, including the padding, are those of open_clip's `SimpleTokenizer` or `HFTokenizer`. A special token that is
    written in a text stays text, however.

    Args:
        text_cfg: `text_cfg` of the config, with `hf_tokenizer_name` and `tokenizer_kwargs`. Without a name, the
            tokenizer is CLIP's.
        folder: folder of the model. If it is None or has no tokenizer files, those of the named repository are used.
        text: architecture of the text encoder.

    Raises:
        ModelError: If a setting is not supported, texts are padded with another token than `text.pad_id`, or files are
            missing; the message names the key or the file.
    """
    name, options = text_cfg.get("hf_tokenizer_name") or "", dict(text_cfg.get("tokenizer_kwargs") or {})
    clean = options.pop("clean", "whitespace" if name else "lower")
    options |= {"tokenizer_mode": text_cfg.get("tokenizer_mode")}
    if refused := [key for key, value in options.items() if value]:
        raise ModelError(
            f"text_cfg: {refused[0]} {options[refused[0]]!r} is not supported: the model cannot be imported, but "
            "can be evaluated with the spec open_clip:ARCH/PRETRAINED"
        )
    if clean not in CLEANS:
        raise ModelError(f"text_cfg: tokenizer_kwargs: clean {clean!r} is not one of {', '.join(CLEANS)}")
    if not name:
        _check_padding(0, text, "open_clip's SimpleTokenizer")
        return padded_for(Tokenizer(clip_backend(clean), text.context_length), text)
    folder = tokenizer_folder(folder, name)
    if (side := read_tokenizer_config(folder).get("padding_side", "right")) != "right":
        raise ModelError(f"{folder / 'tokenizer_config.json'}: padding_side {side!r} is not supported")
    tokenizer = read_tokenizer(folder, text, text.context_length)
    _check_padding(padding_token(folder), text, str(folder))
    return normalized_first(tokenizer, cleaning(clean))


def _check_padding(pad_id: int | None, text: TextConfig, where: str) -> None:
    """Raise if a text encoder sees its padding and was trained with another padding token."""
    if text.pad_to is not None and pad_id != text.pad_id:
        raise ModelError(f"{where} pads with the id {pad_id}, expected text.pad_id {text.pad_id}")


def open_clip_tokenizer_config(tokenizer: Tokenizer, text: TextConfig) -> dict[str, Any]:
    """Return the entries of an open_clip `text_cfg` for a tokenizer whose tokenizer.json lies in the same folder.

    open_clip has no setting that leaves texts unchanged. "whitespace" changes least: open_clip cleans entities, curly
    quotes and runs of blanks before the tokenizer sees them, and texts without these have the same ids. A special token
    that is written in a text becomes that token in open_clip.

    Args:
        tokenizer: the tokenizer. CLIP's needs no entries, because open_clip has it.
        text: architecture of the text encoder.

    Raises:
        ModelError: If the tokenizer does not have a padding token, which open_clip always uses.
    """
    if _is_clip(tokenizer) and (text.pad_to is None or text.pad_id == 0):
        return {}
    if "pad_token" not in tokenizer_config(tokenizer, text):
        raise ModelError(
            "the tokenizer does not have a padding token, which open_clip needs: name one as pad_token in "
            "tokenizer_config.json"
        )
    return {"hf_tokenizer_name": "tokenizer.json", "tokenizer_kwargs": {"clean": "whitespace"}}


def _is_clip(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer has the vocabulary of open_clip's SimpleTokenizer and gives its ids to `PROBES`."""
    if tokenizer.vocab_size != 49408 or tokenizer.special.get(END) != 49407:
        return False
    plain, own = (Tokenizer(backend, tokenizer.context_length) for backend in (clip_backend(), tokenizer.backend))
    return own.backend.get_vocab() == plain.backend.get_vocab() and own.encode(PROBES) == plain.encode(PROBES)
