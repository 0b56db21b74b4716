"""The log of a run where it cannot be written, and where it has to go back."""

import errno
import random

import dualenc.utils.files as files_module
from dualenc.training.csv_logger import MetricsFile, cut_back


def test_what_cannot_be_written_is_written_later(tmp_path, seed, monkeypatch, capsys):
    """As on a disk that is full for a while, after a piece of a line: nothing is lost, nothing stands there twice."""
    chance = random.Random(seed)
    full = MetricsFile(tmp_path / "full")
    real = open

    class Short:
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
        value = chance.random()
        broken = chance.random() < 0.5 and step < 39
        monkeypatch.setattr(
            files_module, "open", (lambda *a, **k: Short(real(*a, **k))) if broken else real, raising=False
        )
        full.log_metrics({"a": value, "epoch": 3.0}, step)
        expected += f"{step},a,{value!r}\n"
    assert full.path.read_text() == expected
    assert "No space left on device" in capsys.readouterr().err


def test_going_back(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,metric,value\n1,a,0.5\n2,a,0.25\n3,a,1.0\n\xff\xfe\n2,b,")
    cut_back(path, 2)
    assert path.read_text() == "step,metric,value\n1,a,0.5\n2,a,0.25\n"
    path = tmp_path / "skipped_steps.jsonl"
    path.write_text('{"step": 1}\n{"step": 5}\nno json\n{"step": 2}\n{"st')
    cut_back(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_back(tmp_path / "none.csv", 2)
