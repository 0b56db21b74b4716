"""Lines of text files: index, content, pieces that fit a context, errors."""

import csv
import io
import json
import os
import pickle
import random
from itertools import pairwise

import numpy as np
import pytest
from helpers import tokenizer_of
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors, trainers

import dualenc.data.text.files as lines_module
from dualenc.data import Tokenizer
from dualenc.data.text.files import TextIndex, expand_files
from dualenc.utils.errors import BadSample, DataError

LETTERS = "abcdefgé猫😀ß"


def write(path, text, **options):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def words(rng, most=12):
    return " ".join("".join(rng.choices(LETTERS, k=rng.randint(1, 4))) for _ in range(rng.randint(1, most)))


@pytest.fixture(params=[7, 1 << 24])
def chunk(request, monkeypatch):
    """Size of a scanned chunk: small ones end inside lines, large ones hold the file."""
    monkeypatch.setattr(lines_module, "CHUNK", request.param)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_plain_text(tmp_path, seed, chunk, end, last):
    rng = random.Random(seed)
    texts = [rng.choice(["", "  ", "\t", words(rng), " " + words(rng)]) for _ in range(40)] + ["end"]
    index = TextIndex.build(write(tmp_path / "a.txt", end.join(texts) + end * last))
    want = [(f"line {n}", text) for n, text in enumerate(texts, 1) if text.strip()]
    assert [(sample.key, sample.read()["text"]) for sample in index] == want
    assert index.counts() == [len(want)]


def test_tsv_with_stray_quotes(tmp_path, seed, chunk):
    """Quotes are letters, as in GLUE's files, where the csv module would join lines."""
    rng = random.Random(seed)
    rows = [[words(rng) + rng.choice(["", '"', ' "'] * 2), rng.choice(['"', ""]) + words(rng), "1"] for _ in range(50)]
    text = "\n".join("\t".join(row) for row in [["one", "two", "label"], *rows]) + "\n"
    index = TextIndex.build(write(tmp_path / "a.tsv", "\ufeff" + text), ["two"])
    assert [list(sample.read().values()) for sample in index] == rows
    assert list(index[0].read()) == ["one", "two", "label"]
    assert [sample.key for sample in index] == [f"line {n}" for n in range(2, 52)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_csv_equals_the_csv_module(tmp_path, seed, chunk, end, quoting):
    rng = random.Random(seed)
    bits = ['"', ",", "\n", "\r\n", "é", "a", " ", '""', "b\n\nc"]
    rows = [["".join(rng.choices(bits, k=rng.randint(0, 6))) for _ in range(3)] for _ in range(60)]
    file = io.StringIO()
    csv.writer(file, lineterminator=end, quoting=quoting).writerows([["x", "y z", 'q"'], *rows])
    path = write(tmp_path / "a.csv", file.getvalue())
    index = TextIndex.build(path)
    want, begins = [], []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header, before = next(reader), reader.line_num
        for row in reader:
            want.append(dict(zip(header, row, strict=True)))
            begins.append(f"line {before + 1}")
            before = reader.line_num
    assert [sample.read() for sample in index] == want
    assert [sample.key for sample in index] == begins
    assert len(want) == 60


def test_csv_quotes_within_a_field_are_letters(tmp_path):
    index = TextIndex.build(write(tmp_path / "a.csv", 'a,b\n5" pipe,x\ny,"6"" pipe"\n'))
    assert [tuple(s.read().values()) for s in index] == [('5" pipe', "x"), ("y", '6" pipe')]


def test_jsonl(tmp_path, seed, chunk):
    rng = random.Random(seed)
    rows = [{"text": words(rng), "label": rng.choice([["a", "b"], 3, "x\ny"]), "n": i} for i in range(30)]
    text = "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" + "\n" * rng.randint(0, 1) for row in rows)
    index = TextIndex.build(write(tmp_path / "a.jsonl", text), ["text", "label"])
    assert [sample.read() for sample in index] == rows


