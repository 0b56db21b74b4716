"""Text checkpoints in the wild: old names, pickles, several files, other programs' folders; faults in one line each."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_embedder, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, BertTokenizer

from dualenc.formats.huggingface.text_checkpoint import open_text
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.tokens import Tokens
from dualenc.utils.errors import ModelError

SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
SMALL |= {"max_position_embeddings": 16}


def perturb(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture
def peer(tmp_path: Path, seed: int) -> BertForMaskedLM:
    """A BERT of transformers in tmp_path/peer, with a tokenizer."""
    tokenizer = tiny_tokenizer()
    config = BertConfig(vocab_size=tokenizer.vocab_size, **SMALL)
    model = perturb(BertForMaskedLM(config))
    model.save_pretrained(tmp_path / "peer")
    tokenizer.save(tmp_path / "peer" / "tokenizer.json")
    return model


def rewrite(folder: Path, change: Any, file: str = "model.safetensors") -> None:
    """Write the checkpoint again with changed tensors."""
    state = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    if file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        save_file(state, folder / file)


def old_names(state: dict[str, Any]) -> dict[str, Any]:
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        state = {key.replace(new, name): x for key, x in state.items()}
    return state


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state as written before safetensors, with tied tensors twice."""
    words, bias = state["bert.embeddings.word_embeddings.weight"], state["cls.predictions.bias"]
    stale = {"bert.embeddings.position_ids": torch.arange(16)[None]}
    return {**state, **stale, "cls.predictions.decoder.weight": words, "cls.predictions.decoder.bias": bias}


