"""`dualenc plan` as a command: what it prints, and its errors."""

import re
from pathlib import Path

import pytest
from fits import SMOKE, fails

from dualenc.cli import main


def planned(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, str]:
    """Return the lines of the plan of the smoke configuration, by their names."""
    main(["plan", "--config", str(SMOKE), *more])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("  ")][::3] == ["Parameters", "Run"]
    return {line[2:22].strip(): line[22:].strip() for line in lines if line.startswith("  ")}


def test_the_plan_of_a_configuration_with_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = planned(
        capsys, "--device-memory", "24", "--tokens=12", "--samples-per-second", "640", "--trainer.max_steps", "100",
        "--data.batch-size", "128", "--trainer.devices", "2",
    )  # fmt: skip
    assert re.match(r"64 pairs? of 12 tokens", found["activations"].split("  ")[-1].strip())
    assert found["fits"].startswith("yes")
    assert int(re.sub(r"\D", "", found["largest batch"].split()[0])) > 64
    assert found["time"].startswith("0:00:20")  # 100 steps of 128 pairs
    assert found["steps"].startswith("100")
    assert not list(tmp_path.iterdir())  # A plan makes no run directory.


def test_a_batch_that_does_not_fit_gets_a_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--device-memory", "2.1", "--data.batch_size", "4096", "--trainer.precision", "bf16-mixed")
    assert found["fits"].startswith("no")
    micro = int(re.sub(r"\D", "", found["largest micro-batch"].split()[0]))
    assert 1 <= micro < int(re.sub(r"\D", "", found["largest batch"].split()[0])) < 4096
    fits = planned(
        capsys, "--device-memory", "2.1", "--data.batch_size", "4096", "--trainer.precision", "bf16-mixed",
        "--data.micro_batch_size", str(micro),
    )  # fmt: skip
    assert fits["fits"].startswith("yes")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device-memory", "big"], ["--device_memory", "'big'"]),
        (["--device-memory"], ["--device_memory"]),
        (["--tokens", "2.5"], ["--tokens", "2.5"]),
        (["--tokens", "1000"], ["--tokens 1000", "24"]),
        (["--device_memroy", "80"], ["--device_memroy", "device_memory"]),
        (["--samples-per-second", "-3"], ["--samples_per_second", "-3"]),
        (["--trainer.precision", "64-true"], ["trainer.precision 64-true"]),
        (["--trainer.devices", "5"], ["batch_size 64", "5 ranks"]),
        (["--data.micro_batch", "5"], ["--data.micro_batch", "micro_batch_size"]),
        (["--model.text.heads", "5"], ["heads"]),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, ["plan", "--config", str(SMOKE), *words])
    for part in said:
        assert part in line


def test_wrong_keys_have_the_error_of_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SMOKE.read_text().replace("embed_dim: 96\n    optimizer", "embed_dmi: 96\n    optimizer"))
    assert fails(capsys, ["plan", "--config", str(path)]) == fails(capsys, ["fit", "--config", str(path)])
    assert fails(capsys, ["plan"]) == fails(capsys, ["fit"])