def test_bad_rows_are_bad_samples(tmp_path):
    def causes(name, data):
        found = []
        for sample in TextIndex.build(write(tmp_path / name, data)):
            try:
                sample.read()
                found.append("")
            except BadSample as error:
                found.append(str(error).removeprefix(f"{tmp_path / name} ").partition(" (")[0])
        return found

    assert causes("a.tsv", b"a\tb\n1\t2\n1\n1\t2\t3\n\xff\t1\n3\t4\n") == [
        "",
        "line 3: its number of columns differs from the header's",
        "line 4: its number of columns differs from the header's",
        "line 5: it is not UTF-8",
        "",
    ]
    found = causes("a.csv", b'a,b\n1,2\n"x"y,1\n"1\n2",3\n4\n7,"no end\n8,9\n')
    assert found == [
        "",
        "line 3: its quotes are not valid in CSV",
        "",
        "line 6: its number of columns differs from the header's",
        "line 7: its quotes are not valid in CSV",
        "",
    ]
    many = b"".join(b"row %d,1\n" % i for i in range(300))  # a quote that does not end is one bad line, and no more
    found = causes("a.csv", b'a,b\n"oh no,1\n' + many + b'"fine",2\n' + many)
    assert found == ["line 2: its quotes are not valid in CSV", *[""] * 601]
    found = causes("a.csv", b'a,b\n"' + b"some line, of text\n" * 10_000 + b'",1\n' + many)  # a field of 190 KB
    assert found == [""] * 301
    found = causes("a.jsonl", b'{"a": 1}\n[1]\n{\n{"a": "\xff"}\n' + b"[" * 100_000 + b"\n{}\n")
    assert [line[8:] for line in found] == [
        "",
        "it is not a JSON object",
        "it is not JSON",
        "it is not UTF-8",
        "it is not JSON",
        "",
    ]
    assert causes("a.txt", b"a\n\xe9\n") == ["", "line 2: it is not UTF-8"]


def test_too_large_line_is_a_bad_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "LONGEST", 10)
    index = TextIndex.build(write(tmp_path / "a.txt", "0123456789\n01234567890\n"))
    assert index[0].read()["text"] == "0123456789"
    with pytest.raises(BadSample, match=r"line 2: it is too large \(11 bytes, at most 10\)"):
        index[1].read()


@pytest.mark.parametrize(
    ("name", "data", "columns", "message"),
    [
        ("a.txt", b"", [], r"a\.txt is empty"),
        ("a.txt", b"\n \n\n", [], "only empty lines"),
        ("a.tsv", b"a\tb\n", [], "has a header and no lines"),
        ("a.tsv", b"a\tb\n1\t2\n", ["c"], "has no column 'c', only 'a', 'b'"),
        ("a.csv", b'a,"b c"\n1,2\n', ["b"], "has no column 'b', only 'a', 'b c'"),
        ("a.csv", b'"a,b\n1,2\n', [], "header cannot be read"),
        ("a.tsv", b"a\ta\n1\t2\n", [], "two columns are called 'a'"),
        ("a.jsonl", b'{"x": 1}\n', ["text"], "has no column 'text', only 'x'"),
        ("a.jsonl", b"[]\n", [], "every line must be a JSON object"),
        ("a.txt", b"a\n", ["label"], "has no column 'label', only 'text'"),
        ("a.tsv", "a\tb\n".encode("utf-16"), [], r"a\.tsv is UTF-16"),
        ("a.txt", "a b\n".encode("utf-16"), [], r"a\.txt is UTF-16"),
        ("a.csv", b"a\0,b\n1,2\n", [], "first line has NUL"),
        ("a.txt", "\ufeff\n\u200b\n".encode(), [], "only empty lines"),
        ("a.xml", b"{}", [], r"must be one of \.txt, \.tsv, \.csv, \.jsonl, \.conll"),
    ],
)
def test_unusable_files_are_refused(tmp_path, name, data, columns, message):
    with pytest.raises(DataError, match=message) as error:
        TextIndex.build(write(tmp_path / name, data), columns)
    assert name in str(error.value)


