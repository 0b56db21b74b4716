"""ONNX files run by onnxruntime, compared with the packed encoders; programs without torch."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx as library
import onnxruntime
import pytest
import torch
from helpers import ROOT, WORDS, tiny_embedder, tiny_tokenizer
from PIL import Image
from torch import Tensor

from dualenc.data import Preprocess, Tokenizer
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor
from dualenc.interop import onnx, references
from dualenc.interop.exporting import FORMATS, export
from dualenc.interop.inputs import TEXTS, make_inputs, make_text_inputs, outputs_of
from dualenc.interop.verify import Check, Verified, verify
from dualenc.models import DualEncoder, HeadConfig, ImageConfig, TextConfig, TextModel
from dualenc.models.heads.vectors import DenseConfig, EmbeddingConfig
from dualenc.tokens import Tokens
from dualenc.utils.errors import ModelError

CONTEXT = 16
FORMAT = FORMATS["onnx"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
HEADS = {
    "mlm": HeadConfig("mlm"),
    "mood": HeadConfig("classification", ("bad", "good", "so so")),
    "tags": HeadConfig("classification", ("x", "y"), "multi_label", pool="mean", activation="gelu", norm=True),
    "stars": HeadConfig("classification", ("stars",), "regression", pool="last", activation=None),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"types": 2},
    "roberta": {"types": 1, "position_offset": 2, "pool": "mean"},
    "albert": {"types": 2, "embed_width": 10, "layers": 5, "groups": 2, "group_size": 2, "activation": "gelu_tanh"},
    "distilbert": {"pool": "mean"},
    "electra": {"types": 2, "embed_width": 10},
    "modernbert": {
        "layers": 4, "norm": "pre", "embed_norm": True, "positions": "rotary", "theta": 50.0, "local_theta": 7.0,
        "window": 4, "global_every": 3, "gated": True, "bias": False, "pool": "mean",
    },
    "clip": {"norm": "pre", "causal": True, "pool": "last", "activation": "quick_gelu"},
    "siglip": {"norm": "pre", "pool": "last", "pad_to": CONTEXT, "pad_id": 1, "activation": "gelu_tanh"},
    "siglip of longer texts": {"norm": "pre", "pool": "last", "pad_to": 9, "pad_id": 1, "types": 2},
}  # fmt: skip
VITS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average": {"global_pool": "avg", "class_token": False},
    "registers": {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.5},
    "attention": {"global_pool": "map", "class_token": False, "qkv_bias": False},
    "pre-norm": {"pre_norm": True, "qk_norm": True, "global_pool": "avg"},
}


def perturb(model: Any, size: float = 0.3) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return model


def predictor(heads: dict[str, HeadConfig], **config: Any) -> TextPredictor:
    text = TextConfig(40, **{"width": 24, "layers": 2, "heads": 3, "context_length": CONTEXT, **config})  # type: ignore[arg-type]
    tokenizer = tiny_tokenizer(CONTEXT)
    text = TextConfig(**{**vars(text), "vocab_size": tokenizer.vocab_size + 3})
    tokenizer = Tokenizer(tokenizer.backend, CONTEXT, text.pad_to, text.pad_id)
    return TextPredictor(perturb(TextModel(text, heads)), tokenizer, "it")


def dual(vit: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **config: Any) -> Embedder:
    small = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    it = predictor({}, **(text or {}))
    model = DualEncoder(
        ImageConfig("vit_tiny_patch16_224", 24, {**small, **(vit or {})}), it.model.config, 10, **config
    )
    preprocess = Preprocess(24, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    return Embedder(perturb(model, 0.1).eval(), it.tokenizer, preprocess, "it")


def verified(it: TextPredictor, folder: Path, seed: int) -> Verified:
    """Compare a text model with its files."""
    (check,) = FORMAT.checks(it, folder, make_text_inputs(it, seed))
    return verify(check, FORMAT.tolerance)


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(path: Path, **inputs: Tensor) -> dict[str, Tensor]:
    """Run a graph on inputs."""
    at = session(path)
    names = [value.name for value in at.get_outputs()]
    found: list[Any] = list(at.run(None, {name: x.numpy() for name, x in inputs.items()}))
    return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}


def draw(lengths: list[int], config: TextConfig) -> tuple[list[list[int]], list[list[int]] | None]:
    ids = [torch.randint(2, config.vocab_size, (length,)).tolist() for length in lengths]
    return ids, [torch.randint(0, 2, (n,)).tolist() for n in lengths] if config.types > 1 else None


def batch(rows: list[list[int]], width: int, padding: int) -> Tensor:
    return torch.tensor([row + [padding] * (width - len(row)) for row in rows])


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return any(not torch.allclose(found[name], x, **CLOSE) for name, x in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_model_of_every_family(family: str, tmp_path: Path, seed: int) -> None:
    """Any batch, length and padding gives the outputs of the packed encoder for each text alone."""
    heads = {**HEADS, "near": HeadConfig("embedding", problem="negatives", pool="cls")} if "clip" in family else HEADS
    it = predictor(heads, **FAMILIES[family])
    config, model = it.model.config, it.model.eval()
    onnx.write_text_onnx(it, tmp_path)
    about = json.loads((tmp_path / "onnx.json").read_text())
    sides = about["files"]["text.onnx"]
    wanted = ["ids", "mask", "types"] if config.types > 1 else ["ids", "mask"]
    assert sides["inputs"] == {name: ["batch", "length"] for name in wanted}
    assert sides["outputs"]["hidden"][:2] == ["batch", "length"]
    assert sides["outputs"]["logits_mood"] == ["batch", 3]
    file = library.load(tmp_path / "text.onnx")
    library.checker.check_model(file, full_check=True)
    assert about["opset"] == 20
    assert [(one.domain, one.version) for one in file.opset_import] == [("", 20)]
    assert about["heads"]["tags"] == {"labels": ["x", "y"], "problem": "multi_label"}

    def packed(lengths: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
        ids, types = draw(lengths, config)
        fill = [[*one, *[config.pad_id] * ((config.pad_to or 0) - len(one))] for one in ids]
        kinds = [[*one, *[0] * (len(all_) - len(one))] for one, all_ in zip(types, fill)] if types else None
        tokens = Tokens.pack(fill, kinds)
        with torch.no_grad():
            hidden = model.encoder(tokens)
            pool = "cls" if "near" in heads else config.pool
            expected = {"embeddings": model.encoder.pool(hidden, tokens, pool)}
            expected["embeddings"] = torch.nn.functional.normalize(expected["embeddings"], dim=-1)
            expected |= {f"logits_{name}": model.head(name, hidden, tokens) for name in ("mood", "tags", "stars")}
        offsets = tokens.offsets.tolist()
        states = [hidden[offsets[row] :][: len(one)] for row, one in zip(tokens.rows.tolist(), ids)]
        width = min(CONTEXT, max(lengths) + int(torch.randint(0, 4, ())))
        junk = int(torch.randint(0, config.vocab_size, ()))  # ids of padding have no effect
        mask = batch([[1] * n for n in lengths], width, 0)
        given = {"ids": batch(ids, width, junk), "mask": mask}
        return given | ({"types": batch(types, width, 0)} if types else {}), expected, states

    others = []
    for lengths in ([1], [CONTEXT], [1, 1], [7, 2, CONTEXT, 1, 12], [5, 3], [int(torch.randint(1, CONTEXT + 1, ()))]):
        inputs, expected, states = packed(lengths)
        found = run(tmp_path / "text.onnx", **inputs)
        assert set(found) == {*expected, "hidden"}
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, **CLOSE)
        for row, x in zip(found["hidden"], states, strict=True):
            torch.testing.assert_close(row[: len(x)], x, **CLOSE)
        others.append((inputs, expected))
    # The control: another mask is another text, and so are other segments.
    inputs, expected = others[3]
    inputs["mask"][0, 6] = 0
    if config.pad_to is None:
        assert apart(run(tmp_path / "text.onnx", **inputs), expected)
    inputs["mask"][0, 6] = 1
    assert not apart(run(tmp_path / "text.onnx", **inputs), expected)
    changed = "types" if config.types > 1 else "ids"
    inputs[changed][2, 3] = 1 - inputs[changed][2, 3] if changed == "types" else (inputs["ids"][2, 3] + 1) % 20
    assert apart(run(tmp_path / "text.onnx", **inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("vit", VITS)
def test_an_image_tower(vit: str, tmp_path: Path, seed: int) -> None:
    it = dual(VITS[vit], {"layers": 1}, projection="mlp" if vit == "average" else "linear")
    onnx.write_onnx(it, tmp_path)
    path = tmp_path / "image.onnx"
    for count in (1, 5):
        pixels = torch.randn(count, 3, 24, 24)
        expected = it.embed_images(pixels)
        torch.testing.assert_close(run(path, pixels=pixels)["embeddings"], expected, **CLOSE)
        assert apart(run(path, pixels=pixels.flip(-1)), {"embeddings": expected})
    for name, parameter in it.dual_encoder.image.named_parameters():  # the control: each tensor is in the file
        if name.endswith("k_norm.bias"):  # softmax is invariant to a shift of all keys
            continue
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
            assert apart({"embeddings": it.embed_images(pixels)}, {"embeddings": expected}), name
            expected = it.embed_images(pixels)


@pytest.mark.parametrize(
    "text", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("siglip", "siglip of longer texts"))]
)
def test_a_dual_encoder_equals_onnxruntime(text: str, tmp_path: Path, seed: int) -> None:
    """The folder is moved, and then verified in a process of its own without torch."""
    it = dual({}, FAMILIES[text], logit_bias="siglip" in text)
    (tmp_path / "written").mkdir()
    onnx.write_onnx(it, tmp_path / "written")
    folder = (tmp_path / "written").rename(tmp_path / "moved")
    assert {file.name for file in folder.iterdir()} <= set(FORMAT.files)
    inputs = make_inputs(it, texts=["a [SEP] on the [MASK] [PAD]"], seed=seed)  # names of tokens in a text are text
    ours = outputs_of(it, inputs)
    check = Check(FORMAT.reference, str(folder), inputs, ours, it.tokenizer)  # type: ignore[arg-type]
    found = verify(check, FORMAT.tolerance)
    assert set(found.differences) == {
        *("pixels", "ids", "pictures", "photos", "texts", "scale"),
        *(["bias"] if "siglip" in text else []),
    }
    assert found.largest < 2e-5
    assert found.differences["photos"] < 0.1  # Pillow's resizing
    about = json.loads((folder / "onnx.json").read_text())
    scale, bias = it.dual_encoder.logits()
    assert about["logit_scale"] == pytest.approx(scale.item())
    assert about["logit_bias"] == (None if bias is None else pytest.approx(bias.item()))
    assert (about["embed_dim"], about["context_length"], about["image_size"]) == (10, CONTEXT, 24)
    assert about["files"]["image.onnx"] == {
        "inputs": {"pixels": ["batch", 3, 24, 24]}, "outputs": {"embeddings": ["batch", 10]},
    }  # fmt: skip
    if text != "bert":
        return
    # The controls: other weights, and another tokenizer.
    with pytest.raises(ModelError, match=r"onnxruntime and dualenc differ by .* on texts of random tokens"):
        verify(check._replace(expected={**ours, "ids": -ours["ids"]}), FORMAT.tolerance)
    other = Tokenizer.train([" ".join(WORDS[::-1])], 60, CONTEXT)
    with pytest.raises(ModelError, match="the tokenizer does not match"):
        verify(check._replace(tokenizer=other), FORMAT.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["electra", "siglip"])
def test_a_text_model_equals_onnxruntime(family: str, tmp_path: Path, seed: int) -> None:
    more = {"names": HeadConfig("token_classification", ("PER",))}
    if "pad_to" not in FAMILIES[family]:  # An encoder that sees its padding cannot answer questions.
        more["spans"] = HeadConfig("question_answering", max_length=CONTEXT, stride=2)
    it = predictor({**HEADS, **more}, **FAMILIES[family])
    assert onnx.write_text_onnx(it, tmp_path) == ["head mlm: text.onnx does not compute it"]
    found = verified(it, tmp_path, seed)
    assert set(found.differences) == {
        "ids",
        "hidden",
        "texts",
        *(f"logits_{name}" for name in ("mood", "tags", "stars", *more)),
    }
    with torch.no_grad():
        it.model.heads["stars"].out.bias.add_(0.01)  # type: ignore[union-attr,operator]
    with pytest.raises(ModelError, match=r"differ by .* on logits_stars"):
        verified(it, tmp_path, seed)
    if family == "electra":
        with torch.no_grad():
            it.model.heads["stars"].out.bias.sub_(0.01)  # type: ignore[union-attr,operator]
            it.model.encoder.embeddings.segment_embeddings.weight[1].add_(torch.randn(10))  # type: ignore[union-attr]
        with pytest.raises(ModelError, match=r"differ by .* on"):
            verified(it, tmp_path, seed)


def test_tokenizer_json_alone_gives_the_ids(tmp_path: Path, seed: int) -> None:
    """The file truncates and pads, to the trained length for an encoder that attends to padding."""
    from tokenizers import Tokenizer as Backend

    texts = [*TEXTS, "a cat", "red " * 50]
    for family in ("bert", "siglip", "siglip of longer texts"):
        it = predictor({}, **FAMILIES[family])
        onnx._save_tokenizer(it.tokenizer, tmp_path / "tokenizer.json")
        found = Backend.from_file(str(tmp_path / "tokenizer.json")).encode_batch(texts)
        assert {len(one.ids) for one in found} == {CONTEXT}
        for ours, one in zip(it.tokenizer.encode(texts), found, strict=True):
            assert one.ids[: len(ours)] == ours
            assert not sum(one.attention_mask[len(ours) :])
        (alone,) = Backend.from_file(str(tmp_path / "tokenizer.json")).encode_batch(["a cat"])
        assert len(alone.ids) == (CONTEXT if family == "siglip" else 4)


@pytest.mark.slow
def test_an_export_does_not_change_the_model_or_print(tmp_path: Path, capfd: Any, seed: int) -> None:
    """A model in half precision, in training, with gradient checkpointing is written in float32."""
    it = dual({}, {"dropout": 0.2})
    model = it.dual_encoder.to(torch.bfloat16).train()
    model.set_grad_checkpointing()
    before = copy.deepcopy(model.state_dict())
    capfd.readouterr()
    state = torch.get_rng_state()
    onnx.write_onnx(it, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.image.vit.training
    assert model.image.vit.grad_checkpointing
    assert model.text.grad_checkpointing
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(x, before[name]) and x.dtype == before[name].dtype for name, x in model.state_dict().items())
    exact = copy.deepcopy(model).float().eval()
    pixels, (ids, _) = torch.randn(2, 3, 24, 24), draw([4, 4], model.config.text)
    with torch.no_grad():
        expected = exact.encode_image(pixels), exact.encode_text(Tokens.pack(ids))
    found = run(tmp_path / "image.onnx", pixels=pixels)["embeddings"]
    torch.testing.assert_close(found, expected[0], **CLOSE)
    found = run(tmp_path / "text.onnx", ids=torch.tensor(ids), mask=torch.ones(2, 4, dtype=torch.int64))["embeddings"]
    torch.testing.assert_close(found, expected[1], **CLOSE)
    for file in tmp_path.iterdir():  # The files do not name paths of this machine.
        assert str(ROOT).encode() not in file.read_bytes()
        assert b"site-packages" not in file.read_bytes()


@pytest.mark.slow
def test_large_weights_are_written_to_a_second_file(tmp_path: Path, monkeypatch: Any, seed: int) -> None:
    it = tiny_embedder(seed)
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(onnx, "ONE_FILE", 1000)
    onnx.write_onnx(it, tmp_path / "a")
    folder = (tmp_path / "a").rename(tmp_path / "b")
    assert {file.name for file in folder.iterdir()} == set(FORMAT.files)
    assert (folder / "image.onnx.data").stat().st_size > 10_000
    pixels = torch.randn(3, 3, 16, 16)
    found = run(folder / "image.onnx", pixels=pixels)["embeddings"]
    torch.testing.assert_close(found, it.embed_images(pixels), **CLOSE)
    (folder / "image.onnx.data").unlink()  # the control: the weights are in this file
    with pytest.raises(Exception, match=r"image\.onnx\.data"):
        session(folder / "image.onnx")


def test_a_model_that_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: Any, seed: int) -> None:
    it = tiny_embedder(seed)

    def forward(self: Any, images: Tensor) -> Tensor:
        return self.vit(images * (2 if images.sum() > 0 else 1))

    monkeypatch.setattr(type(it.dual_encoder.image), "forward", forward)
    with pytest.raises(ModelError, match=r"^model cannot be written as image\.onnx \([^\n]+\)$"):
        onnx.write_onnx(it, tmp_path)
    known = onnx.find_spec
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else known(name))
    with pytest.raises(ModelError, match=r"^ONNX needs onnxscript: pip install 'dualenc\[onnx\]'$"):
        onnx.write_onnx(it, tmp_path)
    with pytest.raises(ModelError, match="ONNX needs onnxscript"):
        onnx.write_text_onnx(predictor({}), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_onnx_reference_runs_without_torch(tmp_path: Path, monkeypatch: Any, seed: int) -> None:
    """The reference raises if torch was imported, as in this process; so the processes of `verify` ran without it."""
    it = predictor({})
    onnx.write_text_onnx(it, tmp_path)
    mask = np.ones((1, 3), np.int64)
    inputs = {"ids": mask, "mask": mask, "types": 0 * mask, "texts": ["a"], "prompts": []}
    with pytest.raises(RuntimeError, match="torch was imported"):
        references.onnx(str(tmp_path), inputs)
    monkeypatch.delitem(sys.modules, "torch")
    assert set(references.onnx(str(tmp_path), inputs)) == {"ids", "hidden", "texts", "text_ids", "text_mask"}


def test_the_example_of_the_docs(tmp_path: Path, seed: int) -> None:
    """The program of docs/interop.md runs without torch, transformers and dualenc, and sees what dualenc sees."""
    section = (
        (ROOT / "docs" / "interop.md").read_text("utf-8").partition("## ONNX without torch")[2].partition("\n## ")[0]
    )
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 12
    it = dual()
    (tmp_path / "onnx").mkdir()
    onnx.write_onnx(it, tmp_path / "onnx")
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 4), dtype=np.uint8)
    pixels[:8, :, 3] = 0
    opaque, exif = Image.fromarray(pixels[..., :3]), Image.Exif()
    exif[0x0112] = 6
    opaque.save(tmp_path / "opaque.png")
    opaque.save(tmp_path / "rotated.png", exif=exif)
    opaque.quantize(16).save(tmp_path / "palette.png", transparency=bytes(range(0, 256, 16)))
    Image.fromarray(pixels).save(tmp_path / "transparent.png")
    names = ["opaque", "rotated", "palette", "transparent"]
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'transformers', 'dualenc']));\n"
    run = (
        f"{blocked}import numpy as np\nfor name in {names!r}:\n"
        f"    exec({code!r}.replace('photo.jpg', name + '.png'))\n    np.savez(name, image=image, texts=texts)"
    )
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    captions = ["a dog on a beach", "two cats"]
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        with np.load(tmp_path / f"{name}.npz") as out:
            image, texts = (torch.from_numpy(out[key]) for key in ("image", "texts"))
        torch.testing.assert_close(image, it.embed_images([tmp_path / f"{name}.png"]), **CLOSE)
        torch.testing.assert_close(texts, it.embed_texts(captions), **CLOSE)
        assert apart({"": texts}, {"": it.embed_texts(captions[::-1])})
        printed = [float(number) for number in line.strip("[]").split()]
        assert printed == pytest.approx((image @ texts.T)[0].tolist(), abs=1e-4)
        plain = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGBA"))[..., :3].copy()
        # The control: opacity and orientation are ignored.
        as_stored = it.embed_images(torch.from_numpy(plain).permute(2, 0, 1))
        assert apart({"": image}, {"": as_stored}) == (name != "opaque"), name


@pytest.mark.slow
def test_prompts_dimensions_and_dense_layers_are_exported(tmp_path: Path, seed: int) -> None:
    """The graph has the dense layers and the dimensions; `onnx.json` has the prompts, which the caller puts."""
    vectors = EmbeddingConfig((DenseConfig(9),), {"query": "the red ", "passage": "two dogs: "}, "passage", 5)
    heads = {"near": HeadConfig("embedding", problem="negatives", pool="mean", embedding=vectors)}
    it = predictor(heads, **FAMILIES["bert"])
    it.save(tmp_path / "ours")
    (verified,) = export(str(tmp_path / "ours"), tmp_path / "out", "onnx").verified
    assert verified.counts["prompts"] == 2 * len(TEXTS)
    about = json.loads((tmp_path / "out" / "onnx.json").read_text())
    assert about["files"]["text.onnx"]["outputs"]["embeddings"] == ["batch", 5]
    assert "`passage` by default" in (tmp_path / "out" / "README.md").read_text()
    # The control: other prompts are other vectors.
    (tmp_path / "out" / "onnx.json").write_text(json.dumps({**about, "prompts": {"query": "x ", "passage": "y "}}))
    inputs = make_text_inputs(it)
    with pytest.raises(ModelError, match="differ by"):
        verify(Check(references.ONNXRUNTIME, str(tmp_path / "out"), inputs, outputs_of(it, inputs)), 1e-4)
