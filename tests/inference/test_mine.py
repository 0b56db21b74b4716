"""Hard negatives: the nearest documents of each pair that are not its own."""

import json

import numpy as np
import pytest
from fits import fails
from helpers import WORDS, perturb, tiny_tokenizer

import dualenc
from dualenc.cli import main
from dualenc.inference.mine import mine_negatives
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.models.heads.vectors import EmbeddingConfig
from dualenc.utils.errors import DataError


@pytest.fixture
def predictor(seed):
    tokenizer = tiny_tokenizer()
    model = perturb(TextModel(TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=12)), 0.3)
    return dualenc.TextPredictor(model.eval(), tokenizer)


def sentence(number):
    """Return a text whose first tokens no other number has, since the tokenizer cuts the text off."""
    return " ".join([str(number), *np.random.choice(WORDS, 3)])  # noqa: NPY002 (seeded by the fixture)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def check_by_hand(predictor, lines, documents, skip):
    """Search for the negatives of each line, one line after the other; equal scores may be in any order."""
    vectors = dict(zip(documents, predictor.embed(documents).double()))
    for line in lines:
        own = {one["answer"] for one in lines if one["ask"] == line["ask"]} | {line["ask"]}
        query = predictor.embed(line["ask"])[0].double()
        score = {document: float(query @ vectors[document]) for document in documents if document not in own}
        found, expected = line["negatives"], sorted(score.values(), reverse=True)[skip:][:3]
        assert [score[one] for one in found] == pytest.approx(expected, abs=1e-5)
        assert len({*found}) == 3


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("with_corpus", [False, True])
def test_negatives_are_the_nearest_documents_of_others(predictor, tmp_path, with_corpus, skip):
    """Queries and documents occur several times, and some queries are documents too."""
    asks, answers = [sentence(i) for i in range(12)], [sentence(i) for i in range(15)]
    answers[:3] = asks[:3]
    chosen = [(int(i), int(j)) for i, j in zip(np.random.randint(12, size=30), np.random.randint(15, size=30))]  # noqa: NPY002
    rows = [{"id": n, "ask": asks[i], "answer": answers[j]} for n, (i, j) in enumerate(chosen)]
    documents = sorted({row["answer"] for row in rows})
    pairs, corpus = write(tmp_path / "pairs.jsonl", rows), []
    if with_corpus:
        documents = sorted({*documents[::2], *(sentence(i) for i in range(20))})
        corpus = [write(tmp_path / "corpus.jsonl", [{"body": d} for d in [*documents, documents[0]]])]
    out = tmp_path / "out.jsonl"
    options = {"text": "ask", "pair": "answer", "document": "body", "negatives": 3, "skip": skip}
    mined = mine_negatives(predictor, [pairs], out, corpus, **options)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: line[key] for key in ("id", "ask", "answer")} for line in lines] == rows
    assert mined.documents == len(documents)
    check_by_hand(predictor, lines, documents, skip)
    assert mined.negatives == 3 * len(rows)
    worst = [{**line, "negatives": line["negatives"][::-1]} for line in lines]
    with pytest.raises(AssertionError):  # control
        check_by_hand(predictor, worst, documents, skip)


def test_the_command_writes_what_training_reads(predictor, tmp_path, capsys):
    predictor.save(tmp_path / "model")
    rows = [{"text": sentence(i), "pair": sentence(i)} for i in range(8)]
    pairs, out = write(tmp_path / "pairs.jsonl", [*rows, {"text": "", "pair": "x"}]), tmp_path / "out.jsonl"
    main(["mine", str(tmp_path / "model"), pairs, str(out), "--negatives", "2"])
    assert "2.00 negatives for each of 8 pairs" in (printed := capsys.readouterr().out)
    assert "left out 1 line " in printed
    assert [len(json.loads(line)["negatives"]) for line in out.read_text().splitlines()] == [2] * 8
    for more, message in (
        (["--negatives", "0"], "at least 1"),
        (["--skip", "7"], "leave none"),
        (["--pair", "no"], "no column 'no'"),
        (["--document", "pair"], "--document pair has no use without --corpus"),
        (["--corpus", str(tmp_path / "no.jsonl")], "match no file"),
    ):
        assert message in fails(capsys, ["mine", str(tmp_path / "model"), pairs, str(out), *more])
    with pytest.raises(DataError, match="not one of the pairs"):
        mine_negatives(predictor, [pairs], pairs)


def prompted(predictor):
    """Return the model with prompts of its own for queries and documents, the latter by default."""
    about = EmbeddingConfig(prompts={"query": "ask: ", "passage": "text: "}, default_prompt="passage")
    head = HeadConfig("embedding", problem="negatives", embedding=about)
    model = TextModel(predictor.model.config, {"near": head})
    model.encoder.load_state_dict(predictor.model.encoder.state_dict())
    return dualenc.TextPredictor(model.eval(), predictor.tokenizer)


@pytest.mark.parametrize(
    ("given", "query", "document"),
    [
        ({}, "ask: ", "text: "),
        ({"query_prompt": "passage", "document_prompt": ""}, "text: ", ""),
        ({"query_prompt": "find: "}, "find: ", "text: "),
    ],
)
def test_queries_and_documents_have_their_prompts(predictor, tmp_path, given, query, document):
    asks, answers = [sentence(i) for i in range(12)], [sentence(i) for i in range(12, 24)]
    pairs = write(tmp_path / "pairs.jsonl", [{"text": a, "pair": b} for a, b in zip(asks, answers)])
    mine_negatives(prompted(predictor), [pairs], tmp_path / "out.jsonl", negatives=11, **given)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    def in_order(before, after):
        """Return whether the negatives of each line fall in similarity with these prompts."""
        scores = [
            predictor.embed([after + one for one in line["negatives"]]) @ predictor.embed(before + line["text"])[0]
            for line in lines
        ]
        return all((one[:-1] - one[1:] > -1e-5).all() for one in scores)

    assert in_order(query, document)
    assert not in_order("", "wrong: ")  # control
