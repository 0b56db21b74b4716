"""Tokenizers of CLIP, SigLIP and similar models, compared with those of open_clip and transformers."""

# ruff: noqa: RUF001

import html
import json
import random
import re
import unicodedata
from html.entities import html5
from pathlib import Path
from typing import Any

import ftfy
import open_clip
import pytest
import torch
from helpers import WORDS, tokenizer_of
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from dualenc.data import Tokenizer
from dualenc.formats.huggingface.tokenizers import read_tokenizer, tokenizer_config
from dualenc.formats.open_clip import tokenizer as clip_tokens
from dualenc.formats.open_clip.tokenizer import (
    CLEANS,
    cleaning,
    clip_backend,
    open_clip_tokenizer,
    open_clip_tokenizer_config,
)
from dualenc.models import TextConfig
from dualenc.utils.errors import ModelError
from dualenc.utils.files import write_json

PIECES = (
    "a photo of a cat", "isn't", "WE'LL go", "they'RE", "'s", "’s", "I’ve", "“quoted”", "fish & flowers",
    "&amp;", "&amp;amp;quot;", "&quot;it&#39;s&quot;", "&#x27;", "&#039;", "&#146;", "&rsquo;", "&hellip;",
    "caf&eacute; &Eacute;t&eacute;", "R&D", "AT&T", "&", "&;", "#fun @home", "100%", "3.50 €", "1234567",
    "٣٤٥", "½ ² Ⅷ", "👍🏽", "🐕‍🦺", "🇳🇱", "☃︎", "漢字とかな", "ＦＵＬＬ　ｗｉｄｔｈ，！", "한국어", "русский язык",
    "ΟΔΥΣΣΕΥΣ ΣΑΣ Σ 'Σ ΑΣ' Α.Σ ΣΣ", "İstanbul ISIL", "Straße ẞ",
    "naı̈ve e\u0301 e\u0323\u0302", "हिन्दी", "العربية", "ไทย",
    "\x00", "\x07red\x1b.", "\x7f", "\ufeff", "\u200b", "\u200d", "\u2028", "\u00a0", "\u3000", "\t", "\r\n",
    "’\u0301", "Ａ\u0301 ，\u0323",
    "<b>bold</b>", "<|endoftext|>", "<|startoftext|>", "[SEP]", "</w>", "'ſ", "ſ", "...", "!!!'t", "_",
    "a_b", "--", "—", "‘", "(x)", "{y}", "\\n", "^_^", "K", "word " * 30, "x" * 90, "",
)  # fmt: skip
BLOCKS = ((0x20, 0x7F), (0x370, 0x530), (0x900, 0x980), (0x2010, 0x2060), (0x2190, 0x2400), (0x3040, 0x30FF),
          (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xFF01, 0xFF5F), (0x1F300, 0x1F700), (0x10400, 0x10450))  # fmt: skip


def nasty(rng: random.Random) -> str:
    """Return a random text of pieces that are hard to clean, mixed with letters of many scripts."""
    parts = []
    for _ in range(rng.randrange(8)):
        if rng.random() < 0.7:
            parts.append(rng.choice(PIECES))
        else:
            letters = (chr(rng.randrange(*rng.choice(BLOCKS))) for _ in range(rng.randrange(6)))
            # The libraries may know letters that Python's Unicode does not know yet.
            parts.append("".join(x for x in letters if unicodedata.category(x) != "Cn"))
    return rng.choice(("", " ", " ", "  ")).join(parts)


def texts_of(seed: int, count: int, keep: Any = lambda text: True) -> list[str]:
    """Return random texts and the single `PIECES`, without those in which ftfy repairs mojibake."""
    rng = random.Random(seed)
    texts = [*PIECES, *(nasty(rng) for _ in range(count))]
    kept = [text for text in texts if ftfy.fix_text(text, fix_encoding=False) == ftfy.fix_text(text) and keep(text)]
    assert len(kept) > 0.6 * len(texts)
    return kept


NOT_DONE = ("&nbsp;", "&copy; 2021", "ﬁsh", "Ĳssel", "ｶﾞｷﾞ", "it\x92s", "\x1b[31mred")
UNFINISHED = re.compile(
    r"&(?:amp;)*(?:(?:#\d+|#[xX][0-9a-fA-F]+)(?![0-9a-fA-F;])"
    rf"|(?:{'|'.join(name for name in html5 if name[-1] != ';')})(?!;))"
)


def no_markup(text: str) -> bool:
    """Return whether ftfy and html.unescape treat the entities of a text alike, and each entity ends with ";"."""
    return ("<" not in text or "&" not in text) and not UNFINISHED.search(text)


