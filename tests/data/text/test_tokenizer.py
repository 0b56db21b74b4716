"""Tokenizers: trained, read from files, compared with transformers; and the packed tokens."""

import json
import pickle
import random
import subprocess
import sys
import unicodedata

import pytest
import torch
from helpers import WORDS, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import BertTokenizerFast

from dualenc.data import Tokenizer
from dualenc.tokens import Tokens, padding_index
from dualenc.utils.errors import DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WHOLE = ["the", "cat", "dog", "##ing", "sit", "sep", "cls", "mask", "un", "猫", "犬", "é", "straße"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *".,!?'-[]#", *(f"##{x}" for x in LETTERS), *WHOLE]


KINDS = ["wordpiece", "bpe"]  # The kinds that are trained.
READ = [*KINDS, "unigram"]  # The kinds that are read.
SMALL = {"wordpiece": 150, "bpe": 400, "unigram": 150}  # A vocabulary of bytes has at least 256 entries.


def rows(tokens):
    ids, mask, _ = tokens.padded()
    return [text[real].tolist() for text, real in zip(ids, mask, strict=True)]


def captions(rng, count=200):
    letters = "abcdefghij"
    made = ["".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(60)] + WORDS
    return [" ".join(rng.choices(made, k=rng.randint(0, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n", "utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_training_depends_on_the_captions_alone(seed, kind):
    """Hash maps inside the trainers have another order in each run, and all runs must be equal."""
    texts = captions(random.Random(seed))
    size = SMALL[kind]
    first = Tokenizer.train(texts, size, 16, kind)
    for i in range(6):
        shuffled = random.Random(i).sample(texts, len(texts))
        other = Tokenizer.train(iter(shuffled), size, 16, kind)
        assert other.backend.to_str() == first.backend.to_str()
    fewer = Tokenizer.train(texts[:100], size, 16, kind)  # The control: other captions.
    assert fewer.backend.to_str() != first.backend.to_str()


@pytest.mark.slow
def test_training_in_other_processes(seed, tmp_path):
    """Hash maps and Python's sets have another order in each process, and the files must be equal byte for byte."""
    texts = [*captions(random.Random(seed), 60), "é 猫犬 🎩", "ß Σς İ"]
    code = (
        "import json, random, sys\nfrom dualenc.data import Tokenizer\nfolder = sys.argv[1]\n"
        "texts, sizes = json.load(open(folder + '/in.json'))\nrandom.shuffle(texts)\n"
        "for kind in sizes: Tokenizer.train(texts, sizes[kind], 16, kind).save(f'{folder}/{kind}.json')"
    )
    (tmp_path / "in.json").write_text(json.dumps([texts, {kind: SMALL[kind] for kind in KINDS}]))
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        for kind in KINDS:
            Tokenizer.train(texts, SMALL[kind], 16, kind).save(tmp_path / "expected.json")
            assert (tmp_path / f"{kind}.json").read_bytes() == (tmp_path / "expected.json").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_vocabulary_decodes_its_captions(seed, kind):
    texts = captions(random.Random(seed))
    size = SMALL[kind]
    tokenizer = Tokenizer.train(texts, size, 64, kind)
    assert tokenizer.vocab_size <= size
    special = [tokenizer.backend.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
    assert special == [0, 1, 2, 3, 4]
    found = rows(tokenizer(texts))
    assert all(row[0] == 2 and row[-1] == 3 for row in found)
    assert not any(set(row[1:-1]) & set(special) for row in found)  # Every letter is known.
    assert [tokenizer.backend.decode(row) for row in found] == [" ".join(text.split()) for text in texts]
    small = Tokenizer.train(texts, {"bpe": 280}.get(kind, 60), 64, kind)
    assert len(tokenizer(texts).ids) < len(small(texts).ids)  # A larger vocabulary has longer subwords.


@pytest.mark.parametrize("kind", ["unigram", "sentencepiece"])
def test_another_kind_is_not_trained(kind):
    with pytest.raises(DataError, match=f"'{kind}'.* wordpiece .*bpe"):
        Tokenizer.train(["a"], 100, 16, kind)


SCRIPTS = "🎩👩‍👩‍👧‍👦🇩🇪 é\u0301ß猫犬हिन्दी עִבְרִית العربية ไทย \u200d\ufeff\U0001d54f"
any_text = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(SCRIPTS)), max_size=30)


def plain(form, text):
    """Return a text in one Unicode form and lower case with single spaces, as a trained vocabulary sees it."""
    backend = normalizers.Lowercase()  # Python's lower() has a final sigma, the library's does not.
    return backend.normalize_str(" ".join(unicodedata.normalize(form, text).split()))


@pytest.fixture(scope="module")
def by_bytes():
    return Tokenizer.train([*captions(random.Random(0)), "a cat 🎩"], 500, 4000, "bpe")


@settings(max_examples=300, deadline=None)
@given(any_text.filter(lambda text: not set("\x1c\x1d\x1e\x1f") & set(text)))
def test_bytes_know_every_character(by_bytes, text):
    (ids,) = rows(by_bytes([text]))
    assert 1 not in ids
    assert by_bytes.backend.decode(ids) == plain("NFC", text)


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_captions_without_a_letter(kind):
    tokenizer = Tokenizer.train(["", "  "], 300, 8, kind)
    assert rows(tokenizer(["", " "])) == [[2, 3], [2, 3]]
    assert rows(Tokenizer.train([], 300, 8, kind)([""])) == [[2, 3]]


def test_a_vocabulary_without_room_is_refused():
    for kind, needed in (("wordpiece", 11), ("bpe", 261)):  # The letters a, b, c stand at the start and inside.
        with pytest.raises(DataError, match=f"vocab_size {needed - 1} is too small: {needed} entries"):
            Tokenizer.train(["abc cba"], needed - 1, 16, kind)
        assert Tokenizer.train(["abc cba"], needed, 16, kind).vocab_size == needed


PLAIN = ["the", "cats", "dogs", "sitting", "The", "CAT", "é", "e\u0301", "straße", "猫", "猫犬", "x" * 101]
ODD = ["[SEP]", "[CLS]", "[MASK]", "##s", "don't", "a.b", "☃", "\u200b", "\t", "\x00", "U.N.", "-"]
words = st.sampled_from(PLAIN + ODD)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(words, max_size=12).map(" ".join), min_size=1, max_size=6))
def test_ids_equal_those_of_transformers(vocab, texts):
    peer = BertTokenizerFast(vocab=str(vocab), do_lower_case=True, split_special_tokens=True)
    ours = Tokenizer.from_file(vocab, 24)
    expected = peer(texts, truncation=True, max_length=24, split_special_tokens=True)["input_ids"]
    assert rows(ours(texts)) == expected


def test_ids_of_a_cased_vocabulary_equal_those_of_transformers(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCAB, "The", "C", "##AT"]) + "\n", "utf-8")
    peer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=False)
    texts = ["The CAT the cat", "é E", "THE"]
    assert rows(Tokenizer.from_file(tmp_path, 24)(texts)) == peer(texts)["input_ids"]


