"""Findings of the steps of the check, and their tables."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["pass", "fail", "no expectation yet", "not measured"]


@dataclass(frozen=True)
class Finding:
    """A figure with what was expected of it.

    Attributes:
        step: step that found it.
        what: what was measured.
        value: the figure as text, with its unit.
        expected: the expected figure as text; empty if none is known.
        verdict: whether the figure is as expected, or why nothing can be said.
        note: how it was measured, or why it was not.
    """

    step: str
    what: str
    value: str
    expected: str
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """Machine of the check, which tells what its figures mean.

    Attributes:
        device: "cuda" where torch finds such a device, else "cpu".
        computes: the device computes, so that values mean something; a device for tests of the host may not.
        quick: sizes are small.
    """

    device: str
    computes: bool
    quick: bool

    @property
    def times_mean_something(self) -> bool:
        """True on a GPU at full sizes: small work measures the host."""
        return self.device == "cuda" and self.computes and not self.quick

    def value(self, step: str, what: str, value: float, form: str, most: float, note: str = "") -> Finding:
        """Compare a figure that depends on computed values with its bound: it must be at most `most`."""
        if not self.computes:
            return Finding(step, what, "", f"at most {most:g}", "not measured", "the device does not compute")
        return Finding(step, what, f"{value:{form}}", f"at most {most:g}", "pass" if value <= most else "fail", note)

    def speed(self, step: str, what: str, value: float, form: str, least: float | None, note: str = "") -> Finding:
        """Compare a rate, or a ratio of rates, with its bound `least`; None if no bound is known."""
        expected = "" if least is None else f"at least {least:g}"
        if not self.times_mean_something:
            why = "small sizes" if self.device == "cuda" and self.computes else "times mean nothing on this device"
            return Finding(step, what, "", expected, "not measured", why)
        verdict: Verdict = "no expectation yet" if least is None else "pass" if value >= least else "fail"
        return Finding(step, what, f"{value:{form}}", expected, verdict, note)


def write(out: Path, facts: dict[str, Any], findings: Sequence[Finding]) -> None:
    """Write `gpu_check.json`, and `gpu_check.md` with the table for the documentation."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"facts": facts, "findings": [asdict(one) for one in findings]}
    (out / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "gpu_check.md").write_text(table(facts, findings))


def table(facts: dict[str, Any], findings: Sequence[Finding]) -> str:
    """Return the findings as a page in Markdown."""
    about = "; ".join(f"{name} {value}" for name, value in facts.items())
    lines = [f"`{facts.get('command', 'python -m tools.gpu_check')}`: {about}.", ""]
    lines += ["| step | what | found | expected | verdict | note |", "|---|---|---|---|---|---|"]
    for one in findings:
        cells = (one.step, one.what, one.value, one.expected, one.verdict, one.note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
