"""The command line: `main` runs a command, `parser.py` lists the commands.

This module loads little, so that Ctrl-C ends a command in one line while the libraries are still being loaded.
"""

import errno
import os
import signal
import sys
from contextlib import suppress

TYPE_CHECKING = False  # type checkers take it as true
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

# GNU's OpenMP, which torch brings along, lets threads spin for milliseconds at the end of each parallel region. Where
# another process has one of the cores, the thread that it delays is waited for in vain, thousands of times a second.
SPIN_COUNT = "1000"
OPENMP_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # variables by which users choose it
PIPE_CLOSED = 141  # exit status of a command whose output is no longer read: 128 and SIGPIPE
INTERRUPTED = 130  # exit status of a command that Ctrl-C ends: 128 and SIGINT


def main(arguments: "Sequence[str] | None" = None) -> None:
    """Run a command; if it fails or is interrupted, exit with its status.

    Args:
        arguments: the command and its options; absent, those of the program.
    """
    limit_spinning()
    before = signal.getsignal(signal.SIGINT)
    # Another handler is somebody's choice: `nohup` and background jobs of a shell ignore the signal.
    handles = before is signal.default_int_handler
    try:
        if handles:
            try:
                signal.signal(signal.SIGINT, _interrupt)
            except ValueError:  # Python allows handlers in the main thread only
                handles = False
        from dualenc.cli.parser import run

        run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:
            sys.stdout.flush()  # so that an error is caught here
    except KeyboardInterrupt:
        _end()
    except OSError as error:
        if error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC):
            _end_without_output()
        raise
    except SystemExit as stop:
        # Lightning turns an interrupt before the first step into a failure.
        if stop.code == 1 and isinstance(stop.__context__, KeyboardInterrupt):
            _end()
        raise
    finally:
        if handles:
            # A program that is ending dies at once, without a message from whatever Python is cleaning up.
            signal.signal(signal.SIGINT, signal.SIG_DFL if arguments is None else before)


def limit_spinning() -> None:
    """Let OpenMP's threads sleep soon when they wait for each other, in this process and those that it starts.

    OpenMP reads the variable when torch is loaded, so nothing is set after that. The user's own choice stays.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in OPENMP_WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def _end() -> None:
    """Exit with the message and the status of an interrupted command."""
    print("dualenc: error: interrupted", file=sys.stderr)
    raise SystemExit(INTERRUPTED) from None


def _end_without_output() -> None:
    """Exit if standard output is closed or full, which one more line shows."""
    try:
        os.write(1, b"\n")
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes at its end too
        if isinstance(error, BrokenPipeError):  # `| head` has its lines
            raise SystemExit(PIPE_CLOSED) from None
        print(f"dualenc: error: standard output: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None


def _interrupt(number: int, frame: "FrameType | None") -> None:
    """Raise KeyboardInterrupt, or end the process at once if Ctrl-C comes while a module is being imported.

    An import has nothing to clean up, and may lose the exception, print it, or raise another one in its place.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            with suppress(Exception):  # the signal may have interrupted a write to the same buffer
                sys.stdout.flush()
            os.write(2, b"dualenc: error: interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt
