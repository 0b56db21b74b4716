"""Export formats in a module of the user, named by their import path."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fits import fails
from helpers import tiny_embedder
from huggingface_hub import ModelCard

from dualenc import ModelError, load
from dualenc.cli import main
from dualenc.hub.push import open_subject, stage
from dualenc.interop.exporting import export, find_format
from dualenc.interop.inputs import Inputs
from dualenc.interop.references import Reference
from dualenc.interop.verify import Check, verify

TOY = '''
"""The image tower for numpy."""

import math
import os
from pathlib import Path

import numpy as np

from dualenc.interop.export_format import ExportFormat
from dualenc.interop.references import Reference


def embed(model, inputs):
    """Compute a ViT of one block, with a class token, patches of 8 pixels and 2 heads."""
    (Path(model).parent / "process").write_text(str(os.getpid()))
    weights = np.load(Path(model) / "tower.npz")

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    pixels = inputs["pixels"]
    n, side = len(pixels), pixels.shape[-1] // 8
    patches = pixels.reshape(n, 3, side, 8, side, 8).transpose(0, 2, 4, 1, 3, 5).reshape(n, side**2, 192)
    kernel = weights["patch_embed.proj.weight"].reshape(-1, 192)
    x = patches @ kernel.T + weights["patch_embed.proj.bias"]
    x = np.concatenate([np.tile(weights["cls_token"], (n, 1, 1)), x], 1) + weights["pos_embed"]
    qkv = linear(norm(x, "blocks.0.norm1"), "blocks.0.attn.qkv").reshape(n, side**2 + 1, 3, 2, -1)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]))
    attended = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
    x = x + linear(attended, "blocks.0.attn.proj")
    hidden = linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.fc1")
    hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    x = norm(x + linear(hidden, "blocks.0.mlp.fc2"), "norm")[:, 0] @ weights["projection"].T
    return {"pixels": x / np.linalg.norm(x, axis=-1, keepdims=True)}


def embed_mirrored(model, inputs):
    return embed(model, {**inputs, "pixels": inputs["pixels"][..., ::-1]})


class ToyFormat(ExportFormat):
    name = "toy"
    files = ("tower.npz", "about.txt")
    weights = ("tower.npz",)
    reference = Reference("numpy", embed)
    compared = ("pixels",)

    def write(self, model, folder):
        state = {**model.dual_encoder.image.vit.state_dict(), "projection": model.dual_encoder.image_projection.weight}
        np.savez(folder / "tower.npz", **{name: x.detach().numpy() for name, x in state.items()})
        (folder / "about.txt").write_text("toy")
        return ["the text tower: the format has no place for it"]

    def snippet(self, source, images):
        return source.with_folder("import numpy", "weights = numpy.load(f'{folder}/tower.npz')")


toy = ToyFormat()


class Mirrored(ToyFormat):
    name = "mirrored"
    reference = Reference("numpy", embed_mirrored)


class Unlisted(ToyFormat):
    name = "unlisted"
    files = ("tower.npz",)


class Unchecked(ToyFormat):
    name = "unchecked"

    def checks(self, model, folder, inputs):
        return []


class Uncompared(ToyFormat):
    name = "uncompared"
    compared = ()


class Taken(ToyFormat):
    name = "onnx"


class Marked(ToyFormat):
    name = "to*y"


class Nameless(ExportFormat):
    files = ()
    write = snippet = lambda *given: ""


class Unfinished(ExportFormat):
    name = "unfinished"
'''


@pytest.fixture
def model(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Save a model, and write the toy formats into a folder on `sys.path`."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "toy_module.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "toy_module", raising=False)
    tiny_embedder(seed).save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("name", ["ToyFormat", "toy"])
def test_a_format_named_by_its_import_path_is_verified_by_its_own_reference(
    name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(["export", model, str(out), "--format", f"toy_module.{name}"])
    assert "compared with numpy: largest difference " in capsys.readouterr().out
    assert int((tmp_path / "process").read_text()) != os.getpid()
    assert {path.name for path in out.iterdir()} == {"tower.npz", "about.txt", "README.md", "export.json"}
    about = json.loads((out / "export.json").read_text())
    assert about["format"] == "toy"
    assert about["fingerprint"] == load(model, "cpu").fingerprint
    assert about["notes"] == ["the text tower: the format has no place for it"]
    card = (out / "README.md").read_text()
    assert ModelCard(card).data.library_name == "toy"
    assert "the text tower: the format has no place for it" in card
    assert 'import numpy\n\nfolder = "path/of/this/folder"' in card
    (out / "about.txt").unlink()
    export(model, out, find_format("toy_module.toy"))  # an export of the same format is replaced
    assert (out / "about.txt").exists()

    with pytest.raises(ModelError, match=r"in the format 'toy', .* name the class of the format with --format"):
        open_subject(out)  # although its module is imported
    subject = open_subject(out, f"toy_module.{name}")
    assert (subject.title, subject.fingerprint) == ("An export of dualenc in the format of toy", about["fingerprint"])
    (tmp_path / "staged").mkdir()
    stage(subject, tmp_path / "staged", "owner/name")
    assert {path.name for path in (tmp_path / "staged").iterdir()} == {"tower.npz", "about.txt", "export.json"}


def test_a_format_whose_reference_disagrees_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    line = fails(capsys, ["export", model, str(tmp_path / "out"), "--format", "toy_module.Mirrored"])
    assert "numpy and dualenc differ by" in line
    assert "nothing was written" in line
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "process") == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy", "open_clip, transformers, sentence-transformers, onnx, or the import path of an ExportFormat"),
        ("", "--format is missing: choose one of open_clip, "),
        ("toy_module.Absent", "toy_module.Absent cannot be imported (AttributeError: "),
        ("absent_module.ToyFormat", "absent_module.ToyFormat cannot be imported (ModuleNotFoundError: "),
        ("..ToyFormat", "..ToyFormat cannot be imported ("),
        ("toy_module.embed", "toy_module.embed must be an ExportFormat, object or class, found function"),
        ("toy_module.Unfinished", "toy_module.Unfinished cannot be imported (TypeError: "),
        ("toy_module.Nameless", "toy_module.Nameless does not set name, reference"),
        ("toy_module.Taken", "'onnx' is that of a format of dualenc"),
        ("toy_module.Marked", "name must consist of letters, digits, -, _ and ., found 'to*y'"),
        ("toy_module.Unlisted", "wrote about.txt: add it to the attribute files"),
        ("toy_module.Unchecked", "the format unchecked checks nothing: nothing was written"),
    ],
)
def test_what_is_not_a_format_is_refused_in_one_line(
    name: str, message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    assert message in fails(capsys, ["export", model, str(tmp_path / "out"), "--format", name])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_comparison_of_nothing_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing of .* was compared with numpy: nothing was written"):
        export(model, tmp_path / "out", "toy_module.Uncompared")
    assert not (tmp_path / "out").exists()


PROGRAM = """
import json, sys
import numpy as np

model, inputs, outputs = sys.argv[1:]
ids = np.load(inputs + "/inputs.npz")["ids"]
texts = json.load(open(inputs + "/inputs.json"))["texts"]
np.savez(outputs + "/outputs.npz", ids=ids.sum(1, keepdims=True) * float(model), texts=np.full((len(texts), 1), 7.0))
"""


def test_a_reference_may_be_a_program(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)

    def check(command: list[str], **expected: Any) -> float:
        arrays = {name: np.array(x, np.float64) for name, x in expected.items()}
        inputs = Inputs([[1, 2], [3]], ["a", "b"])
        return verify(Check(Reference("numbers", command), "2", inputs, arrays), 1e-5).largest

    command = [sys.executable, "-I", str(tmp_path / "program.py")]
    assert check(command, ids=[[6], [6]], texts=[[7], [7]]) == 0
    with pytest.raises(ModelError, match=r"numbers and dualenc differ by .* on texts of random tokens of 2"):
        check(command, ids=[[6], [6.1]])
    with pytest.raises(ModelError, match="numbers does not give pixels for 2"):
        check(command, pixels=[[1]])
    with pytest.raises(ModelError, match=r"numbers gives shape \(2, 1\) for ids of 2, expected \(1, 2\)"):
        check(command, ids=[[6, 6]])
    with pytest.raises(ModelError, match=r"numbers cannot be started to check 2 \(.*nowhere"):
        check([str(tmp_path / "nowhere")], ids=[[6], [6]])
    with pytest.raises(ModelError, match=r"with numbers wrote no valid outputs\.npz"):
        check([sys.executable, "-c", ""], ids=[[6], [6]])
    with pytest.raises(ModelError, match=r"numbers cannot load 2 \(ValueError: bad\)"):
        check([sys.executable, "-c", "raise ValueError('bad')"], ids=[[6], [6]])


def test_a_reference_must_be_importable_by_its_name() -> None:
    class Local:
        def method(self, model: str, inputs: Any) -> Any:
            return {}

    for program in (lambda model, inputs: {}, Local().method):
        with pytest.raises(ValueError, match="the reference of it must be a function at the top level of a module"):
            Reference("it", program)
