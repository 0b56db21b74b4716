"""Answers of the service, compared with the model and the index in Python."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import encode, perturb, smooth, tiny_embedder, tiny_tokenizer, write_shards
from PIL import Image
from serving import ask, data_uri, post, send_raw, served

import dualenc
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.search.build import build_search
from dualenc.search.service.app import PAGE, build_app
from dualenc.search.service.core import Limits, Service
from dualenc.search.service.guard import HEADERS, host_name
from dualenc.search.service.torch_engine import TorchEngine

KEYS = ["first-key-0123456789abcdef", "second-key-0123456789abcdef"]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("collection")
    embedder = tiny_embedder(int.from_bytes(np.random.default_rng().bytes(3), "little"))
    build_search(embedder, write_shards(folder / "shards", [6, 5], 1), folder / "index", workers=0)
    return dualenc.Index.open(folder / "index", embedder), embedder


@pytest.fixture(scope="module")
def port(collection: Any) -> Any:
    index, embedder = collection
    with served(Service(TorchEngine(embedder, "tiny"), index, "things", Limits(wait_ms=0))) as port:
        yield port


def picture(seed: int, height: int = 9, width: int = 20) -> bytes:
    return encode(smooth(np.random.default_rng(seed), height, width))


@pytest.mark.parametrize(
    "query",
    [
        {"texts": ["a red cat"]},
        {"texts": ["two dogs", "a blue mat"], "minus": ["boats", "hats"], "k": 4},
        {"rows": [3, 7], "k": 100},
        {"texts": ["a tree"], "images": True, "rows": [2]},
        {"texts": ["a tree"], "min_score": 0.05},
        {"rows": [5], "where": "number >= 4"},
        {"texts": ["a cat"], "distinct": 0.9, "k": 3},
        {"images": True, "distinct": 0.999, "where": "number < 9", "minus": ["a"], "k": 2},
        {"texts": ["a cat"], "minus": None, "rows": None, "k": None, "where": None, "distinct": None},
    ],
    ids=str,
)
def test_hits_are_those_of_the_index(collection: Any, port: int, query: dict[str, Any], seed: int) -> None:
    index, embedder = collection
    data = picture(seed)
    sent = {**query, "images": [data_uri(data)]} if "images" in query else query
    answer = post(port, "/api/search", **sent)
    given = {name: value for name, value in query.items() if value is not None and name != "images"}
    hits = index.search(**given, images=[data] if "images" in query else [])
    assert len(hits) or "min_score" in query
    assert [hit["row"] for hit in answer["hits"]] == hits.rows.tolist()
    assert np.allclose([hit["score"] for hit in answer["hits"]], hits.scores, atol=1e-6)
    for hit, row in zip(answer["hits"], hits.rows.tolist(), strict=True):
        record = index.record(row)
        assert hit["key"] == record["key"]
        assert hit["caption"] == record["captions"][0]
        assert hit["source"] == Path(record["source"]).name
        assert (hit["width"], hit["height"]) == (record["fields"]["width"], record["fields"]["height"])
    assert answer["rows"] == len(index)
    assert (answer["model"], answer["fingerprint"]) == ("tiny", embedder.fingerprint)


def test_answers_do_not_name_folders_of_the_server(tmp_path: Path, seed: int) -> None:
    embedder: Any = tiny_embedder(seed)
    paths = [tmp_path / "pictures" / "a.png", tmp_path / "pictures" / "inner" / "b.png", tmp_path / "c.png"]
    (tmp_path / "pictures" / "inner").mkdir(parents=True)
    for number, path in enumerate(paths):
        path.write_bytes(picture(seed + number))
    build_search(embedder, [str(tmp_path / "pictures"), str(paths[2])], tmp_path / "index", workers=0)
    index = dualenc.Index.open(tmp_path / "index", embedder)
    with served(Service(TorchEngine(embedder, "tiny"), index, "things")) as port:
        hits = post(port, "/api/search", texts=["a cat"])["hits"]
        assert {(hit["key"], hit["source"]) for hit in hits} == {
            ("a.png", "a.png"), ("inner/b.png", "b.png"), ("c.png", "c.png")
        }  # fmt: skip
        for hit in hits:
            sample = ask(port, "GET", f"/api/sample/{hit['row']}")[2]
            assert str(tmp_path) not in str(sample)


def test_facts_are_those_of_the_index(collection: Any, port: int) -> None:
    index, embedder = collection
    facts = {"model": "tiny", "fingerprint": embedder.fingerprint, "rows": len(index), "kind": "images", "dims": 8}
    assert ask(port, "GET", "/health")[2] == {**facts, "status": "ok"}
    about = ask(port, "GET", "/api/about")[2]
    assert about.items() >= {**facts, "name": "things", "max_k": 1000, "image_queries": True}.items()
    assert about["examples"] == index.about["examples"]
    assert about["fields"] == index.about["fields"]
    sample = ask(port, "GET", "/api/sample/4")[2]
    record = index.record(4)
    record["source"] = Path(record["source"]).name
    assert sample == {"row": 4, **record, "model": "tiny", "fingerprint": embedder.fingerprint}
    assert "/" not in sample["source"]


def test_pictures_are_the_files_of_the_shards(collection: Any, port: int) -> None:
    index, _ = collection
    for row in range(len(index)):
        status, headers, content = ask(port, "GET", f"/api/image/{row}")
        assert (status, content, headers["content-type"]) == (200, *index.image_bytes(row))
        again = ask(port, "GET", f"/api/image/{row}", headers={"If-None-Match": headers["etag"]})
        assert (again[0], again[2]) == (304, b"")
        for _ in range(2):  # the second one out of the cache
            status, headers, content = ask(port, "GET", f"/api/thumbnail/{row}")
            small, large = Image.open(io.BytesIO(content)), index.image(row)
            assert headers["content-type"] == "image/jpeg"
            assert max(small.size) == min(320, max(large.size))
            large.thumbnail((320, 320))
            difference = np.asarray(small.convert("L")).astype(int) - np.asarray(large.convert("L"))
            assert np.abs(difference).mean() < 12  # of pictures of noise


def test_a_picture_that_changed_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    for i in range(2):
        (tmp_path / "a" / f"{i}.png").write_bytes(picture(i))
    embedder = tiny_embedder(1)
    build_search(embedder, [str(tmp_path / "a")], tmp_path / "index", workers=0)
    index = dualenc.Index.open(tmp_path / "index", embedder)
    with served(Service(TorchEngine(embedder, "tiny"), index)) as port:
        (tmp_path / "a" / "0.png").write_bytes(b"secrets of another file")
        status, _, answer = ask(port, "GET", "/api/image/0")
        assert status == 410
        assert str(tmp_path) not in answer["error"]["message"]
        assert ask(port, "GET", "/api/thumbnail/0")[0] == 410
        assert ask(port, "GET", "/api/image/1")[0] == 200
    assert str(tmp_path / "a" / "0.png") in capsys.readouterr().err


@pytest.mark.parametrize("form", [None, "float", "base64"])
@pytest.mark.parametrize("dimensions", [None, 3, 8])
def test_embeddings_are_those_of_the_model(collection: Any, port: int, form: Any, dimensions: Any, seed: int) -> None:
    _, embedder = collection
    data = picture(seed)
    texts = ["a cat", "two red hats on a mat", "a cat"]
    options = {"encoding_format": form, "dimensions": dimensions, "model": "tiny", "user": "someone"}
    answer = post(port, "/v1/embeddings", input=[texts[0], data_uri(data, "webp"), *texts[1:]], **options)
    expected = embedder.embed_texts(texts, numpy=True)
    expected = np.insert(expected, 1, embedder.embed_images([data], numpy=True), 0).astype(np.float64)[:, :dimensions]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = [one["embedding"] for one in answer["data"]]
    if form == "base64":
        found = [np.frombuffer(base64.b64decode(one), "<f4") for one in found]
    assert np.allclose(np.array(found), expected, atol=1e-6)
    assert [(one["object"], one["index"]) for one in answer["data"]] == [("embedding", i) for i in range(4)]
    tokens = sum(map(len, embedder.tokenizer.encode(texts)))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (answer["object"], answer["model"], answer["fingerprint"]) == ("list", "tiny", embedder.fingerprint)


def test_a_single_string_is_embedded(collection: Any, port: int) -> None:
    (found,) = post(port, "/v1/embeddings", input="a dog")["data"]
    assert np.allclose(found["embedding"], collection[1].embed_texts("a dog")[0], atol=1e-6)


@pytest.mark.parametrize("templates", [None, ["{c}", "the {c} on a mat"]])
@pytest.mark.parametrize("bias", [False, True])
def test_pictures_are_classified_as_by_the_model(templates: Any, bias: bool, seed: int) -> None:
    embedder = tiny_embedder(seed, logit_bias=bias)
    images, labels = [picture(seed + i) for i in range(3)], ["cat", "dog", "red hats"]
    with served(Service(TorchEngine(embedder, "tiny"))) as port:
        more = {} if templates is None else {"templates": templates}
        answer = post(port, "/classify", images=[data_uri(one) for one in images], labels=labels, **more)
    expected = embedder.classify(images, labels, templates or ("a photo of a {c}.",), numpy=True)
    for result, scores in zip(answer["results"], expected, strict=True):
        assert [one["label"] for one in result] == [labels[i] for i in np.argsort(-scores, kind="stable")]
        assert np.allclose([one["score"] for one in result], np.sort(scores)[::-1], atol=1e-5)


def text_model(problem: str = "single_label") -> Any:
    tokenizer = tiny_tokenizer()
    config = TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=12)
    heads = {"mood": HeadConfig("classification", ("good", "bad", "odd"), problem=problem)}
    return dualenc.TextPredictor(perturb(TextModel(config, heads)).eval(), tokenizer)


@pytest.mark.parametrize("problem", ["single_label", "multi_label"])
def test_texts_are_classified_by_the_head_of_a_text_model(problem: str) -> None:
    predictor, texts = text_model(problem), ["a cat", "two hats with boats", "a"]
    with served(Service(TorchEngine(predictor, "moods"))) as port:
        results = post(port, "/classify", texts=texts)["results"]
        cosines = post(port, "/classify", texts=texts, labels=["a dog", "a mat"])["results"]
        assert ask(port, "POST", "/v1/embeddings", {"input": data_uri(picture(1))})[0] == 200  # a text like others
        assert ask(port, "POST", "/classify", {"images": [data_uri(picture(1))], "labels": ["a"]})[0] == 400
    for result, expected in zip(results, predictor.classify(texts), strict=True):
        assert {one["label"]: pytest.approx(one["score"], abs=1e-6) for one in result} == expected["scores"]
        assert result == sorted(result, key=lambda one: -one["score"])
    expected = predictor.embed(texts) @ predictor.embed(["a dog", "a mat"]).T
    found = [[{one["label"]: one["score"] for one in row}[label] for label in ("a dog", "a mat")] for row in cosines]
    assert np.allclose(found, expected, atol=1e-6)


def test_passages_are_found_with_the_prompt_of_queries(tmp_path: Path) -> None:
    predictor = text_model()
    passages = ["a cat sits on the mat", "two dogs", "red boats", "the blue tree"]
    (tmp_path / "passages.txt").write_text("\n".join(passages) + "\n")
    build_search(
        predictor, [str(tmp_path / "passages.txt")], tmp_path / "index", query_prompt="query: ", document_prompt="on "
    )
    index = dualenc.Index.open(tmp_path / "index", predictor)
    with served(Service(TorchEngine(predictor, "moods"), index, "passages")) as port:
        hits = post(port, "/api/search", texts=["a dog"])["hits"]
        assert ask(port, "GET", "/api/about")[2]["image_queries"] is False
        assert ask(port, "GET", "/api/image/0")[0] == 404
    expected = index.search(texts=["a dog"])
    assert [hit["caption"] for hit in hits] == expected.captions
    scores = np.array([hit["score"] for hit in hits])
    assert np.allclose(scores, expected.scores, atol=1e-6)
    without = predictor.embed(["a dog"], prompt="").numpy() @ index.vectors.take(expected.rows).astype(np.float32).T
    assert np.abs(scores - without[0]).max() > 1e-5


def test_the_page_is_what_lies_in_its_folder(port: int) -> None:
    status, headers, content = ask(port, "GET", "/")
    assert (status, content) == (200, (PAGE / "index.html").read_bytes())
    assert headers["content-type"] == "text/html; charset=utf-8"
    kinds = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
    names = [path.name for path in PAGE.iterdir() if path.suffix in kinds]
    assert {"app.js", "style.css"} <= set(names)
    for name in names:
        status, headers, content = ask(port, "GET", f"/static/{name}")
        assert (status, content) == (200, (PAGE / name).read_bytes())
        assert headers["content-type"] == kinds[Path(name).suffix]


def test_every_answer_has_the_headers_of_security_and_none_of_cors(port: int) -> None:
    origin = {"Origin": "http://other.example", "Access-Control-Request-Method": "POST"}
    for method, path in [("GET", "/"), ("GET", "/nothing"), ("OPTIONS", "/api/search"), ("GET", "/api/image/0")]:
        _, headers, _ = ask(port, method, path, headers=origin)
        assert headers.items() >= {name.decode(): value.decode() for name, value in HEADERS}.items()
        assert not [name for name in headers if name.startswith("access-control")]
        assert "server" not in headers
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "http" not in policy


def test_all_but_the_page_and_the_state_need_a_key(collection: Any) -> None:
    index, embedder = collection
    service = Service(TorchEngine(embedder, "tiny"), index)
    paths = [(method, route.path) for route in build_app(service).routes for method in route.methods]  # type: ignore[attr-defined]
    assert len(paths) > 12
    wrong = ["", "Bearer", "Bearer wrong", f"Basic {KEYS[0]}", f"Bearer {KEYS[0][:-1]}", f"Bearer {KEYS[0]}{KEYS[1]}"]
    with served(service, KEYS) as port:
        for method, path in [*paths, ("GET", "/nothing"), ("POST", "//api/search"), ("DELETE", "/API/search")]:
            path = path.replace("{row}", "0").replace("{name}", "app.js")
            status, headers, _ = ask(port, method, path, headers={})
            opened = path in ("/", "/health") or path.startswith("/static/")
            assert (status == 401) != opened, path
            assert ("www-authenticate" in headers) != opened
        for given in wrong:
            assert ask(port, "GET", "/api/about", headers={"Authorization": given})[0] == 401
        for key in KEYS:
            assert ask(port, "GET", "/api/about", headers={"Authorization": f"bearer {key}"})[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1234", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:80@evil.example", 403),
        ("", 403),
    ],
)
def test_a_name_that_is_not_of_this_machine_is_refused(port: int, host: str, status: int) -> None:
    """A page of another site whose name was changed to resolve to 127.0.0.1 sends its own name."""
    request = f"GET /api/about HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    assert send_raw(port, request).startswith(f"HTTP/1.1 {status}".encode())


def test_names_in_host_headers() -> None:
    assert [host_name(one) for one in ("A.b:80", "a.b", "[::1]:80", "[::1]", ":80", "")] == [
        "a.b", "a.b", "[::1]", "[::1]", "", "",
    ]  # fmt: skip