def test_expand_files(tmp_path):
    a, b = (write(tmp_path / name, "x\n") for name in ("a.txt", "b.txt"))
    assert expand_files(str(tmp_path / "*.txt")) == [a, b]
    assert expand_files(str(tmp_path / "{b,a}.txt")) == [b, a]
    assert expand_files(tmp_path) == [a, b]
    for files, message in (
        ([], "list of files is empty"),
        (str(tmp_path / "c*.txt"), "match no file"),
        ([a, a], r"named twice: .*a\.txt"),
        ("https://example.org/a.txt", "local files only"),
        ("pipe:cat a.txt", "local files only"),
    ):
        with pytest.raises(DataError, match=message):
            expand_files(files)


def test_changed_file_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo\n")
    index = TextIndex.build(path)
    again = pickle.loads(pickle.dumps(index))  # as for a worker
    assert again[1].read() == index[1].read() == {"text": "two"}
    write(tmp_path / "a.txt", "one\ntwo, three\n")
    with pytest.raises(DataError, match=r"a\.txt has changed since it was indexed"):
        index[0].read()
    os.unlink(path)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file"):
        index[0].read()


def test_fingerprint_covers_names_content_and_choice(tmp_path, seed):
    rng = random.Random(seed)
    texts = [words(rng) for _ in range(30)]

    def index(folder, name, texts):
        (tmp_path / folder).mkdir(exist_ok=True)
        return TextIndex.build(write(tmp_path / folder / name, "\n".join(texts)))

    base = index("x", "a.txt", texts)
    assert index("y", "a.txt", texts).fingerprint == base.fingerprint
    others = [index("x", "b.txt", texts), index("z", "a.txt", [*texts[:-1], "x" * len(texts[-1])]), *base.split(0.5)]
    prints = {base.fingerprint, *(other.fingerprint for other in others)}
    assert len(prints) == 5


def test_split_is_by_content(tmp_path, seed):
    rng = random.Random(seed)
    texts = [f"{words(rng)} {i % 300}" for i in range(900)] + ["dup"] * 40
    index = TextIndex.build(write(tmp_path / "a.txt", "\n".join(texts)))
    rest, held = index.split(0.3)
    parts = [[sample.read()["text"] for sample in part] for part in (rest, held)]
    assert sorted(parts[0] + parts[1]) == sorted(texts)
    assert not set(parts[0]) & set(parts[1])
    assert abs(len(held) - 0.3 * 900) < 6 * (900 * 0.21) ** 0.5 + 40
    shuffled = TextIndex.build(write(tmp_path / "b.txt", "\n".join([*rng.sample(texts, len(texts)), "new"])))
    assert {sample.read()["text"] for sample in shuffled.split(0.3)[1]} - {"new"} == set(parts[1])
    with pytest.raises(DataError, match=r"val: 1e-15 of 940 lines of .*a\.txt leaves one side empty"):
        index.split(1e-15)


