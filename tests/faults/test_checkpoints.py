"""Checkpoints that are damaged, cannot be written, do not fit the run, or hold code."""

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
    FORMAT,
    CheckpointError,
    DamagedCheckpoint,
    checkpoint_path,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)

KILLED = -9


def content(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"state_dict": {"a": torch.randn(31, 17, generator=generator)}, "step": 3, "words": ["x", 1.5, None]}


def test_written_content_is_read(tmp_path, seed):
    path = checkpoint_path(tmp_path, 12)
    write_checkpoint(path, content(seed))
    assert path.name == "step-00000012.ckpt"
    found = read_checkpoint(path)
    assert torch.equal(found["state_dict"].pop("a"), content(seed)["state_dict"]["a"])
    assert found == {"state_dict": {}, "step": 3, "words": ["x", 1.5, None]}
    # Other readers of torch files and ZIP archives read it, and a copy keeps its checksum.
    assert torch.load(path, weights_only=True)["step"] == 3
    assert zipfile.ZipFile(path).testzip() is None
    verify_checkpoint(shutil.copy(path, tmp_path / "copy") and tmp_path / "copy")
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_every_changed_bit_is_detected(tmp_path, seed):
    path = checkpoint_path(tmp_path, 1)
    write_checkpoint(path, content(seed))
    whole = path.read_bytes()
    rng = torch.Generator().manual_seed(seed)
    positions = torch.randint(len(whole), (300,), generator=rng).tolist() + list(range(len(whole) - 100, len(whole)))
    for at in positions:
        bit = 1 << (at % 8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        checkpoint_module._verify.cache_clear()
        with pytest.raises(DamagedCheckpoint):
            verify_checkpoint(path)
    for length in [0, 1, 20, *torch.randint(len(whole), (50,), generator=rng).tolist(), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint):
            verify_checkpoint(path)
    path.write_bytes(whole + b"\n")
    with pytest.raises(DamagedCheckpoint):
        verify_checkpoint(path)
    path.write_bytes(whole)
    verify_checkpoint(path)


def test_newest_checkpoint_is_the_last_undamaged_step(tmp_path, seed):
    for step in (9, 99999999, 100000000):
        write_checkpoint(checkpoint_path(tmp_path, step), content(seed))
    (tmp_path / "step-x.ckpt").write_text("")
    assert newest_checkpoint(tmp_path, print) == checkpoint_path(tmp_path, 100000000)
    warnings = []
    spoil(checkpoint_path(tmp_path, 100000000), "truncated")
    assert newest_checkpoint(tmp_path, warnings.append) == checkpoint_path(tmp_path, 99999999)
    assert len(warnings) == 1
    assert "step-100000000.ckpt is truncated" in warnings[0]
    assert newest_checkpoint(tmp_path / "none", print) is None


@pytest.mark.parametrize("stage", ["torch.save", "os.fsync", "os.replace"])
def test_killed_while_writing(tmp_path, seed, stage):
    """Kill the process while it writes the content, syncs the file or renames it: the older checkpoint stays."""
    path = checkpoint_path(tmp_path, 1)
    write_checkpoint(path, content(seed))
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
            write_checkpoint(path, content(seed + 1))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == KILLED
    verify_checkpoint(path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["a"], content(seed)["state_dict"]["a"])
    assert newest_checkpoint(tmp_path, pytest.fail) == path
    write_checkpoint(path, content(seed + 2))  # a file that the killed process left is overwritten
    assert torch.equal(read_checkpoint(path)["state_dict"]["a"], content(seed + 2)["state_dict"]["a"])
    assert len(list(tmp_path.iterdir())) == 1


class Code:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("sealed", [False, True])
def test_code_in_a_checkpoint_is_never_run(tmp_path, seed, sealed, monkeypatch):
    """Code is refused in a file without a checksum, and in one with a correct checksum."""
    monkeypatch.chdir(tmp_path)
    path = checkpoint_path(tmp_path, 1)
    evil = {"state_dict": {}, "x": Code()}
    write_checkpoint(path, evil) if sealed else torch.save(evil, path)
    with pytest.raises(CheckpointError, match="more than data" if sealed else "not a checkpoint of dualenc"):
        read_checkpoint(path)
    assert not (tmp_path / "owned").exists()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Run until step 7 and kill the run; the checkpoints are those of steps 4 and 6."""
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
def test_damaged_checkpoints_are_named_and_skipped(stopped, part, whole, how):
    folder = part / "run" / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000006.ckpt", "step-00000004.ckpt"]
    spoil(list_checkpoints(folder)[0], how)
    assert run([*stopped[1], "--ckpt_path", "auto"], part) == [0]
    text = (part / "log-0").read_text()
    assert "step-00000006.ckpt is " in text
    assert "; skipped" in text
    assert logged(part) == logged(whole)
    assert end(part) == end(whole)
    # It was renamed, so that no later run considers it.
    assert (folder / "step-00000006.stale").exists()


def test_run_does_not_start_if_all_checkpoints_are_damaged(stopped, part, capsys):
    for path in list_checkpoints(part / "run" / "checkpoints"):
        spoil(path, "flipped")
    for which in ("auto", "last"):
        line = fails(capsys, [*stopped[1], "--trainer.default_root_dir", str(part / "run"), "--ckpt_path", which])
        assert "all checkpoints in" in line


def test_newer_format_ends_the_command(stopped, part, capsys):
    newest = list_checkpoints(part / "run" / "checkpoints")[0]
    spoil(newest, "newer")
    line = fails(capsys, [*stopped[1], "--trainer.default_root_dir", str(part / "run"), "--ckpt_path", "auto"])
    assert f"{newest} has format {FORMAT + 1}" in line
    assert "upgrade" in line


def test_resume_from_an_older_checkpoint_makes_newer_ones_stale(stopped, part, whole):
    """After a resume from an older checkpoint, `auto` no longer considers the newer ones."""
    folder = part / "run" / "checkpoints"
    kill = ["--trainer.callbacks", '[{"class_path": "runs.Kill", "init_args": {"step": 5}}]']
    assert run([*stopped[1], *kill, "--ckpt_path", str(checkpoint_path(folder, 4))], part) == [KILLED]
    assert newest_checkpoint(folder, pytest.fail) == checkpoint_path(folder, 4)
    assert run([*stopped[1], "--ckpt_path", "auto"], part) == [0]
    assert end(part) == end(whole)
    assert logged(part) == logged(whole)


def test_full_disk(stopped, tmp_path, whole, monkeypatch):
    """From step 5 on, no file may be as large as a checkpoint: training continues, the older checkpoints stay."""
    size = checkpoint_path(stopped[0] / "run" / "checkpoints", 6).stat().st_size
    monkeypatch.setattr("runs.LIMIT", size - 1000, raising=False)
    monkeypatch.setattr("runs.LIMIT_AT", 5, raising=False)
    callback = ["--trainer.callbacks", '[{"class_path": "runs.FullDisk"}]', "--run.failed_saves", "100"]
    assert run([*stopped[1], *callback], tmp_path) == [0]
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000004.ckpt", "step-00000002.ckpt"]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    text = (tmp_path / "log-0").read_text()
    assert "checkpoint of step 6" in text
    assert "File too large" in text
    assert logged(tmp_path) == logged(whole)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 27
    # With room on the disk again, the run resumes to the same end.
    assert run([*stopped[1], "--ckpt_path", "auto"], tmp_path) == [0]
    assert end(tmp_path) == end(whole)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_too_many_failed_saves_end_the_run_on_all_ranks(stopped, tmp_path, world, monkeypatch):
    monkeypatch.setattr("runs.LIMIT", 20_000, raising=False)
    monkeypatch.setattr("runs.LIMIT_AT", 5, raising=False)
    callback = ["--trainer.callbacks", '[{"class_path": "runs.FullDisk"}]', "--run.failed_saves", "2"]
    assert run([*stopped[1], *callback], tmp_path, world) == [1] * world
    text = (tmp_path / "log-0").read_text()
    assert "2 consecutive times" in text
    assert "File too large" in text
    assert "Traceback" not in text
    assert newest_checkpoint(tmp_path / "run" / "checkpoints", pytest.fail) == checkpoint_path(
        tmp_path / "run" / "checkpoints", 4
    )


def test_checkpoints_that_are_not_local_files_are_refused(stopped, part, capsys, tmp_path):
    root = ["--trainer.default_root_dir", str(tmp_path / "new")]
    for url in ("https://example.org/step-00000001.ckpt", "http://127.0.0.1:1/x.ckpt", "s3://bucket/x.ckpt"):
        assert f"--ckpt_path {url} " in fails(capsys, [*stopped[1], *root, "--ckpt_path", url])
    assert "holds no checkpoint" in fails(capsys, [*stopped[1], *root, "--ckpt_path", "last"])
    torch.save({"state_dict": {}, "x": Code()}, tmp_path / "evil.ckpt")
    line = fails(capsys, [*stopped[1], *root, "--ckpt_path", str(tmp_path / "evil.ckpt")])
    assert "evil.ckpt" in line
    line = fails(capsys, [*stopped[1], *root, "--ckpt_path", str(tmp_path / "gone.ckpt")])
    assert "gone.ckpt does not exist" in line
    assert not (tmp_path / "new" / "run.json").exists()


def test_hyperparameters_in_a_checkpoint_are_ignored(stopped, part, monkeypatch):
    """Store hyperparameters as Lightning does, with a module to import: they do not override the command line."""
    path = list_checkpoints(part / "run" / "checkpoints")[0]
    found = read_checkpoint(path)
    (part / "evil_module.py").write_text("open('imported', 'w')\nclass Model: pass\n")
    monkeypatch.syspath_prepend(str(part))
    found["hyper_parameters"] = {
        "_class_path": "evil_module.Model", "_instantiator": "evil_module.Model", "embed_dim": 999, "model": {"x": 1},
    }  # fmt: skip
    found["datamodule_hyper_parameters"] = {"batch_size": 999, "_class_path": "evil_module.Model"}
    found["hparams_name"] = "kwargs"
    write_checkpoint(path, found)
    monkeypatch.chdir(part)
    assert run([*stopped[1], "--ckpt_path", "last"], part) == [0]
    assert not (part / "imported").exists()


def test_ranks_that_resume_from_different_checkpoints_are_refused(stopped, part):
    """Simulate a file system on which one machine does not see the newest checkpoint yet."""
    folder = part / "run" / "checkpoints"
    fit = [*stopped[1], "--ckpt_path", str(checkpoint_path(folder, 4))]
    first, second = begin(fit, part, 2, other=str(checkpoint_path(folder, 6)))
    assert first.wait() == 2
    assert second.wait() == 2
    assert re.search("rank 0 .* step 4, rank 1 .* step 6", first.text())
