"""Tests of the arithmetic and the processes of tools/bench; no time is asserted."""

import json
import os
import random
from functools import partial
from statistics import median

import pytest
import torch

import tools.bench.text as bench_text
from tools.bench.runner import Result, Side, Spread, compare, process_memory, process_tree


def noisy_result(seed: int, rounds: int = 6) -> Result:
    """Return rounds on a machine whose speed varies by a factor of ten, equally for both sides."""
    rng = random.Random(seed)
    slow = [10 ** rng.random() for _ in range(rounds)]
    factor = [rng.uniform(2, 3) for _ in range(rounds)]
    return Result(
        name="given",
        unit="apples",
        seconds={"peer": [2 * s for s in slow], "ours": [s / f for s, f in zip(slow, factor)]},
        cpu={"peer": [2.0] * rounds, "ours": [0.5] * rounds},
        units={"peer": [8.0] * rounds, "ours": [4.0] * rounds},
        peak_mib={"peer": 20.0, "ours": 10.0},
        reference="peer",
        cores=1,
    )


def test_ratio_is_taken_within_a_round(seed):
    result = noisy_result(seed)
    factor = [a / 2 / b for a, b in zip(result.seconds["peer"], result.seconds["ours"])]
    assert result.ratios("ours") == pytest.approx(factor)  # Half the units give half the speed for the same seconds.
    assert result.ratios("ours", cpu=True) == pytest.approx([2.0] * 6)
    assert result.ratios("peer") == [1.0] * 6
    assert result.rates("ours") == pytest.approx([4 / s for s in result.seconds["ours"]])


def test_spread_is_the_quartiles():
    assert Spread.of([5, 1, 4, 2, 3]) == Spread(3, 2, 4)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread(1.234, 1, 2).show(".1f") == "1.2 (1.0 to 2.0)"


def test_table_and_json_agree(seed, tmp_path, capsys):
    result = noisy_result(seed)
    result.notes.append("Apples of one tree.")
    result.write(tmp_path)
    data, page = json.loads((tmp_path / "given.json").read_text()), (tmp_path / "given.md").read_text()
    assert capsys.readouterr().out == page
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in page.splitlines() if "|" in line
    }
    for side, found in data["sides"].items():
        assert found["ratio"]["median"] == pytest.approx(median(result.ratios(side)))
        assert rows[side][1].startswith(f"{found['rate']['median']:.1f} (")
        assert rows[side][2].startswith(f"{found['ratio']['median']:.2f} (")
        assert rows[side][3].startswith(f"{found['cpu_ratio']['median']:.2f} (")
        assert rows[side][4] == f"{found['peak_mib']:.0f}"
    assert "- Apples of one tree." in page
    assert data["versions"]["torch"] in page
    assert data["machine"]["cpu"] in page


def holds(mib: int):
    """Make a side that allocates memory in its first round only and returns the number of rounds so far."""
    done = []

    def run() -> float:
        done.append(bytearray(os.urandom(1024)) * (1024 * mib) if not done else b"")
        done[0] = b""
        return len(done)

    return run


def fails():
    raise ValueError("no such apple")


@pytest.mark.slow
def test_each_side_has_its_own_process():
    before = len(process_tree(os.getpid()))
    result = compare(
        "memory", "rounds", [Side("small", partial(holds, 1)), Side("large", partial(holds, 40))], "small", 2
    )
    assert result.units == {"small": [2.0, 3.0], "large": [2.0, 3.0]}  # One warm-up round came before.
    assert all(seconds > 0 for seconds in result.seconds["small"] + result.seconds["large"])
    assert 30 < result.peak_mib["large"] - result.peak_mib["small"] < 50  # Memory of a moment counts.
    assert len(process_tree(os.getpid())) <= before + 1  # multiprocessing keeps its resource tracker.


@pytest.mark.slow
def test_the_error_names_the_side_that_fails():
    with pytest.raises(RuntimeError, match=r"side 'bad' failed:(.|\n)*no such apple"):
        compare("memory", "rounds", [Side("good", partial(holds, 1)), Side("bad", fails)], "good", 1)


def test_process_memory():
    assert process_memory(os.getpid(), "VmHWM") >= process_memory(os.getpid(), "VmRSS") > 2**20
    assert process_memory(2**22 + 1, "VmRSS") == 0  # Above the largest process id.


@pytest.mark.parametrize("backward", [False, True])
def test_all_sides_of_the_text_benchmark_compute_the_same(tmp_path, backward):
    """Run all sides in this process and compare the vectors of the captions."""
    sides = [bench_text.PACKED, *bench_text.TARGETS]
    lengths = [len(ids) for ids in bench_text.captions(5, 2)[0]]
    tokens = {bench_text.make(side, 1, 64, 5, 2, backward, "cpu", "fp32", str(tmp_path))() for side in sides}
    assert tokens == {sum(len(ids) for batch in bench_text.captions(5, 2) for ids in batch)}
    found = [torch.load(tmp_path / f"{side}.pt", weights_only=True) for side in sides]
    assert found[0].shape == (len(lengths), 64)
    for other in found[1:]:
        assert (found[0] - other).abs().max() < 1e-5
    assert (found[0][0] - found[0][1]).abs().max() > 0.1


def test_captions_have_the_lengths_of_coco():
    lengths = [len(ids) for batch in bench_text.captions(64, 400) for ids in batch]
    assert min(lengths) == 7
    assert max(lengths) <= 40
    assert sum(lengths) / len(lengths) == pytest.approx(12, abs=0.1)
