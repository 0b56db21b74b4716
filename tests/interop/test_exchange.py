"""Import and export of dual encoders of open_clip and Hugging Face: both libraries compute the same."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from exchanges import (
    HUGGING_FACE,
    OF_NAME,
    OPEN_CLIP,
    SMALL,
    all_but,
    of_hugging_face,
    of_open_clip,
    same,
    save_tokenizer,
)
from helpers import perturb
from safetensors.torch import load_file, save_file

from dualenc import Embedder, ModelError
from dualenc.interop import references
from dualenc.interop import verify as verify_module
from dualenc.interop.exporting import export
from dualenc.interop.importing import TOLERANCE, import_model
from dualenc.interop.inputs import Inputs, make_inputs
from dualenc.interop.reading import open_dual
from dualenc.interop.verify import Check, verify
from dualenc.models import DualConfig, DualEncoder
from dualenc.tokens import Tokens

Changes = dict[str, Callable[[DualConfig], DualConfig]]


def there_and_back(folder: Path, tmp_path: Path) -> Embedder:
    """Import, export and import an open_clip model: it stays equal to the bit, and so does its file."""
    found = import_model(str(folder))
    assert found.verified[0].largest < TOLERANCE
    assert {"pixels", "ids", "pictures", "texts", "scale"} <= found.verified[0].differences.keys()
    assert found.notes == []
    found.embedder.save(tmp_path / "ours")
    export(str(tmp_path / "ours"), tmp_path / "again", "open_clip")
    assert same(found.embedder, import_model(f"open_clip:local-dir:{tmp_path / 'again'}").embedder)
    files = [load_file(one / "open_clip_model.safetensors") for one in (folder, tmp_path / "again")]
    theirs, again = ({n.removeprefix("text."): x for n, x in file.items()} for file in files)  # custom_text or not
    assert {n: x.shape for n, x in theirs.items()} == {n: x.shape for n, x in again.items()}
    assert all(torch.equal(x, again[n]) for n, x in theirs.items())
    return found.embedder


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", all_but(["openai", "bert, mean, mlp"], OPEN_CLIP))
def test_open_clip_round_trip_is_equal_to_the_bit(name: str, tmp_path: Path, seed: int) -> None:
    found = there_and_back(of_open_clip(tmp_path / "theirs", name), tmp_path)
    assert found.dual_encoder.config.logit_bias == (name == "siglip")
    assert found.preprocess.mean == (0.4, 0.5, 0.6)  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_round_trip_of_a_published_tower_by_its_name(tmp_path: Path, seed: int) -> None:
    there_and_back(of_open_clip(tmp_path / "theirs", "siglip", 0.05, **OF_NAME), tmp_path)


@pytest.mark.slow
def test_round_trip_with_references_in_fresh_processes(tmp_path: Path, seed: int) -> None:
    folder = of_open_clip(tmp_path / "theirs", "openai")
    found = import_model(str(folder))
    found.embedder.save(tmp_path / "ours")
    made = export(str(tmp_path / "ours"), tmp_path / "out", "transformers")
    assert made.verified[0].largest < 1e-5
    again = open_dual(str(tmp_path / "out")).embedder()
    assert all(torch.equal(x, again.dual_encoder.state_dict()[n]) for n, x in found.embedder.model.state_dict().items())


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", all_but(["clip", "siglip-albert"], HUGGING_FACE))
def test_hugging_face_round_trip_is_equal_to_the_bit(name: str, tmp_path: Path, seed: int) -> None:
    found = import_model(str(of_hugging_face(tmp_path / "theirs", name)))
    assert found.verified[0].largest < TOLERANCE
    assert found.notes == []
    found.embedder.save(tmp_path / "ours")
    made = export(str(tmp_path / "ours"), tmp_path / "again", "transformers")
    assert [one.library for one in made.verified] == [
        references.TRANSFORMERS.library,
        references.TRANSFORMERS_TEXT.library,
    ]
    assert same(found.embedder, import_model(str(tmp_path / "again")).embedder)
    theirs, again = (load_file(tmp_path / one / "model.safetensors") for one in ("theirs", "again"))
    assert theirs.keys() == again.keys()
    assert all(torch.equal(x, again[n]) for n, x in theirs.items())


def tower(config: DualConfig, name: str, **changes: Any) -> DualConfig:
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **changes)})


def act(config: DualConfig, name: str) -> DualConfig:
    return tower(config, "image", overrides={**config.image.overrides, "act_layer": name})


def other_heads(config: DualConfig) -> DualConfig:
    model: Any = DualEncoder.from_config(config)
    heads = model.image.vit.blocks[0].attn.num_heads
    return tower(config, "image", overrides={**config.image.overrides, "num_heads": 1 if heads > 1 else 2})


# Mistakes that shapes do not show; for the image tower, only those that another setting does not imply.
WRONG: Changes = {
    "text.norm_eps": lambda config: tower(config, "text", norm_eps=config.text.norm_eps + 1e-3),
    "text.activation": lambda config: tower(
        config, "text", activation="gelu_tanh" if config.text.activation == "gelu" else "gelu"
    ),
    "text.heads": lambda config: tower(config, "text", heads=2),
    "text.pool": lambda config: tower(config, "text", pool="mean" if config.text.pool != "mean" else "cls"),
    "text.causal": lambda config: tower(config, "text", causal=not config.text.causal),
    "image.norm_eps": lambda config: tower(config, "image", norm_eps=2e-2),
    "image.activation": lambda config: act(config, "relu"),
    "image.heads": other_heads,
}
QUICK = ("openai", "bert, mean, mlp", "clip-roberta", "siglip-albert")
SLOW = ("average", "timm", "siglip", "bert, pooler, linear, timm", "roberta, first, mlp")
CONTROLS = [
    pytest.param(of, name, id=f"{library}, {name}", marks=() if name in QUICK else pytest.mark.slow)
    for library, of, names in (
        ("open_clip", of_open_clip, [name for name in OPEN_CLIP if name in QUICK + SLOW]),
        ("transformers", of_hugging_face, HUGGING_FACE),
    )
    for name in names
]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("of_peer", "name"), CONTROLS)
def test_every_wrong_tensor_and_setting_is_detected(
    of_peer: Callable[[Path, str], Path], name: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_dual(str(of_peer(tmp_path / "theirs", name)))
    it = checkpoint.embedder()
    ((reference, model),) = checkpoint.peers
    inputs = make_inputs(it)
    inputs = Inputs(inputs.ids[-4:], inputs.texts[:1], inputs.pixels[:3])
    theirs = verify_module.run(reference, model, inputs)
    for one in ("pixels", "ids"):  # similar vectors would hide mistakes
        apart = np.linalg.norm(theirs[one][:, None] - theirs[one][None], axis=-1)
        assert apart[~np.eye(len(apart), dtype=bool)].min() > 1e-2, one
    monkeypatch.setattr(verify_module, "run", lambda *given: theirs)

    @torch.no_grad()
    def wrong(dual: DualEncoder, part: str = "") -> bool:
        """Return whether the comparison fails, for the tower with which a name begins."""
        made: dict[str, Any] = dict(zip(("scale", "bias"), (x for x in dual.logits() if x is not None)))
        made = {one: x[None] for one, x in made.items()}
        made |= {} if part.startswith("text") else {"pixels": dual.encode_image(inputs.pixels)}
        made |= {} if part.startswith("image") else {"ids": dual.encode_text(Tokens.pack(inputs.ids))}
        try:
            verify(Check(reference, model, inputs, {one: x.numpy() for one, x in made.items()}), TOLERANCE)
        except ModelError:
            return True
        return False

    assert not wrong(it.dual_encoder)
    missed = []
    for tensor, x in it.dual_encoder.state_dict().items():
        kept = x.clone()
        rolled = x.roll(1, -1)
        x.copy_(rolled if not torch.equal(rolled, x) else x + 0.1 * torch.randn_like(x))
        missed += [] if wrong(it.dual_encoder, tensor) else [tensor]
        x.copy_(kept)
    for setting, change in WRONG.items():
        altered = DualEncoder.from_config(change(it.dual_encoder.config))
        altered.load_state_dict(it.dual_encoder.state_dict())
        missed += [] if wrong(altered.eval(), setting) else [setting]
    assert missed == []


def renewed(folder: Path, change: Callable[[dict[str, Any]], Any], old: str, new: str = "") -> None:
    """Rewrite the weights under other names or in another file."""
    state = change(load_file(folder / old))
    (folder / old).unlink()
    if new:
        torch.save(state, folder / new)
    else:
        save_file(state, folder / old)


def as_halves(state: dict[str, Any]) -> dict[str, Any]:
    return {name: x.half() for name, x in state.items()}


# Files written by training, by older versions, or in half precision.
OTHER_FILES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "checkpoint": (
        lambda state: {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": x for name, x in state.items()}},
        "open_clip_pytorch_model.bin",
    ),
    "state of an archive": (
        lambda state: {**state, "input_resolution": torch.tensor(16), "vocab_size": torch.tensor(49408)},
        "open_clip_pytorch_model.bin",
    ),
    "scale of one dimension": (lambda state: {**state, "logit_scale": state["logit_scale"].reshape(1)}, ""),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_older_open_clip_files(name: str, tmp_path: Path, seed: int) -> None:
    folder = of_open_clip(tmp_path / "theirs", "openai")
    expected = open_dual(str(folder)).embedder()
    renewed(folder, OTHER_FILES[name][0], "open_clip_model.safetensors", OTHER_FILES[name][1])
    assert same(expected, open_dual(str(folder)).embedder())


def test_tensor_names_without_the_prefix_text(tmp_path: Path, seed: int) -> None:
    folder = of_open_clip(tmp_path / "theirs", "average")
    expected = open_dual(str(folder)).embedder()
    renewed(folder, lambda state: {n.removeprefix("text."): x for n, x in state.items()}, "open_clip_model.safetensors")
    assert same(expected, open_dual(str(folder)).embedder())


@pytest.mark.usefixtures("in_process")
def test_half_precision(tmp_path: Path, seed: int) -> None:
    folder = of_open_clip(tmp_path / "theirs", "openai")
    renewed(folder, as_halves, "open_clip_model.safetensors")
    found = import_model(str(folder))
    assert found.verified[0].largest < TOLERANCE
    assert {x.dtype for x in found.embedder.model.state_dict().values()} == {torch.float32}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("factor", [4.6054688, 5.0])
def test_a_scale_above_the_limit_is_noted(factor: float, tmp_path: Path, seed: int) -> None:
    folder = of_open_clip(tmp_path / "theirs", "openai")
    change = {"logit_scale": torch.tensor(factor)}  # ln 100 in half precision is 4.6055
    renewed(folder, lambda state: {**state, **change}, "open_clip_model.safetensors")
    found = import_model(str(folder))
    assert f"100, dualenc's largest, not {np.exp(factor):.6g}" in found.notes[0]
    found.embedder.save(tmp_path / "ours")
    made = export(str(tmp_path / "ours"), tmp_path / "out", "open_clip")
    assert made.verified[0].differences["scale"] < 1e-6


def deeper(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that renames tensors as VisionTextDualEncoderModel wrote them before transformers 5."""
    return lambda state: {n.replace(part, part + part, 1) if n.startswith(part) else n: x for n, x in state.items()}


