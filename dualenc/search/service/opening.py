"""Opening of what is served: an index with its model, a model, or a folder of ONNX."""

from pathlib import Path

from dualenc.search.service.core import Limits, Service
from dualenc.utils.decoding import read_text
from dualenc.utils.errors import DataError, ModelError

INDEX, ONNX = "search.json", "onnx.json"  # files that tell what a folder is
SHORTEST_KEY = 16  # characters


def open_service(source: str, limits: Limits, model: str | None = None) -> Service:
    """Load what a user wants to serve.

    Args:
        source: folder of an index, folder of `dualenc export --format onnx`, or a spec of a model.
        limits: limits of the service.
        model: spec of the index's model, in place of the recorded one.

    Raises:
        ModelError: If the model cannot be read, or is another one than the index was made with.
        DataError: If the index cannot be read, or a model is named for something else than an index.
    """
    folder = Path(source)
    if model is not None and not (folder / INDEX).is_file():
        raise DataError(f"--model names the model of an index, and {source} is not an index: leave it out")
    if (folder / ONNX).is_file():
        from dualenc.search.service.onnx_engine import OnnxEngine

        return Service(OnnxEngine(folder, model_name(source)), limits=limits)
    if (folder / INDEX).is_file():
        return _open_index(folder, limits, model)
    from dualenc.formats.model_folder import detect, other_content
    from dualenc.inference.text_tower import load_text_tower
    from dualenc.search.service.torch_engine import TorchEngine

    if folder.is_dir() and not detect(folder).kinds:
        other = other_content(folder)
        raise ModelError(f"{source} is neither an index nor a model{f': it is {other}' if other else ''}")
    return Service(TorchEngine(load_text_tower(source).source, model_name(source)), limits=limits)


def _open_index(folder: Path, limits: Limits, model: str | None) -> Service:
    """Load an index and its model."""
    from dualenc.inference.text_tower import TextTower
    from dualenc.search.index import Index
    from dualenc.search.service.torch_engine import TorchEngine

    index = Index.open(folder, model)
    found = index.model
    name = model_name(index.about["model"] if model is None else model)
    engine = TorchEngine(found.source if isinstance(found, TextTower) else found, name)
    return Service(engine, index, folder.resolve().name, limits)


def model_name(spec: str) -> str:
    """Return the name of a model in answers: that of its folder without the folders above, or a spec of a hub.

    Example:
        >>> model_name("hf-hub:owner/name"), model_name("/home/kim/runs/first/best"), model_name("/home/kim/models/vit")
        ('hf-hub:owner/name', 'first/best', 'vit')
    """
    if spec.startswith(("hf-hub:", "open_clip:")):
        return spec
    path = Path(spec).absolute()
    return f"{path.parent.name}/{path.name}" if path.name in ("best", "last") else path.name


def read_keys(path: Path) -> list[str]:
    """Read the keys of a file, one on each line; blank lines and lines that begin with # are left out.

    Raises:
        DataError: If the file cannot be read, or has no key, or a short one.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except DataError as error:
        raise DataError(f"--api-key-file {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    way_out = f"write one with: openssl rand -hex 32 > {path}"
    if not keys:
        raise DataError(f"--api-key-file {path} does not have a key: {way_out}")
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            need = f"{SHORTEST_KEY} letters and digits of ASCII or more, without blanks"
            raise DataError(f"--api-key-file {path}: key {number} must have {need}; {way_out}")
    return keys