def byte_level(texts, prefix):
    """Return a tokenizer like RoBERTa's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, prefix)
    return backend


KINDS = ["wordpiece", "bpe", "unigram", "roberta", "roberta-prefix"]


def tokenizers_of(kind, texts, length):
    """Return two tokenizers that differ in their context length: `length`, and more than any text has."""
    if kind.startswith("roberta"):
        backend = byte_level(texts, kind.endswith("prefix"))
    else:
        backend = tokenizer_of(kind, texts, 600 if kind == "bpe" else 200, length).backend
    return Tokenizer(backend, length), Tokenizer(backend, 100_000)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_hold_every_token_once(tmp_path, seed, kind):
    """The joined tokens of the pieces are those of the whole lines, and no piece is too long."""
    rng = random.Random(seed)
    texts = [words(rng, 60) for _ in range(150)]
    length = 34  # a word of four letters has 16 bytes at most
    tokenizer, whole = tokenizers_of(kind, texts, length)
    index = TextIndex.build(write(tmp_path / "a.txt", "\n".join(texts)))
    cut = index.cut(tokenizer)
    found = {}
    keys = []
    for sample in cut:
        ids = tokenizer.encode([sample.read()["text"]])[0]
        assert ids == whole.encode([sample.read()["text"]])[0]  # nothing cut off
        keys.append(sample.key)
        found.setdefault(int(sample.key.split()[1]), []).append(ids)
    assert len(set(keys)) == len(keys)
    assert cut.counts() == [len(keys)]
    assert len(keys) > len(texts) + 50
    for number, text in enumerate(texts, 1):
        want = whole.encode([text])[0]
        assert [want[0], *(i for ids in found[number] for i in ids[1:-1]), want[-1]] == want
        # Greedy: no two neighbors would fit together.
        assert all(len(a) + len(b) - 2 > length - 18 for a, b in pairwise(found[number]))
    assert [s.key for s in index.cut(tokenizer)] == keys
    assert cut.fingerprint == index.cut(tokenizer).fingerprint != index.fingerprint
    assert index.cut(whole).fingerprint == index.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_words_longer_than_a_piece_are_cut_and_nothing_is_lost(tmp_path, seed, kind):
    rng = random.Random(seed)
    texts = ["".join(rng.choices(LETTERS + "   ", k=rng.randint(1, 80))) for _ in range(80)]
    texts = [text for text in texts if text.strip()]
    tokenizer, whole = tokenizers_of(kind, texts, 8)
    cut = TextIndex.build(write(tmp_path / "a.txt", "\n".join(texts))).cut(tokenizer)
    found = {}
    for sample in cut:
        text = sample.read()["text"]
        assert text.strip()
        assert len(whole.encode([text])[0]) <= 8
        found.setdefault(int(sample.key.split()[1]), []).append(text)
    assert ["".join("".join(pieces).split()) for pieces in found.values()] == ["".join(t.split()) for t in texts]


def test_letters_that_normalization_multiplies(tmp_path):
    """Normalization makes 18 letters of one."""
    texts = ["ﷺ" * 3, "abc"]
    tokenizer = tokenizer_of("unigram", ["صلى الله عليه وسلم abc"], 60, 30)
    cut = TextIndex.build(write(tmp_path / "a.txt", "\n".join(texts))).cut(tokenizer)
    assert [sample.read()["text"] for sample in cut] == ["ﷺ", "ﷺ", "ﷺ", "abc"]


def test_only_plain_text_is_cut(tmp_path):
    tokenizer = Tokenizer.train(["a b c"], 50, 4)
    index = TextIndex.build(write(tmp_path / "a.tsv", "text\n" + "a " * 50))
    assert len(index.cut(tokenizer)) == 1
    bad = TextIndex.build(write(tmp_path / "a.txt", b"\xff" * 50 + b"\na a a a"))
    assert len(bad.cut(tokenizer)) == 3
    with pytest.raises(DataError, match="context_length 2 has no room"):
        bad.cut(Tokenizer(tokenizer.backend, 2))


def test_index_of_several_files(tmp_path):
    indexes = [TextIndex.build(write(tmp_path / f"{i}.txt", "\n".join("abcde"[: i + 2]))) for i in range(3)]
    whole = TextIndex.join(indexes)
    assert (len(whole), whole.counts(), len(whole.shards)) == (9, [2, 3, 4], 3)
    assert [str(whole[i]) for i in np.arange(9)] == [str(s) for index in indexes for s in index]
    for i in (-1, 9):
        with pytest.raises(IndexError):
            whole[i]
