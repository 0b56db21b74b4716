"""Folders of sentence-transformers: the same vectors as the library, which runs in its own process, or refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import perturb, tiny_tokenizer
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.huggingface.text_checkpoint import open_text
from dualenc.formats.sentence_transformers import ENCODER_SETTINGS, SETTINGS
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.models import HeadConfig
from dualenc.models.heads.vectors import EmbeddingConfig
from dualenc.training.text import TextTask
from dualenc.utils.errors import ModelError

WIDTH, LENGTH = 16, 48
PROMPTS = {"query": "the red cat: ", "topic": "two boats and ", "none": ""}
TEXTS = ["a dog sits", "A DOG Sits", "the blue mat", "cat " * 60, "two hats with a tree and boats on it", "x"]
# The program of the peer: for each folder the vectors of each call of `encode`; for "saved-..." it saves the folder.
PEER = """
import json, sys
from pathlib import Path
import numpy as np, torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

root, (texts, calls) = Path(sys.argv[1]), json.loads(Path(sys.argv[1], "calls.json").read_text())
torch.manual_seed(int(sys.argv[2]))
modules = [Transformer(str(root / "base")), Pooling(16, "mean"), Dense(16, 9), Dense(9, 7, False, torch.nn.GELU())]
more = {"prompts": {"topic": "a red "}, "default_prompt_name": "topic", "truncate_dim": 5}
SentenceTransformer(modules=[*modules, Normalize()], device="cpu", **more).save(str(root / "saved"))
found = {}
for folder, some in calls.items():
    model = SentenceTransformer(str(root / folder), device="cpu")
    for i, options in enumerate(some):
        found[f"{folder}/{i}"] = model.encode(texts, **options)