CHANGES = {
    "old names": (old_names, "model.safetensors"),
    "wrapped": (lambda state: {f"module.{key}": x for key, x in state.items()}, "model.safetensors"),
    "pickled": (copied, "pytorch_model.bin"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_names_and_files_of_earlier_versions(change: str, peer: BertForMaskedLM, tmp_path: Path) -> None:
    expected = open_text(tmp_path / "peer").model().state_dict()
    rewrite(tmp_path / "peer", *CHANGES[change])
    found = open_text(tmp_path / "peer").model()
    assert all(torch.equal(x, expected[name]) for name, x in found.state_dict().items())
    assert list(found.head_configs) == ["mlm"]
    assert found.encoder.blocks[0].mlp_norm.weight.requires_grad
    with torch.no_grad():
        for parameter in found.parameters():  # Training must be able to write to the memory.
            parameter.zero_()


def test_pickle_without_zip(peer: BertForMaskedLM, tmp_path: Path) -> None:
    expected = open_text(tmp_path / "peer").model().state_dict()
    state = load_file(tmp_path / "peer" / "model.safetensors")
    (tmp_path / "peer" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "peer" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = open_text(tmp_path / "peer").model()
    assert all(torch.equal(x, expected[name]) for name, x in found.state_dict().items())


class Trap:
    """Object that creates a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path("trap").touch, ())


def test_pickles_never_run_code(peer: BertForMaskedLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rewrite(tmp_path / "peer", lambda state: {**state, "trap": Trap()}, "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin cannot be read"):
        open_text(tmp_path / "peer")
    assert not (tmp_path / "trap").exists()


def test_checkpoint_of_several_files(peer: BertForMaskedLM, tmp_path: Path) -> None:
    expected = open_text(tmp_path / "peer").model().state_dict()
    shutil.rmtree(tmp_path / "peer")
    peer.save_pretrained(tmp_path / "peer", max_shard_size="2KB")
    assert len(list((tmp_path / "peer").glob("*.safetensors"))) > 1
    found = open_text(tmp_path / "peer").model()
    assert all(torch.equal(x, expected[name]) for name, x in found.state_dict().items())
    index = tmp_path / "peer" / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"] = dict.fromkeys(fields["weight_map"], "../elsewhere.safetensors")
    index.write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="no weight_map"):
        open_text(tmp_path / "peer")
    fields["weight_map"] = dict.fromkeys(fields["weight_map"], "gone.safetensors")
    index.write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=r"gone\.safetensors, which is missing"):
        open_text(tmp_path / "peer")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_single(dtype: torch.dtype, peer: BertForMaskedLM, tmp_path: Path) -> None:
    before = open_text(tmp_path / "peer").model().state_dict()
    rewrite(tmp_path / "peer", lambda state: {name: x.to(dtype) for name, x in state.items()})
    for name, x in open_text(tmp_path / "peer").model().state_dict().items():
        assert x.dtype == torch.float32
        assert torch.equal(x, before[name].to(dtype).float())


def test_decoder_that_differs_is_not_tied(peer: BertForMaskedLM, tmp_path: Path) -> None:
    """Read a decoder that differs from the embeddings, although the config ties them, as transformers does."""
    other = torch.randn_like(peer.cls.predictions.decoder.weight)
    rewrite(tmp_path / "peer", lambda state: {**state, "cls.predictions.decoder.weight": other})
    model = open_text(tmp_path / "peer").model()
    again = BertForMaskedLM.from_pretrained(tmp_path / "peer").eval()
    ids = torch.randint(5, 40, (2, 9))
    with torch.no_grad():
        expected = again(ids).logits
        found = model(Tokens.pack(ids.tolist()), "mlm").view_as(expected)
    assert not model.head_configs["mlm"].tied
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_two_different_biases_are_refused(peer: BertForMaskedLM, tmp_path: Path) -> None:
    bias = {"cls.predictions.decoder.bias": torch.randn(peer.config.vocab_size)}
    rewrite(tmp_path / "peer", lambda state: {**state, **bias})
    with pytest.raises(ModelError, match=r"decoder\.bias differs from cls\.predictions\.bias"):
        open_text(tmp_path / "peer").model()


def test_missing_and_wrong_labels(tmp_path: Path, seed: int) -> None:
    from transformers import BertForSequenceClassification

    config = BertConfig(vocab_size=40, num_labels=3, **SMALL)
    perturb(BertForSequenceClassification(config)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())

    def opened(**change: Any) -> HeadConfig:
        path.write_text(json.dumps({**fields, **change}))
        return open_text(tmp_path).heads["classification"]

    assert opened(id2label=None).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert opened(id2label={"2": "c", "0": "a", "1": "b"}).labels == ("a", "b", "c")
    wrong = {
        "id2label has 1 labels, the head 3": {"id2label": {"0": "a"}},
        "id2label": {"id2label": {"0": "a", "1": "a", "2": "b"}},
        "problem_type": {"problem_type": "ranking"},
        "one label": {"problem_type": "regression"},
    }
    for message, change in wrong.items():
        with pytest.raises(ModelError, match=message) as caught:
            opened(**change)
        assert str(path) in str(caught.value)


def test_folders_without_a_checkpoint(peer: BertForMaskedLM, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for spec, message in {"nowhere": "must be a folder", "empty": "neither config.json nor"}.items():
        with pytest.raises(ModelError, match=message):
            open_text(tmp_path / spec)
    (tmp_path / "peer" / "tokenizer.json").unlink()
    open_text(tmp_path / "peer").model()
    (tmp_path / "peer" / "spiece.model").touch()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json: save one there with transformers"):
        load_text(tmp_path / "peer")
    (tmp_path / "peer" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        open_text(tmp_path / "peer")
    (tmp_path / "peer" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        open_text(tmp_path / "peer")
    (tmp_path / "peer" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        open_text(tmp_path / "peer")


def test_tokenizer_with_more_entries_than_the_encoder(peer: BertForMaskedLM, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend.add_tokens(["onemore"])
    tokenizer.save(tmp_path / "peer" / "tokenizer.json")
    with pytest.raises(ModelError, match=f"tokenizer has {tokenizer.vocab_size} entries, the model's vocab_size"):
        load_text(tmp_path / "peer")


@pytest.mark.parametrize("lower", [True, False])
def test_vocab_txt_without_tokenizer_json(lower: bool, peer: BertForMaskedLM, tmp_path: Path) -> None:
    """Take the case of the letters from tokenizer_config.json, since vocab.txt does not say it."""
    folder = tmp_path / "peer"
    vocab = tiny_tokenizer().backend.get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower, "model_max_length": 10}))
    tokenizer = open_text(folder).tokenizer()
    texts = ["A cat, a DOG", "two hâts", "boats " * 20]
    expected = BertTokenizer(vocab=vocab, do_lower_case=lower)(texts, truncation=True, max_length=10)["input_ids"]
    assert tokenizer.encode(texts) == expected
    assert tokenizer.context_length == 10


def test_byte_level_bpe_without_tokenizer_json(tmp_path: Path, seed: int) -> None:
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    from dualenc.data import Tokenizer

    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    trained = json.loads(Tokenizer.train(["a cat sits on the mat", "two dogs"], 300, 16, "bpe").backend.to_str())[
        "model"
    ]
    letters = [token for token in trained["vocab"] if not token.startswith("[")]
    vocab = {**special, **{token: i + 5 for i, token in enumerate(letters)}}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in trained["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = RobertaConfig(vocab_size=len(vocab), **{**SMALL, "max_position_embeddings": 18})
    perturb(RobertaModel(config)).save_pretrained(tmp_path)
    tokenizer = open_text(tmp_path).tokenizer()
    peer = RobertaTokenizer(vocab=vocab, merges=[tuple(pair.split()) for pair in merges])
    texts = ["a cat sits", "Two  dogs\n!", ""]
    assert tokenizer.encode(texts) == peer(texts)["input_ids"]


def test_transformers_reads_the_saved_tokenizer(tmp_path: Path, seed: int) -> None:
    tokenizer = tiny_tokenizer()
    text = TextConfig(tokenizer.vocab_size, 16, 2, 2, context_length=16, types=2)
    TextPredictor(perturb(TextModel(text, {})), tokenizer).save(tmp_path / "model")
    peer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = ["A cat sits on the mat", "", "boats " * 30]
    assert peer(texts, truncation=True)["input_ids"] == tokenizer.encode(texts)
    assert (peer.mask_token, peer.pad_token, peer.model_max_length) == ("[MASK]", "[PAD]", tokenizer.context_length)
    pairs = peer(["a cat"], ["two dogs"])
    assert (pairs["input_ids"], pairs["token_type_ids"]) == tokenizer.encode_pairs([("a cat", "two dogs")])


def test_text_tower_of_a_model_directory(tmp_path: Path, seed: int) -> None:
    """Open the text tower of a run directory, which means that of its best model."""
    embedder: Embedder = tiny_embedder(seed)
    embedder.save(tmp_path / "run" / "best")
    checkpoint = open_text(tmp_path / "run")
    model = checkpoint.model()
    assert (checkpoint.folder, checkpoint.config) == (tmp_path / "run" / "best", embedder.dual_encoder.config.text)
    assert all(
        torch.equal(x, model.encoder.state_dict()[k]) for k, x in embedder.dual_encoder.text.state_dict().items()
    )
    assert checkpoint.tokenizer().encode(["a cat"]) == embedder.tokenizer.encode(["a cat"])


def test_text_model_of_a_run_directory(peer: BertForMaskedLM, tmp_path: Path) -> None:
    load_text(tmp_path / "peer", "cpu").save(tmp_path / "run" / "last")
    assert open_text(tmp_path / "run").folder == tmp_path / "run" / "last"


def sentence_transformer(folder: Path, pooling: dict[str, Any], *more: str) -> None:
    kinds = ["Transformer", "Pooling", *more, "Normalize"]
    paths = ["", "1_Pooling", *(f"{i + 2}_{kind}" for i, kind in enumerate(kinds[2:]))]
    modules = [
        {"idx": i, "path": p, "type": f"sentence_transformers.models.{kind}"}
        for i, (p, kind) in enumerate(zip(paths, kinds))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7, "do_lower_case": False}))


def test_sentence_transformers_folder(peer: BertForMaskedLM, tmp_path: Path) -> None:
    folder = tmp_path / "peer"
    for pooling, pool in [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ]:
        sentence_transformer(folder, pooling)
        checkpoint = open_text(folder)
        assert (checkpoint.config.pool, checkpoint.config.context_length, checkpoint.max_length) == (pool, 16, 7)
    predictor = load_text(folder, "cpu")
    assert predictor.tokenizer.context_length == 7
    predictor.save(tmp_path / "ours")
    assert open_text(tmp_path / "ours").max_length == 7
    assert torch.equal(load_text(tmp_path / "ours", "cpu").embed(["a cat " * 9]), predictor.embed(["a cat " * 9]))
    sentence_transformer(folder, {"pooling_mode_max_tokens": True})
    with pytest.raises(ModelError, match="pooling by max"):
        open_text(folder)
    sentence_transformer(folder, {"pooling_mode": "mean"}, "LayerNorm")
    with pytest.raises(ModelError, match=r"the module sentence_transformers\.models\.LayerNorm"):
        open_text(folder)


def test_hub_specs_download_pickles_only_without_safetensors(
    peer: BertForMaskedLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    requested = []

    def download(name: str, revision: str | None = None, allow_patterns: Any = ()) -> str:
        requested.append((name, revision, any("bin" in pattern for pattern in allow_patterns)))
        return str(tmp_path / "peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    assert open_text("hf-hub:owner/name@v2").spec == "hf-hub:owner/name@v2"
    assert requested == [("owner/name", "v2", False)]
    rewrite(tmp_path / "peer", dict, "pytorch_model.bin")
    requested.clear()
    open_text("hf-hub:owner/name").model()
    # The second download asks for the commit of the first, which is the name of the folder.
    assert requested == [("owner/name", None, False), ("owner/name", "peer", True)]


def test_saving_never_replaces_another_folder(peer: BertForMaskedLM, tmp_path: Path) -> None:
    predictor = load_text(tmp_path / "peer", "cpu")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("all of it")
    with pytest.raises(ModelError, match="exists and is not a model directory"):
        predictor.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_faults_of_dualenc_json_are_named(peer: BertForMaskedLM, tmp_path: Path) -> None:
    load_text(tmp_path / "peer", "cpu").save(tmp_path / "ours")
    path = tmp_path / "ours" / "dualenc.json"
    fields = json.loads(path.read_text())
    mlm = {key: value for key, value in fields["heads"]["mlm"].items() if key != "tied"}
    wrong = {
        "has format 99": {"format": 99},
        "text has the unknown key 'depth'": {"text": {**fields["text"], "depth": 3}},
        "heads.mlm has no key 'tied'": {"heads": {"mlm": mlm}},
        "must have the keys format, text and heads": {"more": 1},
    }
    for message, change in wrong.items():
        path.write_text(json.dumps({**fields, **change}))
        with pytest.raises(ModelError, match=message):
            open_text(tmp_path / "ours")


def test_encoder_without_heads(tmp_path: Path, seed: int) -> None:
    config = BertConfig(vocab_size=40, **SMALL)
    perturb(BertModel(config, add_pooling_layer=False)).save_pretrained(tmp_path)
    assert open_text(tmp_path).heads == {}
    open_text(tmp_path).model()
