"""Atomic writing of files, atomic appending of lines, and texts for the terminal."""

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dualenc.utils.files import append_lines, atomic_write, write_json, write_text
from dualenc.utils.text import did_you_mean, one_line, plural, printable, quoted, reason, shorten
from dualenc.utils.urls import redact


def in_child(function, *args) -> int:
    """Run a function in a forked process; return its exit status."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def limited(size: int) -> None:
    """Limit the size of this process's files; writing more is an error, not a signal."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# Files


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half of")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert path.read_text().endswith("}\n")
    assert os.listdir(tmp_path) == ["a.json"]
    write_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_open(tmp_path: Path, mask: int) -> None:
    code = """
import os, sys, dualenc.utils.files as files
with open("plain", "w"):
    pass
files.write_text("new", "x")
os.chmod("new", 0o640)
files.write_text("new", "y")
files.write_text("newer", "x")
"""
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        umask=mask,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"plain": 0o666 & ~mask, "new": 0o640, "newer": 0o666 & ~mask}


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot sync a folder is accepted; a failing disk is an error."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(error, os.strerror(error))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    error = errno.EINVAL
    write_text(tmp_path / "a", "x")
    error = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "a", "y")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def child() -> None:
        limited(1000)
        with pytest.raises(OSError, match="File too large"):
            write_text(path, "x" * 1001)
        write_text(tmp_path / "small.txt", "x" * 1000)

    assert in_child(child) == 0
    assert path.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "small.txt"]


def test_killed_while_writing(tmp_path: Path) -> None:
    path, temporary = tmp_path / "a.txt", tmp_path / ".one.part"
    write_text(path, "old")

    def child() -> None:
        with atomic_write(path, temporary) as file:
            file.write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(child) == -signal.SIGKILL
    assert path.read_text() == "old"
    with atomic_write(path, temporary) as file:  # the file that the killed process left does no harm
        file.write_text("newer")
    assert (path.read_text(), os.listdir(tmp_path)) == ("newer", ["a.txt"])


# Lines


def test_lines_are_appended_all_or_none(tmp_path: Path) -> None:
    """Whatever part of the lines a full disk would take, the file is unchanged, and the next lines can be appended."""
    path = tmp_path / "deep" / "lines.jsonl"
    append_lines(path, ["one"])

    def child(size: int) -> None:
        limited(size)
        with pytest.raises(OSError, match=r"File too large|No space left"):
            append_lines(path, ["12345", "6789"])
        append_lines(path, [])

    for size in range(4, 15):
        assert in_child(child, size) == 0, size
        assert path.read_text() == "one\n"
    append_lines(path, ["12345", "6789"], sync=True)
    assert path.read_text() == "one\n12345\n6789\n"


def test_a_short_write_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems write a part and report it only by the count."""
    path = tmp_path / "lines"
    append_lines(path, ["one"])
    real = os.write

    class Short:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *exc):
            return self.file.__exit__(*exc)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return real(self.file.fileno(), data[:3])

    opened = open
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda *args, **options: Short(opened(*args, **options)))
        with pytest.raises(OSError, match="No space left on device"):
            append_lines(path, ["two and more"])
    assert path.read_text() == "one\n"


def test_an_incomplete_last_line_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"a"')
    append_lines(path, ['{"a": 2}'])
    assert path.read_text() == '{"a": 1}\n{"a"\n{"a": 2}\n'


def test_lines_of_several_processes_do_not_mix(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "lines"

    def child(number: int) -> None:
        chance = random.Random(seed + number)
        for i in range(40):
            append_lines(path, [f"{number} {i} {'x' * chance.randrange(9000)}|" for _ in range(chance.randrange(1, 4))])

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = path.read_text().splitlines()
    assert all(line.endswith("|") and line.count("|") == 1 for line in lines)
    assert {tuple(line.split()[:2]) for line in lines} == {(str(n), str(i)) for n in range(4) for i in range(40)}


# Texts


def test_texts_for_the_terminal() -> None:
    assert printable("a\x1b[31m\nb é") == "a\\x1b[31m\\nb é"
    assert plural(1, "shard") == "1 shard"
    assert plural(1200, "shard") == "1,200 shards"
    assert plural(0, "shard") == "0 shards"
    assert quoted("x" * 101) == repr("x" * 99 + "…")
    assert quoted("x" * 100) == repr("x" * 100)
    assert quoted("a\x00") == "'a\\x00'"
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(ValueError()) == "ValueError"


def test_one_line() -> None:
    text = "Caught X.\nOriginal Traceback (most recent call last):\n  ...\ndualenc.utils.errors.DataError: a\n b"
    assert one_line(text) == "a b"
    assert one_line(OSError("\x1b https://me:secret@host/x?sig=1")) == "\\x1b https://host/x"
    assert redact("s3://me:pw@bucket/x") == "s3://bucket/x"


def test_the_nearest_names_are_suggested(seed: int) -> None:
    rng = random.Random(seed)
    known = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=12)) for _ in range(20)]
    for name in known:
        at = rng.randrange(1, 11)
        typo = name[:at] + rng.choice("_-") + name[at + 1 :].upper()
        assert did_you_mean(typo, known) == f"did you mean {name}?"
    assert did_you_mean("0" * 12, known) == f"choose one of {', '.join(known)}"
    assert did_you_mean("0" * 12, known, "see there") == "see there"
    assert did_you_mean("x", []) == "choose one of "
    assert did_you_mean("batch-size", ["batch_size", "batch"]) == "did you mean batch_size?"


def test_a_shortened_text_fits_and_is_a_beginning(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        text = " ".join(
            "".join(rng.choices("abc", k=rng.randrange(1, 9))) + rng.choice(["", "", ",", ";"]) for _ in range(20)
        )
        width = rng.randrange(20, 120)
        short = shorten(text, width)
        assert len(short) <= width
        assert text.startswith(short.removesuffix(" ..."))
        assert len(short) > width // 3 or short == text
