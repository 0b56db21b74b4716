"""Folders of small tokenizers as transformers writes them, with settings drawn at random, and texts for them."""

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [
    "the",
    "cat",
    "dog",
    "sit",
    "mat",
    "sep",
    "cls",
    "mask",
    "ent",
    "new",
    "Cat",
    "The",
    "é",
    "ñ",
    "猫",
    "café",
]
MARKS = "[]<>|/#_.,!?'`\"-"
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
ALBERT = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
CLIP = ("<|startoftext|>", "<|endoftext|>")
PIECES = [
    *BERT, *ROBERTA, "<MASK|LLM-jp>", "<ent>", "[E1]", "new", "newnew", "newcat", "café", "the", "The", "cat", "CAT",
    "dogs", "é", "É", "e\u0301", "猫", "犬がいる", "straße", "ﬁn", " ", "  ", "\n", "\t", "\u00a0", "\u3000",
    "``a''", "…", "İ", "Σ", "👍🏽", "\u200d", "x<ent>y",
]  # fmt: skip
# tokenizer class -> model_type, special tokens, and the tokens around a text
CLASSES = {
    "BertTokenizer": ("bert", BERT, (2, 3)),
    "DistilBertTokenizer": ("distilbert", BERT, (2, 3)),
    "RobertaTokenizer": ("roberta", ROBERTA, (0, 2)),
    "XLMRobertaTokenizer": ("xlm-roberta", ROBERTA, (0, 2)),
    "CamembertTokenizer": ("camembert", ROBERTA, (0, 2)),
    "AlbertTokenizer": ("albert", ALBERT, (2, 3)),
    "DebertaV2Tokenizer": ("bert", BERT, (2, 3)),
    "CLIPTokenizer": ("clip", CLIP, (0, 1)),
}
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
SETTINGS: dict[str, list[Any]] = {
    **{name: [True, False] for name in ("do_lower_case", "tokenize_chinese_chars", "add_prefix_space", "keep_accents")},
    **{name: [True, False] for name in ("split_special_tokens", "split_by_punct", "trim_offsets")},
    **{name: ["left", "right"] for name in ("truncation_side", "padding_side")},
    "strip_accents": [True, False, None],
    "model_max_length": [12, 512],
}


def text_of(rng: random.Random) -> str:
    """Draw a text of words, accents, scripts, blanks and special tokens."""
    return "".join(rng.choice(PIECES) + rng.choice(["", " ", " ", "  "]) for _ in range(rng.randint(0, 9)))


def _wordpiece(special: tuple[str, ...]) -> Any:
    entries = [*special, *LETTERS, *LETTERS.upper(), *MARKS, *(f"##{one}" for one in f"{LETTERS}é猫"), *VOCABULARY]
    return models.WordPiece({token: i for i, token in enumerate(dict.fromkeys(entries))}, unk_token="[UNK]")


def _unigram(special: tuple[str, ...]) -> Any:
    words = [f"▁{word}" for word in VOCABULARY]
    entries = list(dict.fromkeys([*special, "▁", *words, *VOCABULARY, *LETTERS, *LETTERS.upper(), *MARKS]))
    scores = [(token, 0.0 if token in special else -1 - i / 50) for i, token in enumerate(entries)]
    return models.Unigram(scores, unk_id=next(i for i, one in enumerate(entries) if one in ("<unk>", "[UNK]")))


def _bpe(special: tuple[str, ...], ends_of_words: bool) -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    suffix = "</w>" if ends_of_words else ""
    merges = [("t", "h"), ("th", f"e{suffix}"), ("c", "a"), ("ca", f"t{suffix}"), ("n", "e"), ("ne", f"w{suffix}")]
    merges += [] if ends_of_words else [("Ġ", "cat"), ("Ġ", "the")]
    marked = [one + suffix for one in letters] if suffix else []
    before, after = ([], special) if ends_of_words else (special, [])
    entries = dict.fromkeys([*before, *letters, *marked, *map("".join, merges), *after])
    unknown = {"unk_token": CLIP[1], "end_of_word_suffix": suffix} if ends_of_words else {}
    return models.BPE({token: i for i, token in enumerate(entries)}, merges, **unknown)


