"""The log of a run on a full disk, and after a resume from an earlier step."""

import errno
import random

import dualenc.utils.files as files_module
from dualenc.training.csv_logger import MetricsFile, truncate_log


def test_lines_that_cannot_be_written_are_written_later(tmp_path, seed, monkeypatch, capsys):
    """Simulate a disk that is full at times, after half a line: no line is lost or written twice."""
    rng = random.Random(seed)
    log = MetricsFile(tmp_path / "full")
    real = open

    class HalfWritten:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    expected = "step,metric,value\n"
    for step in range(1, 40):
        value = rng.random()
        is_full = rng.random() < 0.5 and step < 39
        monkeypatch.setattr(
            files_module, "open", (lambda *a, **k: HalfWritten(real(*a, **k))) if is_full else real, raising=False
        )
        log.log_metrics({"a": value, "epoch": 3.0}, step)
        expected += f"{step},a,{value!r}\n"
    assert log.log.path.read_text() == expected
    assert "No space left on device" in capsys.readouterr().err


def test_truncated_log_ends_at_the_step(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,metric,value\n1,a,0.5\n2,a,0.25\n3,a,1.0\n\xff\xfe\n2,b,")
    truncate_log(path, 2)
    assert path.read_text() == "step,metric,value\n1,a,0.5\n2,a,0.25\n"
    path = tmp_path / "skipped_steps.jsonl"
    path.write_text('{"step": 1}\n{"step": 5}\nno json\n{"step": 2}\n{"st')
    truncate_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate_log(tmp_path / "none.csv", 2)
