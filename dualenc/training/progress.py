"""The progress of a run: lines for a log, or one line that is kept up to date at the bottom of a terminal."""

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from lightning.pytorch import Callback

from dualenc.report import Section
from dualenc.training.lightning_internals import steps_at_end
from dualenc.utils.text import clock_time, plural, print_message

REFRESH = 0.2  # seconds between two updates of the line on a terminal
ERASE = "\r\x1b[K"  # to the start of the line, and erase to its end


class StatusLine:
    """The last line of a terminal, below everything that the program prints in the meantime.

    Args:
        terminal: stream of the terminal.
    """

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._text = ""
        self._in_line = False  # whether a line has been printed without its end

    @property
    def width(self) -> int:
        """Number of characters that fit on the line."""
        columns = 0
        with suppress(OSError, ValueError):
            columns = os.get_terminal_size(self._terminal.fileno()).columns
        return (columns or 80) - 1  # a character in the last column may begin a new line

    def show(self, text: str) -> None:
        """Replace the line; an empty text removes it."""
        self._text = text[: self.width]
        if not self._in_line:
            self._draw(self._text)

    def write(self, stream: TextIO, text: str) -> int:
        """Write text of the program to a stream, above the line."""
        if not self._in_line:
            self._draw("")
        count = stream.write(text)
        if text:
            self._in_line = not text.endswith("\n")
        if not self._in_line and self._text:
            stream.flush()
            self._draw(self._text)
        return count

    def _draw(self, text: str) -> None:
        with suppress(OSError):  # a terminal that was closed must not end a run
            self._terminal.write(ERASE + text)
            self._terminal.flush()


class _Above:
    """A standard stream that writes above a `StatusLine`."""

    def __init__(self, stream: TextIO, line: StatusLine) -> None:
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        return self._line.write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Progress(Callback):
    """Callback that prints the progress of a run, on rank 0.

    Without a terminal a line is printed every `trainer.log_every_n_steps` steps. On a terminal one line is kept up to
    date. Its loss and its rate are those of the last log, so that no step waits for the device. In both cases each
    measurement is a line of its own, and so are new bad samples.
    """

    def __init__(self) -> None:
        self._line: StatusLine | None = None  # on a terminal
        self._streams = ExitStack()
        self._trainer: Any = None
        self._total = 0  # steps of the run
        self._first: tuple[int, float] | None = None  # first step of this process, and the time when it was done
        self._logged: Mapping[str, float] = {}  # last metrics of training
        self._bad = 0  # bad samples that were printed
        self._updated = 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin the line if there is a terminal."""
        self._trainer = trainer
        if trainer.is_global_zero and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._line = line = StatusLine(sys.stderr)
            self._streams.enter_context(redirect_stderr(cast(TextIO, _Above(sys.stderr, line))))
            if sys.stdout.isatty():
                self._streams.enter_context(redirect_stdout(cast(TextIO, _Above(sys.stdout, line))))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the line."""
        if self._line is not None:
            self._line.show("")
        self._line = None
        self._streams.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the line, after which the error is printed."""
        self.teardown(trainer, pl_module, "")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the steps to do, and print from now on what the task publishes."""
        self._total = steps_at_end(trainer)
        if trainer.is_global_zero:
            self._bad = len(trainer.datamodule.bad_sample_log)
            pl_module.print_metrics = self.print_metrics

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the line."""
        if self._first is None:  # the first step has waited for workers and compilers
            self._first = trainer.global_step, time.monotonic()
        if self._line is not None:
            self._update(self._place(trainer.global_step), self._values(trainer.global_step))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the line."""
        if self._line is not None:
            self._line.show("")

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the line."""
        self._count("validating", batch_idx, trainer.num_val_batches)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the line."""
        self._count("testing", batch_idx, trainer.num_test_batches)

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the line."""
        self._count("predicting", batch_idx, trainer.num_predict_batches)

    def print_metrics(self, metrics: Mapping[str, float], step: int, names: Iterable[str]) -> None:
        """Print metrics of the run.

        Args:
            metrics: values by name.
            step: step of the values.
            names: metrics to print of a measurement, the monitored one aside.
        """
        if "train/loss" in metrics:
            self._logged = metrics
            if self._line is None:
                print_message(_joined(self._place(step), self._values(step)))
            if (skipped := metrics["train/skipped_steps"]) > 1:
                print_message(f"{skipped:,} of the last {self._trainer.log_every_n_steps:,} steps were skipped")
        else:
            monitor = self._trainer.lightning_module.run_state.monitor
            values = [f"{name} {metrics[name]:.4g}" for name in dict.fromkeys([*names, monitor]) if name in metrics]
            if values:
                print_message(_joined(self._place(step), values))
        self._print_bad_samples()

    def _print_bad_samples(self) -> None:
        log = self._trainer.datamodule.bad_sample_log
        if (count := len(log)) > self._bad:
            where = f", named in {log.log.path}" if log.log is not None else ""
            print_message(f"{plural(count, 'bad sample')} so far, {count - self._bad:,} of them new{where}")
            self._bad = count

    def _place(self, step: int) -> str:
        epoch, epochs = self._trainer.current_epoch + 1, self._trainer.max_epochs
        of_epochs = f"/{epochs:,}" if epochs is not None and epochs > 0 else ""
        return f"step {step:,}/{self._total:,}, epoch {epoch:,}{of_epochs}"

    def _values(self, step: int) -> list[str]:
        """Return the loss and the rate of the last log, and the time left, as far as known."""
        parts: list[str] = []
        if self._logged:
            rate = self._logged["train/samples_per_second"]
            parts += [f"loss {self._logged['train/loss']:.4g}", f"{rate:,.0f} samples/s"]
        if self._first is not None and step > self._first[0]:
            first, since = self._first
            seconds = (time.monotonic() - since) / (step - first) * (self._total - step)
            parts.append(f"{clock_time(seconds)} left")
        return parts

    def _count(self, what: str, batch: int, totals: Sequence[float]) -> None:
        place = self._place(self._trainer.global_step) if self._trainer.state.fn == "fit" else ""
        self._update(place, [f"{what} batch {batch + 1:,}/{totals[0]:,}"])

    def _update(self, place: str, values: list[str]) -> None:
        """Update the line, at most every `REFRESH` seconds, without values before the last that do not fit."""
        now = time.monotonic()
        if self._line is None or now - self._updated < REFRESH:
            return
        self._updated = now
        while len(values) > 1 and len(_joined(place, values)) > self._line.width:
            values.pop(-2)
        self._line.show(_joined(place, values))


def _joined(place: str, values: Sequence[str]) -> str:
    return ": ".join(part for part in (place, ", ".join(values)) if part)


def primary_metrics(sections: Iterable[Section]) -> list[str]:
    """Return the names of the primary metrics of evaluation sets or heads, as `SET/METRIC`."""
    found = []
    for section in sections:
        metrics = section.result["metrics"]
        found += [f"{section.result['dataset']}/{x}" for x in section.description.headlines if x in metrics][:1]
    return found
