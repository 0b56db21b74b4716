"""`dualenc embed --part`: processes that share a folder and nothing else."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fits import fails
from helpers import encode, pixels, tiny_embedder, write_shards, write_tar
from runs import Process

import dualenc.inference.embed_files as embed_module
from dualenc import embed_shards, load
from dualenc.cli import main


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def model(tmp_path: Path, seed: int) -> str:
    tiny_embedder(seed).save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def shards(tmp_path: Path, seed: int) -> str:
    write_shards(tmp_path / "shards", [5, 1, 4, 3], seed, captions=2)
    picture = encode(pixels(np.random.default_rng(seed)), "png")
    bad = [{"__key__": "bad", "txt": b"no picture"}, {"__key__": "good", "png": picture, "txt": b"a cat"}]
    write_tar(tmp_path / "shards" / "with-bad.tar", bad)
    return str(tmp_path / "shards")


def test_parts_make_the_files_of_the_whole(
    model: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    main(["embed", model, shards, str(whole), "--workers", "0"])
    command = ["embed", model, shards, str(out), "--workers", "0"]
    main([*command, "--part", "2/3"])
    assert "4 files still missing, which other parts write: part-000.safetensors" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"embed.json", "part-002.safetensors"}
    with pytest.raises(SystemExit) as caught:
        main(["embed", "no/model", shards, str(out), "--check"])
    assert caught.value.code == 1
    found = capsys.readouterr().out.splitlines()
    assert found[:-1] == [
        f"{out}: embeddings of 1 of 5 shards", "part-000.tar", "part-001.tar", "part-003.tar", "with-bad.tar",
    ]  # fmt: skip
    main([*command, "--part", "0/3"])
    main([*command, "--part", "0/3"])
    assert "2 files still missing" in capsys.readouterr().out
    main([*command, "--part", "1/3"])
    assert everything(out) == everything(whole)
    main([*command, "--check"])
    assert capsys.readouterr().out.endswith(f"{out}: embeddings of 5 of 5 shards\n")
    made = [embed_shards(load(model), shards, tmp_path / "again", part=(i, 2), workers=0) for i in (1, 0)]
    assert [one.missing for one in made] == [("part-000.tar", "part-002.tar", "with-bad.tar"), ()]
    again, first = everything(tmp_path / "again"), everything(whole)
    assert {name: again[name] for name in again if name != "embed.json"} == {
        name: first[name] for name in first if name != "embed.json"
    }


@pytest.mark.long
def test_parts_that_are_killed_repeated_and_overlap(model: str, shards: str, tmp_path: Path, seed: int) -> None:
    """Kill processes at every kind of write, thirty times, two of them at once, and compare with the plain command."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    main(["embed", model, shards, str(whole), "--workers", "0"])
    rng, killed = random.Random(seed), 0
    while killed < 30:
        parts = rng.choices(["0/1", "0/2", "1/2", "0/3", "1/3", "2/3"], k=2)
        running = [_Mortal(model, shards, out, part, rng.randrange(2**32), tmp_path / "log") for part in parts]
        for process in running:
            status = process.wait()
            assert status in (0, -signal.SIGKILL), process.text()
            killed += status != 0
        if not any(out.glob("*.safetensors")) or rng.random() < 0.7:
            continue
        for path in rng.sample(sorted(out.glob("*.safetensors")), 1):  # so that there is always something to do
            path.unlink()
    for part in ("1/2", "0/2"):
        main(["embed", model, shards, str(out), "--workers", "0", "--part", part])
    assert everything(out) == everything(whole)


class _Mortal(Process):
    """A process of `dualenc embed --part` that kills itself in one of two writes, before it, within it or after it."""

    def __init__(self, model: str, shards: str, out: Path, part: str, seed: int, log: Path) -> None:
        self.rng = random.Random(seed)
        super().__init__(["embed", model, shards, str(out), "--workers", "0", "--part", part], log)

    def _run(self, arguments: list[str], environment: dict[str, str], out: int) -> None:
        for name in ("save_file", "write_json", "write_text"):
            setattr(embed_module, name, self._mortal(getattr(embed_module, name)))
        super()._run(arguments, environment, out)

    def _mortal(self, write: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> None:
            when = self.rng.choice(["before", "within", "after", "", "", ""])
            if when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            write(*arguments, **options)
            target = next(path for path in arguments if isinstance(path, Path))
            if when == "within" and target.suffix == ".part":
                target.write_bytes(target.read_bytes()[:50])
            if when:
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapped


def test_a_folder_that_another_process_begins_or_finishes_meanwhile(
    model: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    main(["embed", model, shards, str(whole), "--workers", "0"])
    link, save = os.link, embed_module.save_file

    def begun(source: Path, target: Path) -> None:
        (out / "embed.json").write_bytes((whole / "embed.json").read_bytes())  # with the totals
        link(source, target)

    def finished(arguments: Any, path: Path, metadata: Any) -> None:
        save(arguments, path, metadata)
        os.replace(path, out / "part-001.safetensors")

    monkeypatch.setattr(os, "link", begun)
    monkeypatch.setattr(embed_module, "save_file", finished)
    main(["embed", model, shards, str(out), "--workers", "0", "--part", "1/5"])
    assert json.loads((out / "embed.json").read_text())["samples"] == 15
    assert everything(out).items() <= everything(whole).items()
    monkeypatch.undo()
    monkeypatch.setattr(os, "link", lambda source, target: os.truncate(tmp_path / "none", 0))  # no links here
    main(["embed", model, shards, str(tmp_path / "other"), "--workers", "0"])
    assert everything(tmp_path / "other") == everything(whole)


@pytest.mark.parametrize("part", ["3/3", "1", "-1/2", "0/0", "1/two"])
def test_parts_out_of_range_are_refused(
    model: str, shards: str, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["embed", model, shards, str(tmp_path / "out"), f"--part={part}"]
    assert "must be I/N with I from 0 to N - 1" in fails(capsys, wrong)
    assert not (tmp_path / "out").exists()


def test_checks_of_other_folders_are_refused(
    model: str, shards: str, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert "nothing was embedded there" in fails(capsys, ["embed", model, shards, out, "--check"])
    main(["embed", model, shards, out, "--workers", "0", "--part", "0/2"])
    write_shards(tmp_path / "others", [2], seed)
    assert "other shards" in fails(capsys, ["embed", model, str(tmp_path / "others"), out, "--check"])
    (tmp_path / "texts.txt").write_text("a cat\n")
    texts = ["embed", model, str(tmp_path / "texts.txt"), str(tmp_path / "texts")]
    assert "--part is for shards and images" in fails(capsys, [*texts, "--part", "0/2"])
