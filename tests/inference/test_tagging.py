"""Entities of texts: their places in texts of many scripts, windows, and the pipeline of transformers."""

import random
from pathlib import Path

import pytest
import torch
from helpers import WORDS, tiny_tokenizer
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerFast, pipeline

from dualenc.data.text.words import split_text
from dualenc.inference.text_model import TextPredictor
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.utils.tags import find_entities

LABELS = ("PER", "LOC")
PIECES = [
    *WORDS, "Kim", "Zoë", "o\u0308", "R.H.", "東京", "タワー", "👩\u200d👩\u200d👧", "🇮🇹",
    "\u200b", "\t", "\u00a0", "\u3000", "  ",
    "\u2028", "\u2019", "“x”", "—", "שלום", "ไทย", "नमस्ते", "ß", "İ", "ﬁ", "a\u0000b", "\ufeff", "[MASK]", "\U0001d538",
]  # fmt: skip


def tagger(length: int = 64, **head: object) -> TextPredictor:
    tokenizer = tiny_tokenizer(length)
    config = TextConfig(tokenizer.vocab_size, width=24, layers=2, heads=2, context_length=length, types=2)
    heads = {"names": HeadConfig("token_classification", LABELS, **head)}  # type: ignore[arg-type]
    model = TextModel(config, heads)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
        model.encoder.embeddings.token_embeddings.weight.normal_()
        model.eval()
        logits = model(tokenizer([" ".join(WORDS)]), "names")
        model.heads["names"].out.bias.sub_(logits.mean(0))  # type: ignore[union-attr,operator] # so that all tags occur
    return TextPredictor(model.eval(), tokenizer, "it")


def text() -> str:
    return "".join(random.choice(PIECES) + random.choice([" ", " ", ""]) for _ in range(random.randint(0, 14)))


def test_places_are_those_of_the_text(seed: int) -> None:
    """Check, on texts of many scripts, that each entity is its characters, and begins and ends with words."""
    predictor, texts = tagger(), [text() for _ in range(80)]
    found = predictor.tag(texts, batch_size=7)
    assert sum(map(len, found)) > 50
    for one, entities in zip(texts, found, strict=True):
        spans = split_text(one).spans
        last = 0
        for entity in entities:
            assert list(entity) == ["label", "start", "end", "text", "score"]
            assert one[entity["start"] : entity["end"]] == entity["text"] == entity["text"].strip()
            assert entity["start"] in [start for start, _ in spans]
            assert entity["end"] in [stop for _, stop in spans]
            assert last <= entity["start"] < entity["end"]
            last = entity["end"]
    for one, entities in zip(texts, found):  # The other texts of a batch do not matter.
        (alone,) = predictor.tag(one)
        assert [{**entity, "score": 0} for entity in alone] == [{**entity, "score": 0} for entity in entities]


def test_long_texts_are_read_in_windows(seed: int) -> None:
    """Check that each word has the tag that its window alone gives it, so that no word is lost."""
    predictor = tagger(12)
    words = random.choices(WORDS, k=50)  # each word is one token
    model, reader = predictor.model, predictor.model.kinds["names"].window_reader()
    assert reader is not None
    (sample,) = reader.windows([split_text(" ".join(words))], predictor.tokenizer)
    assert len(sample.windows) > 5
    tags = [""] * len(words)
    at = 0
    for window in sample.windows:
        with torch.no_grad():
            logits = model(predictor.tokenizer.pack([window.ids]), "names")
        for place in window.places:
            tags[sample.kept.judged[at]] = reader.names[int(logits[place].argmax())]
            at += 1
    expected = [(label, " ".join(words[start:stop])) for label, start, stop in find_entities(tags)]
    assert [(one["label"], one["text"]) for one in predictor.tag(" ".join(words))[0]] == expected
    assert predictor.tag(["", " \n", "\u200b"]) == [[], [], []]
    assert predictor.tag([]) == []


def test_entities_equal_the_pipeline_of_transformers(tmp_path: Path, seed: int) -> None:
    """Compare with the strategy "first", which reads tags of IOB1 and IOB2 as `find_entities` does."""
    predictor = tagger()
    predictor.save(tmp_path / "model")
    backend = tiny_tokenizer(64).backend
    tokens = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    peer = pipeline(
        "token-classification",
        AutoModelForTokenClassification.from_pretrained(tmp_path / "model"),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, **tokens),
        aggregation_strategy="first",
    )
    # The pipeline takes a word whose characters a normalizer removes for the middle of a word, and "[MASK]" for a mask.
    changed = "o\u0308", "\u200b", "İ", "ﬁ", "a\u0000b", "\ufeff", "ไทย", "नमस्ते", "👩\u200d👩\u200d👧", "[MASK]"
    plain = [piece for piece in PIECES if piece not in changed]
    texts = [" ".join(random.choices([*plain, "catdog.", "boats"], k=random.randint(1, 15))) for _ in range(40)]
    for one, ours in zip(texts, predictor.tag(texts), strict=True):
        theirs = peer(one)
        assert [(x["label"], x["start"], x["end"]) for x in ours] == [
            (x["entity_group"], x["start"], x["end"]) for x in theirs
        ], one
        assert [x["score"] for x in ours] == pytest.approx([float(x["score"]) for x in theirs], abs=1e-5)


@pytest.mark.parametrize("asked", [["a", 1], b"a", None, ["a", "b\ud800"]])
def test_texts_that_are_not_texts(asked: object) -> None:
    with pytest.raises(ValueError, match="texts"):
        tagger().tag(asked)  # type: ignore[arg-type]


def test_a_head_that_is_not_there(seed: int) -> None:
    predictor = tagger()
    with pytest.raises(ValueError, match="no head 'x' for token-classification: name one of names"):
        predictor.tag(["a"], head="x")
    with pytest.raises(ValueError, match=r"no heads for text-classification: its heads: names \(token_"):
        predictor.classify(["a"])
    with pytest.raises(ValueError, match="batch_size"):
        predictor.tag(["a"], batch_size=0)
