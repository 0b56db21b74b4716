"""Refused imports and exports: one line that names the file, key or option, and nothing is left behind."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exchanges import of_hugging_face, of_open_clip, of_ours
from fits import fails
from safetensors.torch import load_file, save_file

from dualenc import ModelError, Tokenizer
from dualenc.interop import references
from dualenc.interop import verify as verify_module
from dualenc.interop.inputs import Inputs
from dualenc.interop.reading import open_dual
from dualenc.interop.references import Reference

BERT = {"types": 2, "pool": "cls"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build models of other libraries, of which tests make copies."""
    folder = tmp_path_factory.mktemp("kept")
    torch.manual_seed(0)
    made = {"open_clip": of_open_clip(folder / "open_clip", "laion")}
    made["hf text"] = of_open_clip(folder / "hf", "bert, mean, mlp")
    made |= {name: of_hugging_face(folder / name, name) for name in ("vit-bert", "siglip", "clip-clip", "timm-bert")}
    of_ours({}, BERT, {}).save(folder / "ours")
    return {**made, "ours": folder / "ours"}


@pytest.fixture
def copy_of(kept: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        (tmp_path / "theirs").mkdir()
        for file in kept[name].iterdir():
            if file.is_file():
                (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
        config = tmp_path / "theirs" / "open_clip_config.json"
        if config.is_file():  # It names the folder of its text encoder.
            config.write_text(config.read_text().replace(str(kept[name]), str(config.parent)))
        return tmp_path / "theirs"

    return copy


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a failing command with OUT tmp_path/out, and returns its one line."""

    def run(command: str, *arguments: str, status: int = 2) -> str:
        before = sorted(path.name for path in tmp_path.iterdir())
        line = fails(capsys, [command, arguments[0], str(tmp_path / "out"), *arguments[1:]], status)
        assert sorted({path.name for path in tmp_path.iterdir()} - {"between"}) == sorted({*before} - {"between"})
        return line

    return run


def edit(path: Path, change: Callable[[Any], None]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


SPECS = {
    "open_clip:NoSuch": "open_clip does not have the architecture 'NoSuch'",
    "open_clip:ViT-B-33": "did you mean ViT-B-32",
    "open_clip:RN50": "ResNet",
    "open_clip:coca_ViT-B-32": "CoCa's decoder",
    "open_clip:ViT-B-32/nothing": "'nothing' must be a file",
    "open_clip:ViT-B-32/openai": "write open_clip:ViT-B-32-quickgelu/openai",
    "open_clip:ViT-B-32-quickgelu/laion2b_s34b_b79k": "weights that open_clip has for ViT-B-32-quickgelu",
    "nowhere": "must be a folder",
    "timm:vit_tiny_patch16_224": "--text",
}


@pytest.mark.parametrize("spec", SPECS)
def test_invalid_specs(spec: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    monkeypatch.setattr(open_clip, "download_pretrained", lambda *given: pytest.fail("fetches"))
    assert SPECS[spec] in refused("import", spec)


def test_weights_that_cannot_be_downloaded(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    def download(*given: Any) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    assert refused("import", "open_clip:ViT-B-32/laion2b_s34b_b79k").endswith("cannot be downloaded (no network)")


def test_invalid_options(
    refused: Callable[..., str], kept: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = str(kept["ours"]), str(kept["open_clip"])
    assert "choose one of open_clip" in refused("export", ours)
    assert "sentence-transformers" in refused("export", ours, "--format", "tensorflow")
    assert "dualenc import open_clip:ViT-B-32 OUT" in refused("export", "open_clip:ViT-B-32", "--format", "onnx")
    assert "timm:NAME" in refused("import", theirs, "--text", "bert")
    assert "is a model of dualenc already" in refused("import", ours)
    assert "nothing" in refused("export", str(tmp_path / "nothing"), "--format", "onnx")
    joined = ("--text", str(tmp_path / "nothing"))
    assert "nothing" in refused("import", "timm:test_vit", *joined)
    assert "no_vit" in refused("import", "timm:no_vit", "--text", ours)


def test_files_that_are_not_models(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = refused("import", str(tmp_path / "empty"))
    assert "open_clip_config.json" in line
    assert "config.json" in line.replace("open_clip_config.json", "")
    (tmp_path / "w.pt").write_bytes(b"what")
    assert f"open_clip:ARCH/{tmp_path / 'w.pt'}" in refused("import", str(tmp_path / "w.pt"))
    assert "w.pt cannot be read" in refused("import", f"open_clip:ViT-S-32-alt/{tmp_path / 'w.pt'}")
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    assert "w.npz" in refused("import", f"open_clip:ViT-S-32-alt/{tmp_path / 'w.npz'}")
    with warnings.catch_warnings(action="ignore"):  # torch warns that TorchScript is deprecated
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "jit.pt"))  # type: ignore[union-attr]
    line = refused("import", f"open_clip:ViT-S-32-alt/{tmp_path / 'jit.pt'}")
    assert "TorchScript" in line
    assert "state_dict()" in line


class Trap:
    """Object whose unpickling runs code."""

    def __reduce__(self) -> Any:
        return (Path("trap").touch, ())


@pytest.mark.parametrize("name", ["open_clip", "vit-bert"])
def test_a_pickle_never_runs_code(
    name: str, copy_of: Callable[[str], Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(name)
    monkeypatch.chdir(folder)
    old, new = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    old, new = (old, new) if name == "open_clip" else ("model.safetensors", "pytorch_model.bin")
    torch.save({**load_file(old), "trap": Trap()}, new)
    Path(old).unlink()
    assert f"{new} cannot be read" in refused("import", str(folder))
    assert not Path("trap").exists()


@pytest.mark.parametrize("name", ["open_clip", "vit-bert", "siglip"])
def test_tensors_that_do_not_match(name: str, copy_of: Callable[[str], Path], refused: Callable[..., str]) -> None:
    folder = copy_of(name)
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    first, second, *_ = names = sorted(one for one in state if state[one].dim() == 2)
    for change, words in (
        (lambda: {n: x for n, x in state.items() if n != first}, f"{first} is missing"),
        (lambda: {**state, first: state[first][:, :-1].contiguous()}, f"{first} has shape"),
        (lambda: {**state, "more": torch.zeros(1)}, "more is unknown"),
        (lambda: {**state, first: state[second].clone(), second: state[first].clone()}, "has shape"),
    ):
        if words.endswith("has shape") and state[first].shape == state[second].shape:
            continue
        save_file(change(), file)
        assert words in refused("import", str(folder))
    save_file({n: x for n, x in state.items() if n not in names}, file)
    line = refused("import", str(folder))
    assert line.count("is missing") == 10
    assert f"and {len(names) - 10} more" in line
    for broken in (b"", b"\x00" * 30, file.read_bytes()[:-40]):
        file.write_bytes(broken)
        assert "cannot be read" in refused("import", str(folder))
    file.unlink()
    line = refused("import", str(folder))
    assert f"{folder} " in line
    assert "weights" in line


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["hf text", "vit-bert"])
def test_tokenizers_that_do_not_match(
    name: str, copy_of: Callable[[str], Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(name)
    path = folder / "tokenizer.json"
    whole = path.read_text()

    def more(fields: Any) -> None:
        vocab = fields["model"]["vocab"]
        vocab |= {f"word{i}": len(vocab) + i for i in range(500)}

    edit(path, more)
    assert "the tokenizer has" in refused("import", str(folder))
    path.write_text("{")
    assert "tokenizer.json" in refused("import", str(folder))
    path.unlink()
    line = refused("import", str(folder))
    assert "tokenizer" in line
    path.write_text(whole)
    run = verify_module.run

    def other(*given: Any) -> dict[str, np.ndarray]:
        """Return outputs as of another tokenizer than the one that dualenc reads."""
        found = run(*given)
        return {**found, "text_ids": found["text_ids"][:, ::-1]}

    monkeypatch.setattr(verify_module, "run", other)
    assert "the tokenizer does not match" in refused("import", str(folder))


def in_config(change: Callable[[Any], None]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", change)


def in_open_clip(part: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(fields: Any) -> None:
        (fields["model_cfg"].setdefault(part, {}) if part != "preprocess_cfg" else fields[part])[key] = value

    return lambda folder: edit(folder / "open_clip_config.json", change)


def in_processor(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (path,) = folder.glob("*processor_config.json")
        edit(path, lambda fields: fields.get("image_processor", fields).update(values))

    return change


CHANGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no processor": ("vit-bert", lambda f: [x.unlink() for x in f.glob("*processor_config.json")], "has no preproc"),
    "resample": ("vit-bert", in_processor(resample=0), "resample 0"),
    "rescale": ("vit-bert", in_processor(rescale_factor=0.5), "rescale_factor 0.5"),
    "crop": ("vit-bert", in_processor(crop_size={"height": 8, "width": 8}), "crop_size"),
    "size": ("siglip", in_processor(size={"height": 8, "width": 16}), "is not the image tower's 16"),
    "mean": ("vit-bert", in_processor(image_mean=[0.5]), "mean [0.5]"),
    "vision": ("vit-bert", in_config(lambda c: c["vision_config"].update(model_type="swin")), "model_type 'swin'"),
    "text": ("vit-bert", in_config(lambda c: c["text_config"].update(model_type="t5")), "model_type 't5'"),
    "no pooler": ("vit-bert", in_config(lambda c: c["text_config"].update(model_type="distilbert")), "no pooler"),
    "kind": ("vit-bert", in_config(lambda c: c.update(model_type="blip")), "model_type 'blip'"),
    "decoder": ("vit-bert", in_config(lambda c: c["text_config"].update(is_decoder=True)), "is_decoder true"),
    "activation": ("vit-bert", in_config(lambda c: c["vision_config"].update(hidden_act="mish")), "hidden_act 'mish'"),
    "timm's name": (
        "timm-bert", in_config(lambda c: c["vision_config"].update(architecture="local-dir:/x")), "no model",
    ),
    "weights of elsewhere": (
        "timm-bert", in_config(lambda c: c["vision_config"].update(model_args={"pretrained": 1})), "pretrained",
    ),
    "no JSON": ("vit-bert", lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "list": ("vit-bert", lambda f: (f / "config.json").write_text("[]"), "model_type None"),
    "pool": ("open_clip", in_open_clip("text_cfg", "pool_type", "sum"), "pool_type 'sum'"),
    "attentional": ("open_clip", in_open_clip("vision_cfg", "attentional_pool", True), "attentional_pool True"),
    "qk_norm": ("open_clip", in_open_clip("text_cfg", "qk_norm", True), "qk_norm True"),
    "resize": ("open_clip", in_open_clip("preprocess_cfg", "resize_mode", "random"), "resize_mode 'random'"),
    "interpolation": ("open_clip", in_open_clip("preprocess_cfg", "interpolation", "random"), "interpolation"),
    "no model_cfg": ("open_clip", lambda f: (f / "open_clip_config.json").write_text("{}"), "a model_cfg"),
    "proj": ("hf text", in_open_clip("text_cfg", "hf_proj_type", "cube"), "hf_proj_type 'cube'"),
    "max": ("hf text", in_open_clip("text_cfg", "hf_pooler_type", "max_pooler"), "hf_pooler_type 'max_pooler'"),
    "mt5": ("hf text", in_config(lambda c: c.update(model_type="mt5")), "model_type 'mt5'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_unsupported_configurations_are_refused(
    name: str, copy_of: Callable[[str], Path], refused: Callable[..., str]
) -> None:
    kind, change, words = CHANGES[name]
    folder = copy_of(kind)
    change(folder)
    assert words in refused("import", str(folder))


def test_an_export_does_not_replace_a_model_or_other_files(
    kept: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    of_ours({}, BERT, {}).save(tmp_path / "ours")
    before = (tmp_path / "ours" / "model.safetensors").read_bytes()
    for out in (tmp_path / "ours", tmp_path / "other"):
        of_ours({}, BERT, {}).save(tmp_path / "other")
        line = fails(capsys, ["export", str(tmp_path / "ours"), str(out), "--format", "open_clip"])
        assert f"{out} is a model of dualenc" in line
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    line = fails(capsys, ["export", str(tmp_path / "ours"), str(tmp_path / "mine"), "--format", "open_clip"])
    assert "choose another path" in line
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_nothing_is_written_without_the_other_library(
    kept: dict[str, Path], refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = "import sys\nsys.modules['transformers'] = None\n"  # as if it were not installed
    program = tmp_path / "peers.py"
    program.write_text(hidden + Path(str(references.__file__)).read_text())
    monkeypatch.setattr(references, "__file__", str(program))
    line = refused("export", str(kept["ours"]), "--format", "transformers")
    assert "transformers" in line
    assert "what cannot be checked is not written" in line
    assert "what cannot be checked is not written" in refused("import", str(kept["vit-bert"]))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["pixels", "ids", "texts", "pictures", "scale"])
def test_a_difference_above_the_tolerance_is_refused(
    name: str, kept: dict[str, Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = verify_module.run

    def off(reference: Reference, model: str, inputs: Inputs) -> dict[str, np.ndarray]:
        found = run(reference, model, inputs)
        found[name] = found[name].copy()
        found[name].flat[0] += 3e-5 * max(1, abs(found[name].flat[0]))
        return found

    monkeypatch.setattr(verify_module, "run", off)
    for arguments in (
        ("import", str(kept["hf text"])),
        ("export", str(kept["ours"]), "--format", "open_clip"),
        ("export", str(kept["ours"]), "--format", "transformers"),
    ):
        line = refused(*arguments)
        assert "differ by 3" in line
        assert "nothing was written" in line


@pytest.mark.usefixtures("in_process")
def test_a_difference_of_nan_is_refused(
    kept: dict[str, Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = verify_module.run
    monkeypatch.setattr(verify_module, "run", lambda *given: {**(found := run(*given)), "ids": found["ids"] * np.nan})
    assert "differ by nan" in refused("export", str(kept["ours"]), "--format", "open_clip")


VALUES: tuple[Any, ...] = (None, "x", -1, 0, 10**9, float("nan"), [], {})


def altered(fields: Any) -> Iterator[tuple[str, Any]]:
    """Yield an object with each of its values removed or replaced, and the same for the objects in it."""
    for key, value in fields.items():
        yield f"no {key}", {other: x for other, x in fields.items() if other != key}
        for wrong in VALUES:
            yield f"{key} {wrong!r}", {**fields, key: wrong}
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", {**fields, key: inside}) for name, inside in altered(value))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["open_clip", "hf text", "siglip", "vit-bert", "clip-clip", "timm-bert"])
@pytest.mark.parametrize("file", ["config.json", "open_clip_config.json", "preprocessor_config.json"])
def test_invalid_configs_give_one_line(name: str, file: str, copy_of: Callable[[str], Path], seed: int) -> None:
    folder = copy_of(name)
    path = folder / file
    if not path.is_file():
        pytest.skip("has none")
    rng = np.random.default_rng(seed)
    cases = list(altered(json.loads(path.read_text())))
    for i in rng.permutation(len(cases))[:25]:
        what, fields = cases[i]
        path.write_text(json.dumps(fields))
        found: Exception | None = None
        try:
            with warnings.catch_warnings(action="ignore"):
                open_dual(str(folder)).embedder()
        except Exception as error:
            found = error
        assert found is None or (isinstance(found, ModelError) and "\n" not in str(found)), f"{what}: {found!r}"


def closed_by_2(backend: Any) -> Any:
    """Return a tokenizer whose closing token has the id 2 and whose opening token has the id 3."""
    fields = json.loads(backend.to_str())
    ids = {"[CLS]": 3, "[SEP]": 2}
    fields["model"]["vocab"] |= ids
    for token in fields["added_tokens"]:
        token["id"] = ids.get(token["content"], token["id"])
    for name, number in ids.items():
        fields["post_processor"]["special_tokens"][name]["ids"] = [number]
    return type(backend).from_str(json.dumps(fields))


def test_causal_tower_closed_by_id_2(
    refused: Callable[..., str], copy_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For this id transformers pools at the largest id of a text: it is refused before anything is compared."""
    monkeypatch.setattr(verify_module, "run", lambda *given: pytest.fail("compares"))
    theirs = copy_of("clip-clip")
    edit(theirs / "config.json", lambda fields: fields["text_config"].update(eos_token_id=2))
    assert "eos_token_id 2" in refused("import", str(theirs))
    edit(theirs / "config.json", lambda fields: fields["text_config"].update(eos_token_id=3))
    ours = open_dual(theirs).embedder()
    ours.tokenizer = Tokenizer(closed_by_2(ours.tokenizer.backend), ours.dual_encoder.config.text.context_length)
    assert ours.tokenizer.encode([""])[0][-1] == 2
    ours.save(tmp_path / "ours")
    assert "eos_token_id 2" in refused("export", str(tmp_path / "ours"), "--format", "transformers")