np.savez(root / "found.npz", **found)
"""


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def dense(width: int, out: int, activation: str, bias: bool = True, pickled: bool = False) -> Callable[[Path], None]:
    """Return a function that writes a module Dense with random weights."""

    def made(folder: Path) -> None:
        about = {"in_features": width, "out_features": out, "bias": bias, "activation_function": activation}
        write(folder / "config.json", about)
        linear = torch.nn.Linear(width, out, bias)
        state = {f"linear.{name}": 3 * x.detach() for name, x in linear.state_dict().items()}
        if pickled:
            torch.save(state, folder / "pytorch_model.bin")
        else:
            save_file(state, folder / "model.safetensors")

    return made


class Case(NamedTuple):
    """Content of a folder apart from the encoder.

    Attributes:
        pooling: content of the config of Pooling.
        dense: functions that write the modules Dense.
        normalize: whether there is a module Normalize.
        settings: content of config_sentence_transformers.json.
        encoder: name and content of the encoder's settings.
        inside: folder of the encoder.
        differs: whether the vectors differ from those without all this.
    """

    pooling: dict[str, Any] = {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True}
    dense: tuple[Callable[[Path], None], ...] = ()
    normalize: bool = True
    settings: dict[str, Any] = {}
    encoder: tuple[str, dict[str, Any]] = ("sentence_bert_config.json", {})
    inside: str = ""
    differs: bool = True


TANH, GELU, RELU = ("torch.nn.modules.activation." + name for name in ("Tanh", "GELU", "ReLU"))
LOWER = {"max_seq_length": 9, "do_lower_case": True}
CASES = {
    "plain": Case(differs=False),
    "no normalize": Case(normalize=False, differs=False),
    "prompts": Case(settings={"prompts": PROMPTS, "default_prompt_name": None}, differs=False),
    "default prompt": Case(settings={"prompts": PROMPTS, "default_prompt_name": "topic"}),
    "default of the library": Case(settings={"default_prompt_name": "query"}, differs=False),
    "truncate_dim": Case(settings={"truncate_dim": 6, "similarity_fn_name": "cosine"}),
    "a large truncate_dim": Case(settings={"truncate_dim": 99}, differs=False),
    "dot": Case(settings={"similarity_fn_name": "dot"}, differs=False),
    "tanh": Case(dense=(dense(WIDTH, 10, TANH),)),
    "identity": Case(dense=(dense(WIDTH, 24, "torch.nn.modules.linear.Identity", False, pickled=True),)),
    "two": Case(dense=(dense(WIDTH, 12, RELU), dense(12, 8, GELU, False)), normalize=False),
    "cls": Case(pooling={"embedding_dimension": WIDTH, "pooling_mode": "cls", "include_prompt": True}),
    "last": Case(pooling={"word_embedding_dimension": WIDTH, "pooling_mode_lasttoken": True}),
    "mean by default": Case(pooling={"embedding_dimension": WIDTH, "pooling_mode_cls_token": False}, differs=False),
    "a list": Case(pooling={"embedding_dimension": WIDTH, "pooling_mode": ["cls"]}),
    "longer": Case(encoder=("sentence_bert_config.json", {"max_seq_length": LENGTH})),
    "its own folder": Case(inside="0_Transformer", dense=(dense(WIDTH, 5, TANH),)),
    "all": Case(
        pooling={"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": True},
        dense=(dense(WIDTH, 12, TANH), dense(12, 9, TANH)),
        settings={"prompts": PROMPTS, "default_prompt_name": "query", "truncate_dim": 7, "__version__": {}},
        encoder=("sentence_roberta_config.json", {**LOWER, "unpad_inputs": None, "model_args": {"dtype": "float32"}}),
        inside="0_Transformer",
    ),
    **{name: Case(encoder=(name, LOWER)) for name in ENCODER_SETTINGS},
}  # fmt: skip


def write_case(root: Path, name: str) -> Path:
    """Write the folder of a case, whose encoder is that of root/base."""
    case, folder = CASES[name], root / name
    shutil.copytree(root / "base", folder / case.inside)
    kinds = ["Transformer", "Pooling", *["Dense"] * len(case.dense), *["Normalize"] * case.normalize]
    paths = [case.inside, *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], 1))]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    write(folder / "modules.json", entries)
    write(folder / "1_Pooling" / "config.json", case.pooling)
    for i, make in enumerate(case.dense, 2):
        (folder / f"{i}_Dense").mkdir()
        make(folder / f"{i}_Dense")
    write(folder / case.inside / case.encoder[0], case.encoder[1])
    if case.settings:
        write(folder / SETTINGS, case.settings)
    return folder


def write_base(root: Path) -> None:
    """Write an encoder with every tensor perturbed, and a tokenizer that keeps upper case."""
    backend = tiny_tokenizer(32).backend
    backend.normalizer = None  # type: ignore[assignment]
    config = BertConfig(
        vocab_size=200, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    perturb(BertModel(config), 0.3).save_pretrained(root / "base")
    Tokenizer(backend, 32).save(root / "base" / "tokenizer.json")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32, "pad_token": "[PAD]"}
    write(root / "base" / "tokenizer_config.json", {**about, "cls_token": "[CLS]", "sep_token": "[SEP]"})


class Peer(NamedTuple):
    """Options of the calls of the library by folder, and its vectors by folder and number of the call."""

    calls: dict[str, list[dict[str, Any]]]
    found: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    write_base(root)
    for name in CASES:
        write_case(root, name)
    return root


@pytest.fixture(scope="module")
def peer(folders: Path) -> Peer:
    calls: dict[str, list[dict[str, Any]]] = {"saved": [{}, {"prompt": ""}, {"truncate_dim": 7}]}
    for name, case in CASES.items():
        names = [{"prompt_name": one} for one in case.settings.get("prompts", {})]
        calls[name] = [{}, *names, {"prompt": "blue hats: ", "truncate_dim": 4}, {"prompt": ""}]
    write(folders / "calls.json", [TEXTS, calls])
    command = [sys.executable, "-I", "-c", PEER, str(folders), str(torch.randint(1 << 30, ()).item())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(folders / "found.npz") as arrays:
        return Peer(calls, dict(arrays))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def called(model: TextPredictor, options: dict[str, Any]) -> np.ndarray:
    """Embed with the options of the library under our names."""
    prompt = options.get("prompt", options.get("prompt_name"))
    return model.embed(TEXTS, prompt=prompt, dim=options.get("truncate_dim")).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "saved"])
def test_vectors_equal_those_of_the_library(name: str, folders: Path, peer: Peer, tmp_path: Path) -> None:
    model = load_text(folders / name, "cpu")
    for i, options in enumerate(peer.calls[name]):
        theirs = unit(peer.found[f"{name}/{i}"])
        ours = called(model, options)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=str(options))
    # What was read is kept: by our own format, and by the architecture of a run that begins with it.
    model.save(tmp_path / "ours")
    again = load_text(tmp_path / "ours", "cpu")
    assert all(torch.equal(again.embed(TEXTS, prompt=x), model.embed(TEXTS, prompt=x)) for x in (None, "", "a: "))
    assert again.model.vectors == model.model.vectors
    # The control: without all this the vectors are other ones.
    plain, theirs = load_text(folders / "plain", "cpu").embed(TEXTS).numpy(), unit(peer.found[f"{name}/0"])
    same = plain.shape == theirs.shape and float((plain * theirs).sum(-1).min()) > 0.9999
    assert same != (name == "saved" or CASES[name].differs)


def test_a_run_begins_with_all_of_it(folders: Path) -> None:
    task = TextTask({"pairs": HeadConfig("embedding", problem="negatives")}, text_from=str(folders / "all"))
    checkpoint = open_text(folders / "all")
    loaded = task.model.load_pretrained(checkpoint.model())
    assert loaded.whole == ("pairs",)
    ours = TextPredictor(task.model.eval(), checkpoint.tokenizer())
    torch.testing.assert_close(ours.embed(TEXTS), load_text(folders / "all", "cpu").embed(TEXTS))
    # The control: a head that says what it has keeps to it.
    own = HeadConfig("embedding", problem="negatives", embedding=EmbeddingConfig())
    task = TextTask({"pairs": own}, text_from=str(folders / "all"))
    task.model.load_pretrained(checkpoint.model())
    assert TextPredictor(task.model.eval(), checkpoint.tokenizer()).embed(TEXTS).shape == (len(TEXTS), WIDTH)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "prompt": ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt false"),
    "max": ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling by max"),
    "weighted": ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "pooling by weightedmean"),
    "sqrt": ("1_Pooling/config.json", {"pooling_mode_mean_sqrt_len_tokens": True}, "mean and mean_sqrt_len_tokens"),
    "joined": ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "pooling by cls and mean"),
    "new key": ("1_Pooling/config.json", {"some_key": 1}, "some_key is unknown"),
    "residual": ("2_Dense/config.json", {"use_residual": True}, "use_residual true"),
    "activation": ("2_Dense/config.json", {"activation_function": "torch.nn.Sigmoid"}, "nn.Sigmoid cannot"),
    "code": ("2_Dense/config.json", {"activation_function": "os.system"}, "activation_function os.system"),
    "tokens": ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
    "inputs": ("2_Dense/config.json", {"in_features": 9}, "in_features 9 must be 16"),
    "outputs": ("2_Dense/config.json", {"out_features": 11}, "does not match its config"),
    "no outputs": ("2_Dense/config.json", {"out_features": None}, "out_features must be a positive number"),
    "normalize": ("3_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
    "kind": (SETTINGS, {"model_type": "SparseEncoder"}, "model_type SparseEncoder"),
    "default": (SETTINGS, {"default_prompt_name": "topc"}, "default_prompt_name 'topc'"),
    "dim": (SETTINGS, {"truncate_dim": 0}, "truncate_dim must be"),
    "similarity": (SETTINGS, {"similarity_fn_name": "euclidean"}, "similarity_fn_name euclidean"),
    "length": ("sentence_bert_config.json", {"max_seq_length": "9"}, "max_seq_length must be"),
    "task": ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task"),
    "output": ("sentence_bert_config.json", {"module_output_name": "sentence_embedding"}, "module_output_name"),
    "query": ("sentence_bert_config.json", {"query_length": 4}, "query_length 4"),
    "options": ("sentence_bert_config.json", {"config_args": {"hidden_act": "relu"}}, "config_args"),
    "adapter": ("adapter_config.json", {}, "adapters cannot be computed"),
}  # fmt: skip


def test_what_cannot_be_computed_is_refused_by_name(folders: Path, tmp_path: Path) -> None:
    load_text(folders / "tanh", "cpu")  # The control: the folder is read before each change.
    for i, (file, change, message) in enumerate(REFUSED.values()):
        folder = tmp_path / str(i)
        shutil.copytree(folders / "tanh", folder)
        before = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        write(folder / file, {**before, **change})
        with pytest.raises(ModelError, match=message) as error:
            load_text(folder, "cpu")
        assert file.partition("/")[0] in str(error.value)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["Transformer", "Pooling", "LayerNorm"], "LayerNorm cannot"),
        (["Transformer", "Pooling", "Normalize", "Dense"], "Normalize at this place"),
        (["Transformer", "Dense", "Pooling"], "must begin with a Transformer and a Pooling"),
        (["Transformer"], "must begin with a Transformer and a Pooling"),
    ],
)
def test_other_modules_are_refused(kinds: list[str], message: str, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "tanh", tmp_path / "it")
    places = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    entries = [
        {"name": str(i), "path": places.get(kind, f"{i}_{kind}"), "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    write(tmp_path / "it" / "modules.json", entries)
    with pytest.raises(ModelError, match=message):
        load_text(tmp_path / "it", "cpu")
    write(tmp_path / "it" / "modules.json", [{**entries[0], "type": "mine.Transformer"}, *entries[1:]])
    with pytest.raises(ModelError, match=r"mine\.Transformer cannot"):
        load_text(tmp_path / "it", "cpu")
    write(tmp_path / "it" / "modules.json", [{**entries[0], "path": "../base"}, *entries[1:]])
    with pytest.raises(ModelError, match="must lie inside"):
        load_text(tmp_path / "it", "cpu")


def test_dot_products_need_unit_vectors_and_prompts_no_special_tokens(folders: Path, tmp_path: Path) -> None:
    for i, (name, settings, message) in enumerate([
        ("no normalize", {"similarity_fn_name": "dot"}, "similarity_fn_name dot"),
        ("plain", {"similarity_fn_name": "dot", "truncate_dim": 4}, "similarity_fn_name dot"),
        ("plain", {"prompts": {"query": "[SEP] a "}}, "prompts.query '\\[SEP\\] a ' has a special token"),
        ("plain", {"prompts": {"query": 3}}, "prompts must be an object of strings"),
    ]):  # fmt: skip
        shutil.copytree(folders / name, tmp_path / str(i))
        write(tmp_path / str(i) / SETTINGS, settings)
        with pytest.raises(ModelError, match=message):
            load_text(tmp_path / str(i), "cpu")


def test_files_of_modules_are_downloaded(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository is read as a folder is, with the files that its modules need and no others."""
    import huggingface_hub

    copy, source = tmp_path / "commit", tmp_path / "source"
    copy.mkdir()
    shutil.copytree(folders / "all", source)

    def download(name: str, revision: str | None = None, allow_patterns: Any = ()) -> str:
        for path in source.rglob("*"):
            inside = path.relative_to(source)
            if path.is_file() and any(
                inside.match(one) and len(inside.parts) == len(Path(one).parts) for one in allow_patterns
            ):
                (copy / inside).parent.mkdir(exist_ok=True)
                shutil.copy(path, copy / inside)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    (source / "0_Transformer" / "other.bin").write_text("not needed")
    ours = load_text("hf-hub:owner/name", "cpu").embed(TEXTS)
    assert torch.equal(ours, load_text(source, "cpu").embed(TEXTS))
    assert not (copy / "0_Transformer" / "other.bin").exists()
