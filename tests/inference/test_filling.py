"""Guesses at masked tokens, compared with the pipeline of transformers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_tokenizer
from tokenizer_folders import CLASSES, ROBERTA, VOCABULARY, backend_of, write_folder
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from transformers import pipeline

from dualenc.data import Tokenizer
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.models import HeadConfig, TextConfig, TextModel

LLM_JP = "|LLM-jp>"
KINDS = ["BertTokenizer", "RobertaTokenizer", "XLMRobertaTokenizer", "CamembertTokenizer", "AlbertTokenizer", "first"]


def predictor(tokenizer: Tokenizer, heads: dict[str, HeadConfig] | None = None, **config: Any) -> TextPredictor:
    text = TextConfig(tokenizer.vocab_size, 16, 2, 2, **{"types": 2, "context_length": 32, **config})
    model = TextModel(text, {"mlm": HeadConfig("mlm")} if heads is None else heads)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return TextPredictor(model.eval(), tokenizer, "it")


def write_model(folder: Path, kind: str) -> str:
    """Write a model with the files of a tokenizer class as transformers writes them, and return its mask token."""
    config: dict[str, Any] = {}
    if kind == "first":  # blanks before the first word only, and other names of special tokens
        kind, mask = "XLMRobertaTokenizer", f"<MASK{LLM_JP}"
        names = {old: f"<{role}{LLM_JP}" for old, role in zip(ROBERTA, ("CLS", "PAD", "SEP", "UNK", "MASK"))}
        text = backend_of(kind).to_str()
        for old, new in names.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        backend = Backend.from_str(text)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # type: ignore[assignment]
        roles = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **dict(zip(roles, names.values()))}
    else:
        backend, mask = backend_of(kind), CLASSES[kind][1][-1]
    write_folder(folder / "tokenizer", kind, backend, model_max_length=32, **config)
    tokenizer = Tokenizer.from_file(folder / "tokenizer", 32)
    family = {"position_offset": 2, "types": 1} if CLASSES[kind][1] == ROBERTA else {}
    predictor(tokenizer, **family).save(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((folder / "tokenizer" / name).read_bytes())
    (folder / "model" / "dualenc.json").unlink()
    return mask


@pytest.mark.parametrize("kind", KINDS)
def test_guesses_equal_those_of_the_pipeline(kind: str, tmp_path: Path, seed: int) -> None:
    random.seed(seed)
    mask = write_model(tmp_path, kind)
    ours = load_text(tmp_path / "model", "cpu")
    peer = pipeline("fill-mask", str(tmp_path / "model"), device="cpu")
    assert peer.tokenizer.mask_token == mask
    texts = [
        f"the {mask} sit",
        f"{mask}",
        f"cat, {mask}é.",
        f"{mask} dog  {mask} mat 猫",
        f"a  cat  {mask}, the dog {mask}",
    ]
    texts += [" ".join(random.choices([*VOCABULARY, mask], k=5)) + f" {mask}" for _ in range(4)]
    targets = random.sample(sorted(ours.tokenizer.backend.get_vocab()), 7)
    for more in ({}, {"targets": targets}):
        found = ours.fill(texts, 4, batch_size=3, **more)
        for text, masks in zip(texts, found, strict=True):
            expected: Any = peer(text, top_k=4, **more)
            expected = [expected] if text.count(mask) == 1 else expected
            assert len(masks) == text.count(mask) == len(expected)
            for one, other in zip(masks, expected, strict=True):
                ids = [ours.tokenizer.backend.token_to_id(guess["token"]) for guess in one]
                assert ids == [guess["token"] for guess in other]
                assert [guess["sequence"] for guess in one] == [guess["sequence"] for guess in other]
                scores = [guess["score"] for guess in other]
                assert [guess["probability"] for guess in one] == pytest.approx(scores, rel=1e-4)
            assert ours.fill(text.replace(mask, "[MASK]"), 4, **more) == ours.fill(text, 4, **more)
    ours.save(tmp_path / "again")  # The roles are kept, and the mask has its name in transformers.
    again, peer = load_text(tmp_path / "again", "cpu"), pipeline("fill-mask", str(tmp_path / "again"), device="cpu")
    assert again.fill(texts) == ours.fill(texts)
    assert peer(texts[0])[0]["sequence"] == ours.fill(texts[0])[0][0]["sequence"]


def test_a_blank_after_the_mask_is_not_made_up(tmp_path: Path, seed: int) -> None:
    """Check that the text after a mask gets no blank if only the first word of a text gets one."""
    write_model(tmp_path, "first")
    ours = load_text(tmp_path / "model", "cpu").tokenizer
    (ids,) = ours.encode([f"the <MASK{LLM_JP}cat"], masks=True)
    assert [ours.backend.id_to_token(i) for i in ids][-2:] == ["cat", f"<SEP{LLM_JP}"]
    assert ours.encode(["cat"])[0][1] == ours.backend.token_to_id("▁cat")  # the control


def test_the_word_is_filled_in_at_its_position(seed: int) -> None:
    it = predictor(tiny_tokenizer())
    with torch.no_grad():
        it.model.heads["mlm"].bias[it.tokenizer.backend.token_to_id("cat")] += 1e4
    (guesses,) = it.fill("A [MASK] sits [SEP] here", 1)
    (guess,) = guesses
    assert (guess["token"], guess["probability"]) == ("cat", pytest.approx(1))
    assert guess["text"] == "A cat sits [SEP] here"
    first, second = it.fill("A [MASK] sees a [MASK].", 1)
    assert (first[0]["text"], second[0]["text"]) == ("A cat sees a [MASK].", "A [MASK] sees a cat.")
    ids = it.tokenizer.encode(["A [MASK] sits [SEP] here"], masks=True)[0]  # What is written is text, and no token.
    assert ids.count(it.tokenizer.special["[SEP]"]) == 1


def test_targets_are_tokens(seed: int) -> None:
    it = predictor(tiny_tokenizer())
    text = "a [MASK] sits"
    (found,) = it.fill(text, targets=["cat", "dog", "cat"])
    assert sorted(guess["token"] for guess in found) == ["cat", "dog"]
    everything = {guess["token"]: guess["probability"] for guess in it.fill(text, 10_000)[0]}
    assert len(everything) == it.tokenizer.vocab_size
    assert sum(everything.values()) == pytest.approx(1, rel=1e-5)
    assert all(guess["probability"] == everything[guess["token"]] for guess in found)
    assert it.fill(text, targets="cat") == it.fill(text, targets=["cat"])
    for targets, said in (
        (["cat", "dogs"], "target 'dogs' is 2 tokens: 'dog', '##s'"),
        ([""], "target '' is 0 tokens"),
        (["猫"], "target '猫' is not in the vocabulary"),
        ([], "targets is empty"),
        ([3], "number 0 .from 0. is 3"),
    ):
        with pytest.raises(ValueError, match=said):
            it.fill(text, targets=targets)  # type: ignore[arg-type]


def test_what_cannot_be_filled_is_refused(seed: int) -> None:
    it = predictor(tiny_tokenizer())
    assert it.fill([]) == []
    for texts, said in (
        (None, "texts are None"),
        (["a [MASK]", 3], "number 1 .from 0. is 3"),
        ("a cat", r"'a cat' does not contain \[MASK\]"),
        (["a [MASK]", "a cat"], "'a cat' does not contain"),
        ("a cat " * 40 + "[MASK]", "is cut off"),
    ):
        with pytest.raises(ValueError, match=said):
            it.fill(texts)  # type: ignore[arg-type]
    for top_k in (0, 1.5, True):
        with pytest.raises(ValueError, match="top_k is"):
            it.fill("a [MASK]", top_k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size is 0"):
        it.fill("a [MASK]", batch_size=0)
    with pytest.raises(ValueError, match="no heads for fill-mask"):
        predictor(tiny_tokenizer(), {}).fill("a [MASK]")
    text = tiny_tokenizer().backend.to_str()
    fields = json.loads(text.replace('"[MASK]"', '"[HOLE]"'))
    unmasked = Tokenizer(type(tiny_tokenizer().backend).from_str(json.dumps(fields)), 32)
    with pytest.raises(ValueError, match="does not have a mask token"):
        predictor(unmasked).fill("a [MASK]")
