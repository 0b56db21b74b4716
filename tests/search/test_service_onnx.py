"""A folder of ONNX, served in a process of its own without torch, compared with the model that was exported."""

import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import encode, perturb, smooth, tiny_embedder, tiny_tokenizer
from serving import ask, data_uri, post, served

import dualenc
from dualenc.data.image_pixels import decode_pixels
from dualenc.data.images import Preprocess
from dualenc.interop.onnx import OnnxFormat
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.search.service.core import Service
from dualenc.search.service.onnx_engine import OnnxEngine, preprocessed
from dualenc.utils.errors import ModelError
from dualenc.utils.files import write_json

HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "open_clip",
    "transformers",
    "faiss",
    "matplotlib",
    "torchmetrics",
)
# The command, and then what it has loaded.
PROGRAM = f"""
import sys
from dualenc.cli import main
main(sys.argv[1:])
print("loaded", *[name for name in {HEAVY} if name in sys.modules])
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    embedder = tiny_embedder(int.from_bytes(os.urandom(3), "little"))
    folder = tmp_path_factory.mktemp("exported")
    OnnxFormat().write(embedder, folder)
    write_json(folder / "export.json", {"format": "onnx", "fingerprint": embedder.fingerprint})
    return folder, embedder


def pictures(seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [encode(smooth(rng, *sides)) for sides in ((16, 16), (40, 23), (7, 31), (5, 5))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_exported_model_is_served_without_torch(exported: Any, number: int, seed: int) -> None:
    folder, embedder = exported
    environment = {**os.environ, "PYTHONPATH": str(Path(dualenc.__file__).parents[1])}
    command = [sys.executable, "-c", PROGRAM, "serve", str(folder), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        lines = [running.stdout.readline() for _ in range(4)]
        assert embedder.fingerprint in lines[0]
        port = int(lines[1].partition("http://127.0.0.1:")[2].partition(":")[0])
        texts, data = ["a cat", "two red hats on the mat", "[CLS] a [SEP]"], pictures(seed)
        answer = post(port, "/v1/embeddings", input=[*texts, *map(data_uri, data)])
        labels = post(port, "/classify", images=[data_uri(data[0])], labels=["cat", "dog"])["results"]
        assert ask(port, "GET", "/")[0] == 404
        # A connection that stays open does not hold up the stop.
        idle = http.client.HTTPConnection("127.0.0.1", port)
        idle.request("GET", "/health")
        assert json.loads(idle.getresponse().read())["dims"] == 8
        running.send_signal(number)
        out, error = running.communicate(timeout=60)
        idle.close()
    assert (running.returncode, error) == (0, "")
    assert out.splitlines()[-2:] == ["stopped", "loaded"]
    assert answer["fingerprint"] == embedder.fingerprint
    assert answer["model"] == folder.name
    found = np.array([one["embedding"] for one in answer["data"]])
    assert np.abs(found[:3] - embedder.embed_texts(texts, numpy=True)).max() < 1e-5
    assert np.abs(found[3:] - embedder.embed_images(data, numpy=True)).max() < 0.02  # Pillow's resizing
    assert answer["usage"]["prompt_tokens"] == sum(map(len, embedder.tokenizer.encode(texts)))
    scores = embedder.classify([data[0]], ["cat", "dog"], numpy=True)[0]
    assert {one["label"]: pytest.approx(one["score"], abs=1e-4) for one in labels[0]} == dict(
        zip(["cat", "dog"], scores)
    )


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_are_preprocessed_as_by_the_package(resize: Any, interpolation: Any, seed: int) -> None:
    """Pillow and torch round elsewhere: of 150 photos no pixel differed by more than 2 of 255, on average by 0.06."""
    rng = np.random.default_rng(seed)
    how = {"size": 24, "resize": resize, "interpolation": interpolation}
    differences = []
    for sides in ((24, 24), (25, 24), (60, 31), (31, 97), (7, 9), (3, 200), (200, 3), *rng.integers(1, 150, (12, 2))):
        pixels = decode_pixels(encode(smooth(rng, *map(int, sides))))
        ours = preprocessed(pixels, how)
        theirs = Preprocess(24, resize=resize, interpolation=interpolation)(torch.from_numpy(pixels).permute(2, 0, 1))
        assert ours.shape == (24, 24, 3)
        differences.append(np.abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy()))
    differences = np.concatenate([one.ravel() for one in differences])
    assert (differences > 2).mean() < 0.005  # narrow pictures that are stretched may differ by more
    assert differences.mean() < 0.2


def test_a_text_model_is_served_with_its_prompt_and_its_head(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=12)
    heads = {"mood": HeadConfig("classification", ("good", "bad", "odd"))}
    predictor = dualenc.TextPredictor(perturb(TextModel(config, heads)), tokenizer)
    OnnxFormat().write(predictor, tmp_path)
    write_json(tmp_path / "export.json", {"format": "onnx", "fingerprint": predictor.fingerprint})
    texts = ["a cat", "two boats and a tree", "the"] * 40
    with served(Service(OnnxEngine(tmp_path, "moods"))) as port:
        data = post(port, "/v1/embeddings", input=texts)["data"]
        results = post(port, "/classify", texts=texts)["results"]
        assert ask(port, "POST", "/classify", {"images": [data_uri(b"a")], "labels": ["a"]})[0] == 400
    assert np.abs(np.array([one["embedding"] for one in data]) - predictor.embed(texts).numpy()).max() < 1e-5
    for result, expected in zip(results, predictor.classify(texts), strict=True):
        assert {one["label"]: pytest.approx(one["score"], abs=1e-5) for one in result} == expected["scores"]


@pytest.mark.parametrize("name", ["text.onnx", "tokenizer.json", "preprocess.json", "onnx.json", "export.json"])
def test_a_broken_file_is_named(exported: Any, tmp_path: Path, name: str) -> None:
    for path in exported[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes() if path.name != name else b"broken")
    with pytest.raises(ModelError, match=name) as caught:
        OnnxEngine(tmp_path, "broken")
    assert "\n" not in str(caught.value)