def rows(tokenizer: Tokenizer, texts: list[str], length: int, pad_id: int) -> list[list[int]]:
    return [ids + [pad_id] * (length - len(ids)) for ids in tokenizer.encode(texts)]


def assert_same(texts: list[str], ours: list[list[int]], theirs: list[list[int]]) -> None:
    wrong = [(text, a, b) for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:3]}"


@pytest.mark.parametrize("clean", CLEANS)
@pytest.mark.parametrize("length", [77, 7])
def test_ids_of_clip_are_those_of_open_clip(clean: Any, length: int, seed: int) -> None:
    texts = texts_of(seed, 1500, no_markup)
    tokenizer = Tokenizer(clip_backend(clean), length)
    theirs = SimpleTokenizer(clean=clean, context_length=length)(texts)
    assert_same(texts, rows(tokenizer, texts, length, 0), theirs.tolist())
    assert tokenizer.vocab_size == 49408
    assert (theirs == 49407).sum(1).eq(1).all()


@pytest.mark.parametrize("step", range(3))
def test_ids_differ_without_one_kind_of_step(step: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: without one kind of step, its texts have other ids."""
    steps = cleaning("lower")
    kinds = [normalizers.NFC, normalizers.Lowercase, normalizers.Replace]
    less = [other for other in steps if not isinstance(other, kinds[step])]
    assert len(less) < len(steps)
    monkeypatch.setattr(clip_tokens, "cleaning", lambda clean: less)
    texts = texts_of(seed, 200, no_markup)
    tokenizer = Tokenizer(clip_backend(), 77)
    assert rows(tokenizer, texts, 77, 0) != SimpleTokenizer()(texts).tolist()


def test_texts_that_the_module_does_not_clean() -> None:
    """If one of these becomes equal, the docstring of the module must be changed."""
    ours, theirs = Tokenizer(clip_backend(), 20), SimpleTokenizer(context_length=20)
    for text in ("cafÃ©", "&lang;", "a &amp b", "<b>&rsquo;", "<b>&amp;amp;amp;", *NOT_DONE):
        assert rows(ours, [text], 20, 0) != theirs([text]).tolist(), text
    (ids,) = ours.encode(["an <end_of_text> in <start_of_text> text <|endoftext|>"])
    assert ids.count(49407) == ids.count(49406) == 1
    assert theirs(["an <end_of_text> in"])[0].tolist().count(49407) == 2


@pytest.mark.parametrize("clean", CLEANS)
def test_cleaning_is_that_of_open_clip(clean: Any, seed: int) -> None:
    step = normalizers.Sequence(cleaning(clean))
    texts = texts_of(seed, 1500, no_markup)
    for text in texts:
        assert step.normalize_str(text) == get_clean_fn(clean)(text), text


@pytest.mark.long
def test_every_character_alone() -> None:
    """ftfy cleans only those characters differently that the module names, of all that both libraries know."""
    step = normalizers.Sequence(cleaning("whitespace"))
    half_width = {code for code in ftfy.chardata.WIDTH_MAP if code > 0xFF5E}
    left = {*ftfy.chardata.LIGATURES, *half_width, *range(0x80, 0xA0)}
    for code in (*range(0xD800), *range(0xE000, 0x11000), *range(0x1F000, 0x1FB00)):
        text = chr(code)
        if unicodedata.category(text) != "Cn" and code not in left:
            assert step.normalize_str(text) == get_clean_fn("whitespace")(text), hex(code)


def test_every_entity_of_the_list_in_every_way(seed: int) -> None:
    step = normalizers.Sequence(cleaning("whitespace"))
    for char in clip_tokens.ENTITIES:
        ways = [f"&#{ord(char)};", f"&#0{ord(char)};", f"&#x{ord(char):x};", f"&#X{ord(char):X};"]
        ways += [f"&{name}" for name, meant in html.entities.html5.items() if meant == char and name.endswith(";")]
        for way in ways:
            for text in (f"a{way}b", f"a {way.replace('&', '&amp;amp;')} b"):
                expected = " ".join(ftfy.fix_text(text, fix_encoding=False).split())  # a lone "Â" would be mojibake
                assert step.normalize_str(text) == expected, text
    for near in ("&quo;", "&eacut;", "&#3;9", "quot;", "& quot;", "&eacutes;"):
        assert step.normalize_str(near) == near


@pytest.mark.long
def test_a_saved_or_pickled_clip_tokenizer_gives_the_same_ids(tmp_path: Path, seed: int) -> None:
    import pickle

    tokenizer = Tokenizer(clip_backend(), 16)
    tokenizer.save(tmp_path / "tokenizer.json")
    texts = texts_of(seed, 100)
    again = Tokenizer.from_file(tmp_path / "tokenizer.json", 16)
    assert again.encode(texts) == tokenizer.encode(texts) == pickle.loads(pickle.dumps(tokenizer)).encode(texts)
    assert again.fingerprint == tokenizer.fingerprint
    assert tokenizer.backend.decode(tokenizer.encode(["Two cats!"])[0]) == "two cats !"


def write_clip(folder: Path, **config: Any) -> None:
    """Write CLIP's vocab.json and merges.txt without tokenizer.json, as openai/clip-vit-base-patch32 has them."""
    vocab, merges = clip_tokens._clip_vocabulary()
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    write_json(folder / "tokenizer_config.json", {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **config})


@pytest.mark.long
def test_clip_of_vocab_and_merges_is_that_of_transformers(tmp_path: Path, seed: int) -> None:
    write_clip(tmp_path)
    peer = CLIPTokenizer.from_pretrained(tmp_path)
    text = TextConfig(49408, causal=True, pool="last")
    tokenizer = read_tokenizer(tmp_path, text, 77)
    texts = texts_of(seed, 1500, lambda one: "<|" not in one)
    assert_same(texts, tokenizer.encode(texts), peer(texts, max_length=77, truncation=True)["input_ids"])
    fields = json.loads(tokenizer.backend.to_str())
    fields["normalizer"] = None  # The control: without cleaning, ids differ.
    worse = Tokenizer(Backend.from_str(json.dumps(fields)), 77)
    assert worse.encode(texts) != tokenizer.encode(texts)


def test_unusable_clip_folders_are_refused(tmp_path: Path) -> None:
    text = TextConfig(49408)
    write_clip(tmp_path, bos_token={"content": "<|nothing|>"})
    with pytest.raises(ModelError, match=r"vocab\.json.* has no <\|nothing\|>"):
        read_tokenizer(tmp_path, text, 77)
    write_clip(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nzzzz yyyy\n")
    with pytest.raises(ModelError, match=r"vocab\.json.* (cannot be|can) read"):
        read_tokenizer(tmp_path, text, 77)
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be read"):
        read_tokenizer(tmp_path, text, 77)


def unigram(folder: Path, **config: Any) -> int:
    """Write a tokenizer like SigLIP's, with </s> after each text and as padding; return its vocabulary size."""
    built = tokenizer_of("unigram", [*PIECES, " ".join(WORDS)], 400, 16).backend
    pieces = [(piece, score) for piece, score in json.loads(built.to_str())["model"]["vocab"][5:]]
    backend = Backend(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces], unk_id=2))
    backend.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    backend.decoder = decoders.Metaspace()  # type: ignore[assignment]
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    roles = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", **config}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(folder)
    return len(pieces) + 3