OLDER: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "vision_model": ("clip-roberta", deeper("vision_model."), ""),
    "text_model": ("clip-clip", deeper("text_model."), ""),
    "position_ids": (
        "clip",
        lambda state: {
            **state, "text_model.embeddings.position_ids": torch.arange(77)[None],
            "vision_model.embeddings.position_ids": torch.arange(5)[None],
        },
        "",
    ),
    "pickled": ("vit-bert", dict, "pytorch_model.bin"),
    "scale of one dimension": ("clip", lambda state: {**state, "logit_scale": state["logit_scale"].reshape(1)}, ""),
    "bias of no dimension": ("siglip", lambda state: {**state, "logit_bias": state["logit_bias"].reshape(())}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
def test_older_transformers_files(name: str, tmp_path: Path, seed: int) -> None:
    kind, change, file = OLDER[name]
    folder = of_hugging_face(tmp_path / "theirs", kind)
    expected = open_dual(str(folder)).embedder()
    renewed(folder, change, "model.safetensors", file)
    assert same(expected, open_dual(str(folder)).embedder())


@pytest.mark.usefixtures("in_process")
def test_a_timm_tower_and_a_bert_are_joined(tmp_path: Path, seed: int) -> None:
    import timm

    vit: Any = perturb(timm.create_model("test_vit"))
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    perturb(hf.BertModel(hf.BertConfig(**SMALL))).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    found = import_model(f"timm:test_vit/{tmp_path / 'vit.pth'}", str(tmp_path / "bert"), 16, seed=3)
    assert [one.library for one in found.verified] == [references.TIMM.library, references.TRANSFORMERS_TEXT.library]
    assert max(one.largest for one in found.verified) < TOLERANCE
    assert "random" in found.notes[0]
    again = import_model(f"timm:test_vit/{tmp_path / 'vit.pth'}", str(tmp_path / "bert"), 16, seed=3)
    assert same(found.embedder, again.embedder)
    other = import_model(f"timm:test_vit/{tmp_path / 'vit.pth'}", str(tmp_path / "bert"), 16, seed=4)
    assert not same(found.embedder, other.embedder)
    found.embedder.save(tmp_path / "ours")  # Its text tower can be joined with another image tower.
    once_more = import_model(f"timm:test_vit/{tmp_path / 'vit.pth'}", str(tmp_path / "ours"), 16, seed=3)
    assert same(found.embedder, once_more.embedder)
    assert [one.library for one in once_more.verified] == [references.TIMM.library]


@pytest.mark.usefixtures("in_process")
def test_weights_of_a_file_for_an_architecture(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    folder = of_open_clip(tmp_path / "theirs", "openai")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "Tiny-B-8.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [tmp_path])
    open_clip.factory._rescan_model_configs()
    file = tmp_path / "weights.safetensors"
    file.write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    found = import_model(f"open_clip:Tiny-B-8/{file}")
    assert found.verified[0].largest < TOLERANCE
    expected = open_dual(str(folder)).embedder().dual_encoder.state_dict()
    assert all(torch.equal(x, expected[n]) for n, x in found.embedder.dual_encoder.state_dict().items())
    random = import_model("open_clip:Tiny-B-8")
    assert random.verified[0].largest < TOLERANCE


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["laion", "vit-bert"])
def test_wrapped_checkpoints_are_imported_as_the_plain_ones(name: str, tmp_path: Path, seed: int) -> None:
    """The other library, which cannot read them, is given a plain copy to compare with."""
    folder = (
        of_open_clip(tmp_path / "theirs", name) if name in OPEN_CLIP else of_hugging_face(tmp_path / "theirs", name)
    )
    plain = open_dual(str(folder)).embedder()
    (file,) = folder.glob("*.safetensors")
    state = {f"model._orig_mod.{key}": x for key, x in load_file(file).items()}
    file.unlink()
    wrapped = folder / ("open_clip_pytorch_model.bin" if name in OPEN_CLIP else "pytorch_model.bin")
    torch.save({"epoch": np.int64(3), "best": np.float64(0.5), "model_state_dict": state}, wrapped)
    before = sorted(folder.iterdir())
    found = import_model(str(folder))
    assert found.verified[0].largest < TOLERANCE
    assert same(found.embedder, plain)
    assert sorted(folder.iterdir()) == before
