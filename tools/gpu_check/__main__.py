"""Command line of the check of a new GPU: `python -m tools.gpu_check --out DIR [--quick]`.

Each step runs in a process of its own, so that neither a crash nor a step that hangs ends the others. The results are
written after each step.
"""

import argparse
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tools.gpu_check import exact, speed
from tools.gpu_check.findings import Finding, Machine, write

# In order of value, each with the seconds that it may take.
STEPS: dict[str, tuple[Callable[[Machine], list[Finding]], int]] = {
    "device": (exact.device, 60),
    "forward": (exact.forward, 120),
    "losses": (exact.losses, 120),
    "attention kernel": (exact.attention_kernel, 60),
    "waits": (exact.waits, 120),
    "training step": (speed.training_step, 360),
    "packed texts": (speed.packed_texts, 120),
    "large losses": (speed.large_losses, 180),
    "resume": (exact.resume, 240),
    "compile": (speed.compiled, 240),
    "memory": (exact.memory, 120),
    "loader": (speed.loader, 60),
}


def main() -> None:
    """Run all steps, or the one step of a child process."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu_check.json and gpu_check.md")
    parser.add_argument("--quick", action="store_true", help="small sizes: whether everything runs, without figures")
    parser.add_argument("--step", choices=STEPS, help="run one step only")
    arguments = parser.parse_args()
    about = in_process(exact.facts, 60)
    facts = {
        "command": f"python -m tools.gpu_check{' --quick' if arguments.quick else ''}",
        **(about if isinstance(about, dict) else {"device": about}),
        "date": str(date.today()),
    }
    findings: list[Finding] = []
    begin = time.monotonic()
    for name in [arguments.step] if arguments.step else STEPS:
        step, most = STEPS[name]
        found = in_process(partial(_run, step, arguments.quick), most)
        new = found if isinstance(found, list) else [Finding(name, "end of the step", "", "", "fail", str(found))]
        findings += new
        write(arguments.out, facts, findings)
        for one in new:
            print(f"{time.monotonic() - begin:5.0f} s  {one.step}: {one.what} {one.value} {one.verdict}", flush=True)
    print(f"{arguments.out / 'gpu_check.md'}: {len(findings)} findings")
    raise SystemExit(1 if any(one.verdict == "fail" for one in findings) else 0)


def _run(step: Callable[[Machine], list[Finding]], quick: bool) -> list[Finding]:
    return step(exact.machine(quick))


def in_process(function: Callable[[], Any], seconds: float) -> Any:
    """Call a function in a forked process, and return its result, or a text that says why there is none.

    This process has imported everything and must not touch the GPU, which a forked process could not use then.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(function, sender))
    process.start()
    sender.close()
    result: Any = f"more than {seconds:g} s"
    try:
        if receiver.poll(seconds):
            result = receiver.recv()
    except EOFError:
        process.join()
        result = f"the process ended with status {process.exitcode}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that a step has started
        process.kill()
        process.join()
    return result


def _send(function: Callable[[], Any], sender: Connection) -> None:
    os.setsid()
    try:
        sender.send(function())
    except Exception as error:
        sender.send(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}")


if __name__ == "__main__":
    main()