@pytest.mark.long
@pytest.mark.parametrize("clean", [None, *CLEANS])
def test_a_named_tokenizer_is_that_of_open_clip(clean: Any, tmp_path: Path, seed: int) -> None:
    """The tokenizer pads texts as SigLIP's does; ids and padding of short and long texts are equal."""
    size = unigram(tmp_path)
    options = {} if clean is None else {"clean": clean}
    peer = HFTokenizer(str(tmp_path), context_length=24, **options)
    text = TextConfig(size, context_length=24, pad_to=24, pad_id=1, pool="last")
    cfg = {"hf_tokenizer_name": "owner/name", "tokenizer_kwargs": options}
    tokenizer = open_clip_tokenizer(cfg, tmp_path, text)
    texts = texts_of(seed, 1500, no_markup)
    assert_same(texts, tokenizer.encode(texts), peer(texts).tolist())
    for other in set(CLEANS) - {clean or "whitespace"}:  # The control: another cleaning gives other ids.
        wrong = open_clip_tokenizer({**cfg, "tokenizer_kwargs": {"clean": other}}, tmp_path, text)
        assert wrong.encode(texts) != tokenizer.encode(texts)


def test_the_name_is_fetched_where_the_folder_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = unigram(tmp_path / "hub")
    asked: list[Any] = []

    def hub(spec: str, patterns: Any) -> Path:
        asked.append((spec, "tokenizer.json" in patterns))
        return tmp_path / "hub"

    monkeypatch.setattr(clip_tokens, "hub_folder", hub)
    (tmp_path / "empty").mkdir()
    for folder in (None, tmp_path / "empty"):
        found = open_clip_tokenizer({"hf_tokenizer_name": "owner/name"}, folder, TextConfig(size))
        assert found.vocab_size == size
    assert asked == [("hf-hub:owner/name", True)] * 2