def test_only_a_line_feed_ends_an_entry(tmp_path):
    """If entries such as U+2028 or U+0085 counted as line ends, every id after them would be shifted."""
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCAB[:40], "\u2028", "\x85", *VOCAB[40:]]) + "\n", "utf-8")
    ours = Tokenizer.from_file(tmp_path / "vocab.txt", 24)
    assert ours.backend.token_to_id(VOCAB[-1]) == len(VOCAB) + 1


@pytest.mark.parametrize("text", ["[SEP]", "a [CLS] b", "[PAD][MASK]", "x[UNK]y", "[sep] [SEP]", "[CLS]" * 40])
def test_special_tokens_in_a_caption_stay_text(vocab, tmp_path, text):
    tokenizers = [Tokenizer.from_file(vocab, 24)]
    for kind in READ:
        made = tokenizer_of(kind, [text, "a b x y [ ]", *"sepclmaskdunk"], 261 if kind == "bpe" else 60, 24)
        made.save(tmp_path / f"{kind}.json")
        tokenizers += [made, Tokenizer.from_file(tmp_path / f"{kind}.json", 24), pickle.loads(pickle.dumps(made))]
    for tokenizer in tokenizers:
        special = {tokenizer.backend.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
        (ids,) = rows(tokenizer([text]))
        assert not special & set(ids[1:-1])
        assert ids[0] == tokenizer.backend.token_to_id("[CLS]")
        assert ids[-1] == tokenizer.backend.token_to_id("[SEP]")
        letters = tokenizer.backend.decode(ids)  # Decoding leaves out special tokens.
        assert "".join(letters.split()).startswith("".join(text.lower().split())[:20])


@pytest.mark.parametrize("length", [2, 3, 7, 30])
def test_truncation_keeps_the_closing_token(vocab, seed, length, tmp_path):
    texts = captions(random.Random(seed), 30)
    for kind in READ:
        tokenizer_of(kind, texts, SMALL[kind], 9).save(tmp_path / f"{kind}.json")
    for path in (vocab, *(tmp_path / f"{kind}.json" for kind in READ)):
        whole, cut = rows(Tokenizer.from_file(path, 500)(texts)), rows(Tokenizer.from_file(path, length)(texts))
        assert cut == [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in whole]


def test_an_empty_caption_has_the_opening_and_closing_tokens(vocab):
    assert rows(Tokenizer.from_file(vocab, 8)(["", "  ", "cat"]))[:2] == [[2, 3], [2, 3]]
    with pytest.raises(ValueError, match="no texts at all"):
        Tokenizer.from_file(vocab, 8)([])


def test_a_pickled_or_saved_tokenizer_gives_the_same_ids(vocab, tmp_path, seed):
    texts = captions(random.Random(seed))
    for tokenizer in (Tokenizer.from_file(vocab, 9), *(tokenizer_of(kind, texts, SMALL[kind], 9) for kind in READ)):
        expected = rows(tokenizer(texts))
        assert rows(pickle.loads(pickle.dumps(tokenizer))(texts)) == expected
        assert pickle.loads(pickle.dumps(tokenizer)).context_length == 9
        tokenizer.save(tmp_path / "tokenizer.json")
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            again = Tokenizer.from_file(path, 9)
            assert rows(again(texts)) == expected
            assert again.vocab_size == tokenizer.vocab_size
        assert json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["truncation"] is None
        longer = rows(Tokenizer.from_file(tmp_path, 100)(texts))  # The file does not store the length.
        assert max(map(len, longer)) > 9
        assert max(map(len, expected)) == 9


def test_the_backend_of_the_caller_is_not_changed(vocab):
    backend = Tokenizer.from_file(vocab, 100).backend
    Tokenizer(backend, 3)
    assert backend.truncation["max_length"] == 100


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("tokenizer.json", b"garbage", "is not a tokenizer"),
        ("tokenizer.json", b"{}", "is not a tokenizer"),
        ("tokenizer.json", b"", "is not a tokenizer"),
        ("tokenizer.json", b"\xff", r"tokenizer\.json is not UTF-8"),
        ("vocab.txt", b"\xff", r"vocab\.txt is not UTF-8"),
        ("vocab.txt", b"a\0\n", r"vocab\.txt has NUL"),
        ("vocab.txt", b"", r"no \[UNK\]"),
        ("vocab.txt", b"the\ncat\n[UNK]\n", r"no \[CLS\]"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, cause):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=cause) as error:
            Tokenizer.from_file(path, 8)
        assert name in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"holds neither tokenizer.json nor vocab.txt"):
        Tokenizer.from_file(tmp_path, 8)
    with pytest.raises(DataError, match=r"tokenizer .*absent\.json does not exist"):
        Tokenizer.from_file(tmp_path / "absent.json", 8)


