"""The check of a GPU: its verdicts, its processes, and its steps on a CPU."""

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest

from tools.gpu_check import exact
from tools.gpu_check.__main__ import STEPS, in_process
from tools.gpu_check.findings import Finding, Machine, write

GPU = Machine("cuda", computes=True, quick=False)
NO_VALUES = Machine("cuda", computes=False, quick=False)


def test_verdicts_of_values_and_speeds() -> None:
    assert GPU.value("a", "error", 1e-6, ".1e", 1e-5).verdict == "pass"
    assert GPU.value("a", "error", 1e-4, ".1e", 1e-5).verdict == "fail"
    assert GPU.value("a", "error", float("nan"), ".1e", 1e-5).verdict == "fail"
    assert GPU.speed("a", "ratio", 2.0, ".2f", 1.8).verdict == "pass"
    assert GPU.speed("a", "ratio", 1.7, ".2f", 1.8).verdict == "fail"
    assert GPU.speed("a", "rate", 1.7, ".2f", None).verdict == "no expectation yet"


@pytest.mark.parametrize("machine", [NO_VALUES, Machine("cpu", True, False), Machine("cuda", True, True)])
def test_times_that_mean_nothing_are_not_measured(machine: Machine) -> None:
    found = machine.speed("a", "ratio", 2.0, ".2f", 1.8)
    assert (found.verdict, found.value, found.expected) == ("not measured", "", "at least 1.8")
    assert machine.value("a", "error", 0.0, ".1e", 1e-5).verdict == ("pass" if machine.computes else "not measured")


def test_the_page_and_the_json_have_every_finding(tmp_path: Path) -> None:
    found = [
        Finding("losses", "an | error", "1e-6", "at most 1e-5", "pass"),
        Finding("waits", "w", "", "", "fail", "x"),
    ]
    write(tmp_path / "out", {"device": "a GPU"}, found)
    content = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert [Finding(**one) for one in content["findings"]] == found
    rows = (tmp_path / "out" / "gpu_check.md").read_text().splitlines()[-2:]
    assert [row.replace("\\|", "").count("|") for row in rows] == [7, 7]


def crash() -> None:
    os._exit(3)


def fail() -> None:
    raise ValueError("no such kernel\nand more")


def test_a_step_that_ends_badly_is_said_and_ends_nothing_else() -> None:
    assert in_process(partial(sum, [1, 2]), 60) == 3
    assert "status 3" in in_process(crash, 60)
    assert in_process(fail, 60) == "ValueError: no such kernel"
    assert in_process(partial(time.sleep, 600), 0.1) == "more than 0.1 s"


def test_the_exact_steps_pass_on_a_cpu() -> None:
    machine = Machine("cpu", True, True)
    for step in (exact.forward, exact.losses):
        found = step(machine)
        assert found
        assert {one.verdict for one in found} == {"pass"}
    for step in (exact.device, exact.attention_kernel, exact.waits, exact.memory):
        assert {one.verdict for one in step(machine)} == {"not measured"}
    assert sum(seconds for _, seconds in STEPS.values()) <= 30 * 60