def test_open_clip_settings_that_are_refused(tmp_path: Path) -> None:
    size = unigram(tmp_path)
    text, named = TextConfig(size, context_length=24, pad_to=24, pad_id=1), {"hf_tokenizer_name": "owner/name"}
    for cfg, message in (
        ({**named, "tokenizer_mode": "clips"}, "tokenizer_mode 'clips'"),
        ({**named, "tokenizer_kwargs": {"strip_sep_token": True}}, "strip_sep_token True"),
        ({"tokenizer_kwargs": {"reduction_mask": "simple"}}, "reduction_mask 'simple'"),
        ({**named, "tokenizer_kwargs": {"clean": "spotless"}}, "clean 'spotless' .* lower, whitespace"),
        ({}, "SimpleTokenizer pads with the id 0, .*pad_id 1"),
    ):
        with pytest.raises(ModelError, match=message):
            open_clip_tokenizer(cfg, tmp_path, text)
    with pytest.raises(ModelError, match=r"pads with the id 1, .*pad_id 0"):
        open_clip_tokenizer(named, tmp_path, TextConfig(size, context_length=24, pad_to=24))
    open_clip_tokenizer({**named, "tokenizer_kwargs": {"strip_sep_token": False}}, tmp_path, text)
    unigram(tmp_path, padding_side="left")
    with pytest.raises(ModelError, match="padding_side 'left'"):
        open_clip_tokenizer(named, tmp_path, text)


def clean_texts(seed: int) -> list[str]:
    """Return texts that open_clip's cleaning does not change."""
    texts = [get_clean_fn("whitespace")(text) for text in texts_of(seed, 1500, lambda one: "[" not in one)]
    return [text for text in texts if get_clean_fn("whitespace")(text) == text and "<" not in text]


def write_for_open_clip(folder: Path, tokenizer: Tokenizer, text: TextConfig) -> Any:
    text_cfg = {"context_length": text.context_length, **open_clip_tokenizer_config(tokenizer, text)}
    write_json(folder / "open_clip_config.json", {"model_cfg": {"text_cfg": text_cfg}, "preprocess_cfg": {}})
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, text))
    return open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_our_tokenizers_in_open_clip(kind: Any, tmp_path: Path, seed: int) -> None:
    """Clean texts have the same ids; a tokenizer that is read back gives the same ids to all texts."""
    tokenizer = tokenizer_of(kind, [*PIECES, " ".join(WORDS)], 500, 24)
    text = TextConfig(tokenizer.vocab_size, context_length=24)
    peer = write_for_open_clip(tmp_path, tokenizer, text)
    texts = clean_texts(seed)
    assert_same(texts, rows(tokenizer, texts, 24, 0), peer(texts).tolist())
    cfg = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    again = open_clip_tokenizer(cfg, tmp_path, text)
    nasties = texts_of(seed, 500, lambda one: no_markup(one) and "[" not in one)
    assert_same(nasties, rows(again, nasties, 24, 0), peer(nasties).tolist())
    assert tokenizer.encode(["“dirty” &amp;"]) != [ids[: len(ids)] for ids in again.encode(["“dirty” &amp;"])]


@pytest.mark.slow
def test_clip_needs_no_file_in_open_clip(tmp_path: Path, seed: int) -> None:
    text = TextConfig(49408, causal=True, pool="last")
    write_clip(tmp_path)
    for tokenizer in (Tokenizer(clip_backend(), 77), read_tokenizer(tmp_path, text, 77)):
        assert open_clip_tokenizer_config(tokenizer, text) == {}
    assert isinstance(write_for_open_clip(tmp_path, Tokenizer(clip_backend(), 77), text), SimpleTokenizer)
    cased = Tokenizer(clip_backend("whitespace"), 77)
    peer = write_for_open_clip(tmp_path, cased, text)
    texts = texts_of(seed, 500, lambda one: "<" not in one)
    assert_same(texts, rows(cased, texts, 77, 49407), peer(texts).tolist())
    assert peer(texts).tolist() != SimpleTokenizer()(texts).tolist()
    seen = TextConfig(49408, pad_to=77, pad_id=49407)
    assert open_clip_tokenizer_config(Tokenizer(clip_backend(), 77, 77, 49407), seen) != {}


def test_a_tokenizer_without_padding_is_refused() -> None:
    bare = Tokenizer(Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), 8)
    with pytest.raises(ModelError, match="does not have a padding token"):
        open_clip_tokenizer_config(bare, TextConfig(2, context_length=8))


def test_simple_tokenizer_pads_with_zeros() -> None:
    tokenizer = open_clip_tokenizer({"tokenizer_kwargs": {"clean": "lower"}}, None, TextConfig(49408, pad_to=77))
    assert torch.equal(torch.tensor(tokenizer.encode(["a cat", "x " * 99])), SimpleTokenizer()(["a cat", "x " * 99]))
