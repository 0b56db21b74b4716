"""The README as a script: its commands run from top to bottom in an empty folder, from the built wheel."""

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers import ROOT

from dualenc.data.prepare.scenes import draw_scene

PEER = "ViT-S-32-alt"  # the smallest architecture of open_clip that takes the place of the README's


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q", "-w", folder]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def blocks(language: str) -> str:
    """Return the code blocks of the README in a language, joined."""
    text = (ROOT / "README.md").read_text("utf-8")
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))


def draw_inputs(seed: int) -> None:
    """Draw what a reader has: photos with captions, class folders, a photo."""
    rng = np.random.default_rng(seed)
    Path("photos").mkdir()
    with open("photos/captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for i in range(120):
            scene = draw_scene(rng, pixels=80)
            scene.image.save(f"photos/{i}.jpg")
            table.writerow([f"{i}.jpg", scene.caption])
    for name in ("red circle", "blue square"):
        Path("class_folders", name).mkdir(parents=True)
        for i in range(8):
            draw_scene(rng, [name], things=1, pixels=80).image.save(f"class_folders/{name}/{i}.png")
    draw_scene(rng, things=1).image.save("photo.jpg")


@pytest.mark.slow
def test_the_readme_runs_from_top_to_bottom(
    wheel: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    draw_inputs(seed)
    # Weights of the hub cannot be had here, so a random model of another architecture takes their place.
    torch.save(open_clip.create_model(PEER).state_dict(), tmp_path / "peer.pt")
    script = blocks("sh").replace("open_clip:ViT-B-32-quickgelu/openai", f"open_clip:{PEER}/{tmp_path / 'peer.pt'}")
    assert script.count(PEER) == 2
    program = blocks("python") + (
        "\nassert dualenc.__file__.startswith(" + repr(str(site)) + "), dualenc.__file__\n"
        "old, new = embedder.embed_texts(['a red circle']), dualenc.load('again').embed_texts(['a red circle'])\n"
        "assert (old - new).abs().max() < 1e-5\n"
    )
    Path("program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(site), "PATH": f"{site / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euxc", f"{script}\n{sys.executable} program.py"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr
    for name in ("open_clip", "transformers", "sentences", "onnx"):
        assert json.loads(Path("exported", name, "export.json").read_text())["format"]
    for page in ("runs/small/report.html", "results/report.html", "both/report.html"):
        assert Path(page).stat().st_size > 10_000
    (result,) = json.loads(Path("results/retrieval.json").read_text())
    assert result["n"] >= 5


def test_the_links_of_the_package_page_are_absolute(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = message_from_bytes(archive.read(name))
        names = set(archive.namelist())
    assert any(name.startswith("dualenc/configs/") for name in names)
    files = {f"dualenc/search/page/{path.name}" for path in (ROOT / "dualenc" / "search" / "page").iterdir()}
    assert "dualenc/search/page/index.html" in files <= names
    page = str(metadata.get_payload())
    targets = re.findall(r"\]\(([^)\s]+)\)", page)
    assert len(targets) > 10
    home = metadata.get_all("Project-URL", [])[0].split(", ")[1]
    raw = home.replace("github.com", "raw.githubusercontent.com")
    for target in targets:
        base = next(base for base in (f"{home}/blob/main/", f"{raw}/main/") if target.startswith(base))
        assert (ROOT / target.removeprefix(base)).exists()
        assert target.endswith(".png") == (base == f"{raw}/main/")
    assert set(re.findall(r"dualenc\[([\w-]+)\]", page)) == set(metadata.get_all("Provides-Extra", []))