# Tokens

texts_of_ids = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(texts_of_ids, st.booleans())
def test_padding_packed_tokens_gives_the_texts_back(texts, with_types):
    types = [[(id + i) % 2 for i, id in enumerate(text)] for text in texts] if with_types else None
    tokens = Tokens.pack(texts, types)
    ids, mask, padded_types = tokens.padded()
    longest = max(map(len, texts))
    assert ids.tolist() == [text + [0] * (longest - len(text)) for text in texts]
    assert mask.tolist() == [[i < len(text) for i in range(longest)] for text in texts]
    if types is None:
        assert padded_types is None
    else:
        assert padded_types.tolist() == [kind + [0] * (longest - len(kind)) for kind in types]
    assert tokens.max_len == longest
    assert tokens.ids.shape == tokens.positions.shape == (sum(map(len, texts)),)
    lengths = tokens.offsets.diff().tolist()
    assert lengths == sorted(len(text) for text in texts)
    assert tokens.offsets[0] == 0
    for i, text in enumerate(texts):
        row = int(tokens.rows[i])
        part = slice(int(tokens.offsets[row]), int(tokens.offsets[row + 1]))
        assert tokens.ids[part].tolist() == text
        assert tokens.positions[part].tolist() == list(range(len(text)))
        assert types is None or tokens.types[part].tolist() == types[i]


@settings(max_examples=50, deadline=None)
@given(texts_of_ids)
def test_the_padding_index_stays_within_the_tokens(texts):
    tokens = Tokens.pack(texts)
    index, mask = padding_index(tokens.offsets, tokens.max_len)
    assert index.min() >= 0
    assert index.max() < len(tokens.ids)
    assert sorted(index[mask].tolist()) == list(range(len(tokens.ids)))
    assert mask.sum() == len(tokens.ids)


def test_dtypes_and_devices_of_tokens():
    tokens = Tokens.pack([[1, 2], [3]], [[0, 1], [0]])
    moved = tokens.to("cpu")
    assert (tokens.ids.dtype, tokens.offsets.dtype, tokens.rows.dtype) == (torch.int64, torch.int32, torch.int64)
    assert moved.max_len == 2
    assert torch.equal(moved.types, tokens.types)
    assert Tokens.pack([[1]]).to("cpu").types is None
    assert repr(tokens) == "Tokens(2 texts, 3 tokens, longest 2)"


@pytest.mark.parametrize(
    ("texts", "named"), [([], "no texts at all"), ([[1], [], [2], []], r"\[1, 3\]"), ([[]], r"\[0\]")]
)
def test_texts_without_a_token_are_refused(texts, named):
    with pytest.raises(ValueError, match=named):
        Tokens.pack(texts)
