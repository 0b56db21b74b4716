"""Reading of tokenizer files, compared with transformers: settings, added tokens, roles, special tokens in a text."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import BERT, CLASSES, VOCABULARY, backend_of, text_of, write_folder, write_random_folder
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from dualenc.data import Tokenizer
from dualenc.utils.errors import DataError

LONGEST = 9
LLM_JP = "<MASK|LLM-jp>"


def assert_equals_transformers(ours: Tokenizer, folder: Path, rng: random.Random, about: Any = None) -> list[str]:
    """Compare ids, segments and roles on random texts and pairs, and return the texts."""
    peer = AutoTokenizer.from_pretrained(folder)
    texts = ["", " \t", *(text_of(rng) for _ in range(20))]
    firsts, seconds = [text_of(rng) for _ in range(6)], [text_of(rng) for _ in range(6)]
    expected = peer(texts, truncation=True, max_length=LONGEST)["input_ids"]
    for text, one, other in zip(texts, ours.encode(texts), expected, strict=True):
        assert one == other, (about, text)
    pairs = peer(firsts, seconds, truncation=True, max_length=LONGEST)
    ids, types = ours.encode_pairs(list(zip(firsts, seconds)))
    assert ids == pairs["input_ids"], about
    assert types == pairs.get("token_type_ids", types), about
    for role, token in peer._special_tokens_map.items():
        if token is not None and str(token) in ours.backend.get_vocab():
            assert ours.roles[role] == str(token), (about, role)
    return texts


def test_random_folders_equal_transformers_or_are_refused(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    refused, changed = 0, 0
    for number in range(100):
        folder = tmp_path / str(number)
        config = write_random_folder(folder, rng)
        try:
            ours = Tokenizer.from_file(folder, LONGEST)
        except DataError:
            refused += 1
            continue
        split = bool(config.get("split_special_tokens"))  # transformers splits none if nothing is said
        ours = ours.replace(split_special_tokens=split)
        texts = assert_equals_transformers(ours, folder, rng, config)
        plain = Tokenizer(Backend.from_file(str(folder / "tokenizer.json")), LONGEST, split_special_tokens=split)
        changed += plain.encode(texts) != ours.encode(texts)
    assert refused < 30
    assert changed > 30  # The control: tokenizer.json alone gives other ids.


@pytest.mark.parametrize("split", [False, True])
def test_vocabulary_files_of_older_formats(split: bool, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    backend = backend_of("BertTokenizer")
    config = {"split_special_tokens": split, "do_lower_case": True, "additional_special_tokens": ["<ent>"]}
    folder = write_folder(tmp_path / "bert", "BertTokenizer", backend, **config)
    entries = sorted(backend.get_vocab(), key=backend.token_to_id)
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n")
    (folder / "added_tokens.json").write_text(json.dumps({"<ent>": len(entries), "[E1]": len(entries) + 1}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "[MASK]", "lstrip": True}}))
    (folder / "tokenizer.json").unlink()
    ours = Tokenizer.from_file(folder, LONGEST)
    assert (ours.id_of("mask_token"), ours.special["<ent>"]) == (4, len(entries))
    assert_equals_transformers(ours.replace(split_special_tokens=split), folder, rng)
    for kind in ("RobertaTokenizer", "CLIPTokenizer"):
        folder = write_folder(tmp_path / kind, kind, split_special_tokens=split)
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
        (folder / "tokenizer.json").unlink()
        assert_equals_transformers(
            Tokenizer.from_file(folder, LONGEST).replace(split_special_tokens=split), folder, rng
        )


def test_special_tokens_in_a_text(tmp_path: Path, seed: int) -> None:
    """Tokens with a role are text and further ones are tokens, unless the option says otherwise, also when saved."""
    backend = backend_of("BertTokenizer")
    backend.add_special_tokens(["<ent>", LLM_JP])
    backend.add_tokens(["new"])
    config = {"mask_token": LLM_JP, "pad_token": "[MASK]", "additional_special_tokens": ["<ent>"]}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    folder = write_folder(tmp_path / "peer", "BertTokenizer", backend, **config)
    ours = Tokenizer.from_file(folder, 40)
    assert (ours.mask_id, ours.id_of("pad_token")) == (backend.token_to_id(LLM_JP), 4)
    text = f"cat [SEP] {LLM_JP} [MASK] <ent> new [CLS]"
    tokens = {None: {"<ent>", "new"}, True: {"new"}, False: {"[SEP]", LLM_JP, "[MASK]", "<ent>", "new", "[CLS]"}}
    prints = set()
    for split, expected in tokens.items():
        it = ours.replace(split_special_tokens=split)
        it.save(tmp_path / "tokenizer.json")
        again = Tokenizer.from_file(tmp_path / "tokenizer.json", 40)
        prints.add(it.fingerprint)
        for one in (it, pickle.loads(pickle.dumps(it)), again, again.replace(context_length=40)):
            found = {one.backend.id_to_token(i) for i in one.encode([text])[0][1:-1]}
            assert found & {*BERT[2:], LLM_JP, "<ent>", "new"} == expected
            assert (one.roles, one.special, one.fingerprint) == (ours.roles, ours.special, it.fingerprint)
        flags = {
            token["content"]: token["special"]
            for token in json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
        }
        assert flags == {**dict.fromkeys([*BERT, "<ent>", LLM_JP], True), "new": False}
        (tmp_path / "tokenizer_config.json").unlink()
    assert len(prints) == 3
    masked = ours.encode([f"a {LLM_JP} [SEP]"], masks=True)[0]
    assert (masked.count(ours.mask_id), masked.count(3)) == (1, 1)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_long_text_loses_its_beginning(kind: str, tmp_path: Path, seed: int) -> None:
    ours = Tokenizer.from_file(write_folder(tmp_path / "peer", kind, truncation_side="left"), 5)
    texts = [" ".join(random.Random(seed).choices(VOCABULARY, k=9))]
    (whole,) = ours.replace(context_length=100).encode(texts)
    ours.save(tmp_path / "tokenizer.json")
    for one in (ours, pickle.loads(pickle.dumps(ours)), Tokenizer.from_file(tmp_path, 5), ours.replace(pad_to=5)):
        assert one.encode(texts) == [[whole[0], *whole[-4:]]]
    right = Tokenizer.from_file(write_folder(tmp_path / "right", kind), 5)
    assert right.encode(texts) == [[*whole[:4], whole[-1]]]


def with_model(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"do_lower_case": "yes"}, "do_lower_case is 'yes'"),
        ({"truncation_side": "middle"}, "truncation_side is 'middle'"),
        ({"mask_token": 3}, "special token must be"),
        ({"tokenizer_class": "AlbertTokenizer"}, "AlbertTokenizer, whose model is Unigram"),
        ({"added_tokens_decoder": {"900": {"content": "<ent>"}}}, "'<ent>' the id 900"),
        ({"added_tokens_decoder": {"x": {"content": "<ent>"}}}, "a number as its id"),
    ],
)
def test_contradictions_are_named(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "peer", "BertTokenizer", **config)
    with pytest.raises(DataError, match=said) as error:
        Tokenizer.from_file(folder, 8)
    assert "tokenizer" in str(error.value)
    assert "\n" not in str(error.value)


def test_vocabulary_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "peer", "BertTokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join([*BERT, "Cat", "##s"]))
    with pytest.raises(DataError, match=r'vocab\.txt.* write {"do_lower_case": false}'):
        Tokenizer.from_file(folder, 8)
    for name in ("BertJapaneseTokenizer", "RobertaTokenizer"):
        with_model(folder, tokenizer_class=name, do_lower_case=False)
        with pytest.raises(DataError, match=f"tokenizer_class {name} cannot be read from this file"):
            Tokenizer.from_file(folder, 8)
    with_model(folder, tokenizer_class="BertTokenizerFast", do_lower_case=False)
    assert Tokenizer.from_file(folder, 8).encode(["Cats"]) == [[2, 5, 6, 3]]


def test_roles_without_config_are_found_by_names() -> None:
    backend = backend_of("RobertaTokenizer")
    ours = Tokenizer(backend, 8)
    assert ours.roles == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>",
        "cls_token": "<s>", "mask_token": "<mask>",
    }  # fmt: skip
    backend.add_special_tokens([AddedToken(LLM_JP, special=True)])
    assert Tokenizer(backend, 8, roles={"mask_token": LLM_JP}).mask_id == backend.token_to_id(LLM_JP)
    assert ours.settings(every_role=False) == {}  # Nothing needs a file next to tokenizer.json.
