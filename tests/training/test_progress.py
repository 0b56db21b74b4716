"""Progress of a run: the lines of a log, and the line at the bottom of a terminal."""

import csv
import io
import json
import random
import re
import sys
from pathlib import Path

import pytest
from fits import SMOKE, small_fit
from helpers import write_tar

from dualenc.training.progress import StatusLine
from dualenc.utils.text import clock_time


class Screen(io.StringIO):
    """Terminal of 80 columns that keeps its rows, and the longest row that was replaced later.

    Attributes:
        rows: rows as a user sees them.
        replaced: rows that were replaced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.column, self.replaced = [""], 0, set()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for part in re.findall(r"\x1b\[K|\r|\n|[^\r\n\x1b]+", text):
            row = self.rows[-1]
            if part == "\x1b[K":
                self.replaced.add(row)
                self.rows[-1] = row[: self.column]
            elif part == "\r":
                self.column = 0
            elif part == "\n":
                self.rows.append("")
                self.column = 0
            else:
                self.rows[-1] = row[: self.column] + part + row[self.column + len(part) :]
                self.column += len(part)
        return len(text)


def test_printed_text_stays_whole_above_the_line(seed):
    rng = random.Random(seed)
    screen = Screen()
    line = StatusLine(screen)
    printed, shown = "", ""
    for number in range(200):
        if rng.random() < 0.5:
            shown = f"step {number} " + "x" * rng.randrange(150) if rng.random() < 0.9 else ""
            line.show(shown)
        else:  # `print` writes a text and its end one after the other
            text = f"message {number} " + "y" * rng.randrange(60) + rng.choice(["\n", "", "\n\n"])
            printed += text
            line.write(screen, text)
        *above, last = printed.split("\n")
        assert screen.rows[:-1] == above
        assert screen.rows[-1] == (last or shown[:79])


def values_of(run: Path) -> dict[tuple[int, str], float]:
    """Return the metrics in the file of a run, by step and name."""
    with open(run / "metrics.csv") as file:
        return {(int(line["step"]), line["metric"]): float(line["value"]) for line in csv.DictReader(file)}


def broken_shard(folder: Path, count: int) -> None:
    """Write a shard whose pictures cannot be decoded, next to the shards of `small_fit`."""
    samples = [{"__key__": f"broken{i}", "png": b"no picture", "txt": b"a dog"} for i in range(count)]
    (folder / "shards").mkdir(parents=True)
    write_tar(folder / "shards" / "zz.tar", samples)


MESSAGES = re.compile(r"step |saved |\d+ bad sample|\d+ of the last")


def check_measurements(lines: list[str], run: Path) -> None:
    """Compare the lines about measurements, `best/` and checkpoints with the files of the run."""
    metrics = values_of(run)
    measured = [step for step, name in metrics if name == "val/mrr"]
    found = [line for line in lines if "val/mrr" in line and line.startswith("step")]
    assert len(found) == len(measured) > 1
    for line, step in zip(found, measured, strict=True):
        values = ", ".join(f"{name} {metrics[step, name]:.4g}" for name in ("val/loss", "val/mrr"))
        assert re.fullmatch(rf"step {step}/24, epoch \d+: {re.escape(values)}", line)
    of_set = [line for line in lines if re.search(r"epoch \d+: \w+/image_retrieval_recall@1 ", line)]
    assert len(of_set) == len({step for step, name in metrics if name.endswith("/median_rank") and "val" not in name})
    best = max(measured, key=lambda step: metrics[step, "val/mrr"])  # the first one of equals
    assert [line for line in lines if f"{run / 'best'}:" in line][-1].split()[3] == f"{metrics[best, 'val/mrr']:.4g}"
    saved = [line.removeprefix("saved ") for line in lines if line.startswith("saved") and line.endswith(".ckpt")]
    assert {str(path) for path in (run / "checkpoints").glob("*.ckpt")} <= set(saved)


@pytest.mark.long
def test_log_of_a_run_without_a_terminal(tmp_path, seed, capsys):
    """Compare what is printed with what the run has written into its files."""
    broken_shard(tmp_path, 3)
    sick = [{"class_path": "runs.Break", "init_args": {"step": 4, "last": 6, "how": "nan"}}]
    run = small_fit(
        SMOKE, tmp_path, seed, "--trainer.callbacks+", json.dumps(sick[0]), "--trainer.log_every_n_steps", "8"
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if MESSAGES.match(line)]
    metrics = values_of(run)
    logged = [step for step, name in metrics if name == "train/loss"]
    assert logged == [8, 16, 24]
    per_epoch = json.loads((run / "run.json").read_text())["train_pairs"] // 16
    for step, line in zip(logged, (line for line in lines if " samples/s" in line), strict=True):
        loss, rate = metrics[step, "train/loss"], metrics[step, "train/samples_per_second"]
        match = re.fullmatch(rf"step {step}/24, epoch (\d+): loss (\S+), (\S+) samples/s, \d:\d\d:\d\d left", line)
        assert match is not None, line
        assert match.group(2, 3) == (f"{loss:.4g}", f"{rate:,.0f}")
        assert int(match[1]) == -(-step // per_epoch)  # counted from 1
    check_measurements(lines, run)
    skipped = [json.loads(line)["step"] for line in (run / "skipped_steps.jsonl").read_text().splitlines()]
    (first,) = (line for line in lines if "skipped: " in line)  # the following ones are counted
    assert first.startswith(f"step {min(skipped)} skipped: ")
    assert any(line == "3 of the last 8 steps were skipped" for line in lines)
    assert [line for line in lines if "bad sample" in line][-1].split()[0] == str(
        len((run / "bad_samples.jsonl").read_text().splitlines())
    )


@pytest.mark.long
def test_line_of_a_run_on_a_terminal(tmp_path, seed, monkeypatch):
    screen = Screen()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        patch.setenv("TERM", "xterm")
        patch.setattr("dualenc.training.progress.REFRESH", 0.0)
        run = small_fit(SMOKE, tmp_path, seed)
    check_measurements(screen.rows, run)
    assert not any(" left" in row for row in screen.rows)  # the line is gone
    shown = {row for row in screen.replaced if " left" in row}
    assert {row.split("/")[0] for row in shown} == {f"step {step}" for step in range(2, 25)}
    assert all(len(row) < 80 for row in shown)
    *_, summary, last = screen.rows
    assert summary.startswith("24 steps done")
    assert last == ""


@pytest.mark.long
def test_progress_can_be_switched_off(tmp_path, seed, capsys):
    one = '{"class_path": "dualenc.training.EMA"}'  # not in a list
    small_fit(SMOKE, tmp_path, seed, "--trainer.callbacks", one, "--trainer.enable_progress_bar", "false")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("24 steps done")
    assert not any(line.startswith("step ") for line in lines)


def test_clock_time(seed):
    for _ in range(50):
        hours, minutes, seconds = random.randrange(200), random.randrange(60), random.randrange(60)
        text = clock_time(3600 * hours + 60 * minutes + seconds + random.uniform(-0.49, 0.49))
        assert [int(part) for part in text.split(":")] == [hours, minutes, seconds]
        assert re.fullmatch(r"\d+:\d\d:\d\d", text)