def steps_of(kind: str, without_mask: bool = False) -> tuple[Any, Any, Any]:
    """Return model, pre-tokenizer and decoder of a tokenizer class."""
    special = CLASSES[kind][1]
    special = special[:-1] if without_mask and kind != "CLIPTokenizer" else special
    if kind in ("BertTokenizer", "DistilBertTokenizer"):
        return _wordpiece(special), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    if kind in ("RobertaTokenizer", "CLIPTokenizer"):
        return _bpe(special, kind == "CLIPTokenizer"), pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return _unigram(special), pre_tokenizers.Metaspace(), decoders.Metaspace()


def backend_of(kind: str, rng: random.Random | None = None) -> Tokenizer:
    """Return a tokenizer of a class; with a generator, some of its parts are of other kinds, or missing."""
    special, ends = CLASSES[kind][1], [CLASSES[kind][1][i] for i in CLASSES[kind][2]]
    chance = (lambda share: False) if rng is None else (lambda share: rng.random() < share)
    added_mask = chance(0.2)  # The model lacks the mask, which follows its vocabulary.
    model, before, decoder = steps_of(kind, added_mask)
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = before, decoder  # type: ignore[assignment]
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, lstrip=token == "<mask>" and chance(0.5))
            for token in special
            if not chance(0.1) or (added_mask and token == special[-1])
        ]
    )
    if chance(0.3):
        backend.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    if chance(0.3):
        backend.add_special_tokens(["<ent>"])
    if chance(0.3):
        backend.add_tokens([AddedToken("new", normalized=chance(0.5), single_word=chance(0.5))])
    if not chance(0.2):
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=[ends[0], "$A", ends[1]],
            pair=[ends[0], "$A", ends[1], "$B:1", f"{ends[1]}:1"],
            special_tokens=[(token, backend.token_to_id(token)) for token in ends],
        )
    if chance(0.2):
        backend.enable_truncation(9, direction="left")
    return backend


def write_folder(folder: Path, kind: str, backend: Tokenizer | None = None, **config: Any) -> Path:
    """Write tokenizer.json, tokenizer_config.json and the model_type of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (backend or backend_of(kind)).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": CLASSES[kind][0]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} | config))
    return folder


def write_random_folder(folder: Path, rng: random.Random) -> dict[str, Any]:
    """Write the folder of a random tokenizer, and return its tokenizer_config.json."""
    kind = rng.choice(list(CLASSES))
    backend = backend_of(kind, rng)
    size, config = backend.get_vocab_size(), {}
    if rng.random() < 0.3:
        config["tokenizer_class"] = rng.choice(["PreTrainedTokenizerFast", "NoSuchTokenizer", f"{kind}Fast"])
    elif rng.random() < 0.2 and kind != "DebertaV2Tokenizer":
        config["tokenizer_class"] = None  # The model_type says it.
    config |= {name: rng.choice(values) for name, values in SETTINGS.items() if rng.random() < 0.25}
    if rng.random() < 0.3:
        tokens = backend.get_added_tokens_decoder()
        named: dict[str, Any] = {str(i): {name: getattr(one, name) for name in FLAGS} for i, one in tokens.items()}
        named |= {str(size): {"content": "[E1]", "special": rng.random() < 0.5}}
        named |= {str(size + 5): {"content": "[E2]", "special": False}} if rng.random() < 0.1 else {}
        config["added_tokens_decoder"] = named
    elif rng.random() < 0.3:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "added_tokens.json").write_text(json.dumps({"[E1]": size}))
        about = {"mask_token": {"content": "<MASK|LLM-jp>", "lstrip": True, "rstrip": False, "normalized": False}}
        (folder / "special_tokens_map.json").write_text(json.dumps(about))
    if rng.random() < 0.3:
        name = rng.choice(["additional_special_tokens", "extra_special_tokens"])
        config[name] = rng.choice([["<ent>"], ["<ent>", "[E9]"], []])
    if rng.random() < 0.2:
        config["mask_token"] = rng.choice(["<MASK|LLM-jp>", "[MASK]", "<mask>"])
    write_folder(folder, kind, backend, **config)
    return {"tokenizer_class": kind, **config}
