"""Checkpoints that are damaged, cannot be written, or are not what they seem."""

import json
import os
import re
import shutil
import zipfile

import pytest
import torch
from fits import fails
from runs import begin, data, end, logged, run, spoil

import dualenc.training.checkpoint as checkpoint_module
import dualenc.utils.files as files_module
from dualenc.training.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    checkpoints,
    newest,
    path_of,
    read,
    verify,
    write,
)

KILLED = -9


def content(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"state_dict": {"a": torch.randn(31, 17, generator=generator)}, "step": 3, "words": ["x", 1.5, None]}


def test_what_is_written_is_read(tmp_path, seed):
    path = path_of(tmp_path, 12)
    write(path, content(seed))
    assert path.name == "step-00000012.ckpt"
    found = read(path)
    assert torch.equal(found["state_dict"].pop("a"), content(seed)["state_dict"]["a"])
    assert found == {"state_dict": {}, "step": 3, "words": ["x", 1.5, None]}
    # Anything that reads checkpoints reads it, and a copy has its checksum with it.
    assert torch.load(path, weights_only=True)["step"] == 3
    assert zipfile.ZipFile(path).testzip() is None
    verify(shutil.copy(path, tmp_path / "copy") and tmp_path / "copy")
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_every_bit_counts(tmp_path, seed):
    path = path_of(tmp_path, 1)
    write(path, content(seed))
    whole = path.read_bytes()
    rng = torch.Generator().manual_seed(seed)
    places = torch.randint(len(whole), (300,), generator=rng).tolist() + list(range(len(whole) - 100, len(whole)))
    for place in places:
        bit = 1 << (place % 8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        checkpoint_module._verify.cache_clear()
        with pytest.raises(DamagedCheckpoint):
            verify(path)
    for length in [0, 1, 20, *torch.randint(len(whole), (50,), generator=rng).tolist(), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint):
            verify(path)
    path.write_bytes(whole + b"\n")
    with pytest.raises(DamagedCheckpoint):
        verify(path)
    path.write_bytes(whole)
    verify(path)


def test_the_newest_is_by_number_and_whole(tmp_path, seed):
    for step in (9, 99999999, 100000000):
        write(path_of(tmp_path, step), content(seed))
    (tmp_path / "step-x.ckpt").write_text("")
    assert newest(tmp_path, print) == path_of(tmp_path, 100000000)
    told = []
    spoil(path_of(tmp_path, 100000000), "truncated")
    assert newest(tmp_path, told.append) == path_of(tmp_path, 99999999)
    assert len(told) == 1
    assert "step-100000000.ckpt is cut short" in told[0]
    assert newest(tmp_path / "none", print) is None


@pytest.mark.parametrize("stage", ["torch.save", "os.fsync", "os.replace"])
def test_killed_while_writing(tmp_path, seed, stage):
    """Half way, before the file is on the disk, and between there and its name: the older one stays."""
    path = path_of(tmp_path, 1)
    write(path, content(seed))
    pid = os.fork()
    if not pid:
        try:

            def die(*args, **options):
                if stage == "torch.save":
                    args[1].write(b"half of it")
                    args[1].file.flush()
                os.kill(os.getpid(), 9)

            module, name = stage.split(".")
            setattr({"torch": checkpoint_module.torch, "os": files_module.os}[module], name, die)
            write(path, content(seed + 1))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == KILLED
    verify(path)
    assert torch.equal(read(path)["state_dict"]["a"], content(seed)["state_dict"]["a"])
    assert newest(tmp_path, pytest.fail) == path
    write(path, content(seed + 2))  # and what is left over is in nobody's way
    assert torch.equal(read(path)["state_dict"]["a"], content(seed + 2)["state_dict"]["a"])
    assert len(list(tmp_path.iterdir())) == 1


class Code:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("sealed", [False, True])
def test_code_is_never_run(tmp_path, seed, sealed, monkeypatch):
    """As a stranger's file, and with a checksum that is right."""
    monkeypatch.chdir(tmp_path)
    path = path_of(tmp_path, 1)
    evil = {"state_dict": {}, "x": Code()}
    write(path, evil) if sealed else torch.save(evil, path)
    with pytest.raises(CheckpointError, match="no data" if sealed else "no checkpoint of dualenc"):
        read(path)
    assert not (tmp_path / "owned").exists()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was killed after step 7; checkpoints are of 4 and 6."""
    folder = tmp_path_factory.mktemp("stopped")
    fit = data(folder, 7)
    assert run([*fit, "--trainer.callbacks", '[{"class_path": "runs.Kill", "init_args": {"step": 7}}]'], folder) == [-9]
    return folder, fit


@pytest.fixture
def part(stopped, tmp_path):
    shutil.copytree(stopped[0] / "run", tmp_path / "run")
    return tmp_path


@pytest.fixture(scope="module")
def whole(stopped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(stopped[1], folder) == [0]
    return folder


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_damaged_ones_are_named_and_passed_over(stopped, part, whole, how):
    folder = part / "run" / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["step-00000006.ckpt", "step-00000004.ckpt"]
    spoil(checkpoints(folder)[0], how)
    assert run([*stopped[1], "--ckpt_path", "auto"], part) == [0]
    text = (part / "log-0").read_text()
    assert "step-00000006.ckpt is " in text
    assert "passed over" in text
    assert logged(part) == logged(whole)
    assert end(part) == end(whole)
    # It was moved away: it stands in no later run's way.
    assert (folder / "step-00000006.stale").exists()


def test_all_damaged(stopped, part, capsys):
    for path in checkpoints(part / "run" / "checkpoints"):
        spoil(path, "flipped")
    for which in ("auto", "last"):
        line = fails(capsys, [*stopped[1], "--trainer.default_root_dir", str(part / "run"), "--ckpt_path", which])
        assert "all checkpoints in" in line


def test_a_newer_format_is_not_passed_over(stopped, part, capsys):
    newest_one = checkpoints(part / "run" / "checkpoints")[0]
    spoil(newest_one, "newer")
    line = fails(capsys, [*stopped[1], "--trainer.default_root_dir", str(part / "run"), "--ckpt_path", "auto"])
    assert f"{newest_one} has format 2, newer than 1" in line
    assert "upgrade" in line


def test_a_stale_newest_after_an_older_one_was_asked_for(stopped, part, whole):
    """What lies behind the checkpoint that a run begins from is no longer what `auto` begins from."""
    folder = part / "run" / "checkpoints"
    kill = ["--trainer.callbacks", '[{"class_path": "runs.Kill", "init_args": {"step": 5}}]']
    assert run([*stopped[1], *kill, "--ckpt_path", str(path_of(folder, 4))], part) == [KILLED]
    assert newest(folder, pytest.fail) == path_of(folder, 4)
    assert run([*stopped[1], "--ckpt_path", "auto"], part) == [0]
    assert end(part) == end(whole)
    assert logged(part) == logged(whole)


def test_a_full_disk(stopped, tmp_path, whole, monkeypatch):
    """From a step on no file may be as large as a checkpoint: a warning, training goes on, the old one stays."""
    size = path_of(stopped[0] / "run" / "checkpoints", 6).stat().st_size
    monkeypatch.setattr("runs.LIMIT", size - 1000, raising=False)
    monkeypatch.setattr("runs.LIMIT_AT", 5, raising=False)
    callback = ["--trainer.callbacks", '[{"class_path": "runs.FullDisk"}]', "--run.failed_saves", "100"]
    assert run([*stopped[1], *callback], tmp_path) == [0]
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["step-00000004.ckpt", "step-00000002.ckpt"]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    text = (tmp_path / "log-0").read_text()
    assert "checkpoint of step 6" in text
    assert "File too large" in text
    assert logged(tmp_path) == logged(whole)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 27
    # With room again, it goes on from there to the same end.
    assert run([*stopped[1], "--ckpt_path", "auto"], tmp_path) == [0]
    assert end(tmp_path) == end(whole)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_too_many_failed_saves_end_the_run_on_all_ranks(stopped, tmp_path, world, monkeypatch):
    monkeypatch.setattr("runs.LIMIT", 20_000, raising=False)
    monkeypatch.setattr("runs.LIMIT_AT", 5, raising=False)
    callback = ["--trainer.callbacks", '[{"class_path": "runs.FullDisk"}]', "--run.failed_saves", "2"]
    assert run([*stopped[1], *callback], tmp_path, world) == [1] * world
    text = (tmp_path / "log-0").read_text()
    assert "2 times in a row" in text
    assert "File too large" in text
    assert "Traceback" not in text
    assert newest(tmp_path / "run" / "checkpoints", pytest.fail) == path_of(tmp_path / "run" / "checkpoints", 4)


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--data.batch_size", "8", "batch_size"),
        ("--seed_everything", "8", "seed"),
        ("--data.window", "2", "window"),
        ("--data.captions", "txt", "captions"),
        ("--data.select", "number > 3", "fingerprint"),
    ],
)
def test_other_settings_are_refused_by_name(stopped, part, capsys, option, value, name):
    again = [*stopped[1], "--trainer.default_root_dir", str(part / "run"), "--ckpt_path", "last", option, value]
    line = fails(capsys, again)
    assert f"the checkpoint's run had {name} " in line
    assert f"--run.accept_changes '[{name}]'" in line
    assert name in fails(capsys, [*again, "--run.accept_changes", "[other]"])  # accepting something else does not help


def test_other_settings_that_are_accepted(stopped, part, whole):
    """The run goes on at the beginning of the next epoch, with all of its samples."""
    rows = f'[{{"class_path": "runs.Rows", "init_args": {{"folder": "{part / "rows"}"}}}}]'
    change = ["--data.batch_size", "6", "--run.accept_changes", "[batch_size]", "--trainer.callbacks", rows]
    assert run([*stopped[1], *change, "--ckpt_path", "last"], part) == [0], (part / "log-0").read_text()
    lines = [json.loads(line) for line in (part / "rows" / "0.jsonl").read_text().splitlines()]
    assert [step for step, _ in lines] == list(range(7, 19))  # after 6 steps two epochs of 6
    for epoch in (lines[:6], lines[6:]):
        seen = [row for _, rows in epoch for row in rows]
        assert len(set(seen)) == 36
    record = json.loads((part / "run" / "run.json").read_text())
    assert record["samples_seen"] == 6 * 4 + 12 * 6


def test_where_checkpoints_come_from(stopped, part, capsys, tmp_path):
    root = ["--trainer.default_root_dir", str(tmp_path / "new")]
    for url in ("https://example.org/step-00000001.ckpt", "http://127.0.0.1:1/x.ckpt", "s3://bucket/x.ckpt"):
        assert f"{url} is no local file" in fails(capsys, [*stopped[1], *root, "--ckpt_path", url])
    assert "holds no checkpoint" in fails(capsys, [*stopped[1], *root, "--ckpt_path", "last"])
    torch.save({"state_dict": {}, "x": Code()}, tmp_path / "evil.ckpt")
    line = fails(capsys, [*stopped[1], *root, "--ckpt_path", str(tmp_path / "evil.ckpt")])
    assert "evil.ckpt" in line
    line = fails(capsys, [*stopped[1], *root, "--ckpt_path", str(tmp_path / "gone.ckpt")])
    assert "gone.ckpt is no local file" in line
    assert not (tmp_path / "new" / "run.json").exists()


def test_what_a_checkpoint_holds_does_not_override_the_command_line(stopped, part, monkeypatch):
    """Hyperparameters, as Lightning stores them, with a module to import and another model: neither is looked at."""
    path = checkpoints(part / "run" / "checkpoints")[0]
    found = read(path)
    (part / "evil_module.py").write_text("open('imported', 'w')\nclass Model: pass\n")
    monkeypatch.syspath_prepend(str(part))
    found["hyper_parameters"] = {
        "_class_path": "evil_module.Model", "_instantiator": "evil_module.Model", "embed_dim": 999, "model": {"x": 1},
    }  # fmt: skip
    found["datamodule_hyper_parameters"] = {"batch_size": 999, "_class_path": "evil_module.Model"}
    found["hparams_name"] = "kwargs"
    write(path, found)
    monkeypatch.chdir(part)
    assert run([*stopped[1], "--ckpt_path", "last"], part) == [0]
    assert not (part / "imported").exists()


def test_the_ranks_have_to_begin_alike(stopped, part):
    """As where a file system shows one machine what another one does not see yet."""
    folder = part / "run" / "checkpoints"
    fit = [*stopped[1], "--ckpt_path", str(path_of(folder, 4))]
    first, second = begin(fit, part, 2, other=str(path_of(folder, 6)))
    assert first.wait() == 2
    assert second.wait() == 2
    assert re.search("rank 0 .* step 4, rank 1 .* step 6", first.text())
