"""Wrong uses of `dualenc serve`: one line each, and what it says at its start."""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_embedder
from serving import HashEngine

from dualenc.cli import main
from dualenc.cli import serve as command
from dualenc.search.service.core import Service
from dualenc.search.service.opening import model_name, read_keys
from dualenc.search.service.server import address_of, bind, names_of
from dualenc.utils.errors import DataError

KEY = "0123456789abcdef-0123456789"


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line with which a command fails."""
    with pytest.raises(SystemExit) as caught:
        main(["serve", *words])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("dualenc: error: ")
    return line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "SOURCE"),
        (["nothing/here"], "nothing/here"),
        (["."], "neither an index nor a model"),
        (["m", "--port", "70000"], "--port is 70000"),
        (["m", "--port", "-1"], "--port is -1"),
        (["m", "--port", "http"], "port"),
        (["m", "--max-batch", "0"], "--max-batch is 0"),
        (["m", "--wait-ms", "-1"], "--wait-ms is -1"),
        (["m", "--wait-ms", "nan"], "wait"),
        (["m", "--max-body", "0"], "--max-body is 0"),
        (["m", "--api-key-file", "nothing.txt"], "nothing.txt"),
        (["m", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["m", "--host", "192.0.2.1"], "192.0.2.1"),
        (["m", "--key", "abc"], "--api_key_file"),
        (["m", "--model", "other"], "--model"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_wrong_uses(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--port" not in words and words:
        words = [*words, "--port", "0"]
    assert says in failure(capsys, *words)


def test_a_port_that_is_in_use_is_refused_before_the_model_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = failure(capsys, "no/model", "--port", str(taken.getsockname()[1]))
    assert "--port" in line
    assert "no/model" not in line


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_a_missing_library_is_named(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == missing else sys)
    line = failure(capsys, "m")
    assert missing in line
    assert "pip install 'dualenc[serve]'" in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "does not have a key"),
        (b"\n# a comment\n", "does not have a key"),
        (b"tooshort\n", "key 1"),
        (f"{KEY}\nwith blanks between them\n".encode(), "key 2"),
        ("ключ-ключ-ключ-ключ".encode(), "key 1"),
        (b"\xff\xfe\x00", "is not UTF-16"),
    ],
)
def test_wrong_keys(content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.txt"
    path.write_bytes(content)
    line = failure(capsys, "m", "--api-key-file", str(path), "--port", "0")
    assert says in line
    assert "tooshort" not in line.replace(str(path), "")  # a key is not repeated
    with pytest.raises(DataError):
        read_keys(path)


def test_keys_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text(f"# of Kim\n{KEY}\n\n  {KEY}2  \n")
    assert read_keys(tmp_path / "keys.txt") == [KEY, f"{KEY}2"]


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "hf-hub:a/b@c": "hf-hub:a/b@c",
        "open_clip:ViT-B-32/openai": "open_clip:ViT-B-32/openai",
        "/secret/folder/vit": "vit",
        "/runs/first/best/": "first/best",
        "here": "here",
        ".": tmp_path.name,
    }
    assert {spec: model_name(spec) for spec in names} == names


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_what_it_says_at_its_start(host: str) -> None:
    with bind(host, 0) as bound, Service(HashEngine()) as service:
        names = names_of(host, bound)
        assert bool(names) == (host != "0.0.0.0")
        for keys in (False, True):
            lines = command._greeting(service, address_of(bound), bool(names), keys)
            text = "\n".join(lines)
            assert "hashes" in text
            assert f":{bound.getsockname()[1]}" in text
            assert ("Bearer" in text) == keys
            assert ("--api-key-file asks" in text) == (not keys and host == "0.0.0.0")


def test_an_index_is_served_with_the_model_that_it_names(tmp_path: Path) -> None:
    import numpy as np
    from helpers import encode, pixels

    from dualenc.search.build import build_search
    from dualenc.search.service.core import Limits
    from dualenc.search.service.opening import open_service
    from dualenc.utils.errors import ModelError

    embedder: Any = tiny_embedder(1)
    embedder.save(tmp_path / "model")
    (tmp_path / "a.png").write_bytes(encode(pixels(np.random.default_rng(1))))
    build_search(str(tmp_path / "model"), [str(tmp_path / "a.png")], tmp_path / "index", workers=0)
    with open_service(str(tmp_path / "index"), Limits()) as service:
        assert service.facts == {"model": "model", "fingerprint": embedder.fingerprint}
        assert (service.name, service.rows) == ("index", 1)
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="--model"):
        open_service(str(tmp_path / "index"), Limits())
    with open_service(str(tmp_path / "index"), Limits(), str(tmp_path / "moved")) as service:
        assert service.engine.name == "moved"
    tiny_embedder(2).save(tmp_path / "other")
    with pytest.raises(ModelError):
        open_service(str(tmp_path / "index"), Limits(), str(tmp_path / "other"))
