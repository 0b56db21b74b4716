"""Words with tags: files, windows against brute force, tokens against transformers, broken inputs."""

import json
import random
from pathlib import Path

import pytest
from helpers import WORDS, tiny_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dualenc.data import Tokenizer
from dualenc.data.text.files import TextIndex
from dualenc.data.text.words import WordReader, join_words, split_text
from dualenc.models import HeadConfig
from dualenc.models.heads import make_head
from dualenc.utils.errors import BadSample, DataError

READER = WordReader(("O", "B-PER", "I-PER", "B-LOC", "I-LOC"), "iob2")


def index_of(folder: Path, content: str | bytes, ending: str = "conll") -> TextIndex:
    path = folder / f"data.{ending}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return TextIndex.build(str(path))


def conll(sentences: list[list[tuple[str, str]]]) -> str:
    return "\n\n".join("\n".join("\t".join(row) for row in rows) for rows in sentences)


# Files


def test_sentences_of_a_file(tmp_path: Path, seed: int) -> None:
    """Check blank lines, documents, line ends, columns and separators in every mixture, against plain splitting."""
    expected, lines = [], []
    rows: list[tuple[str, str]] = []
    for _ in range(400):
        kind = random.random()
        if kind < 0.25:
            blank = random.choice(["", " ", "\t", "-DOCSTART- -X- O O", "-DOCSTART-"])
            lines.append((blank, 0))
            expected += [(len(lines) - len(rows), rows)] if rows else []
            rows = []
            continue
        word = random.choice(["Kim", "東京", "\u200b", "-", "--DOC", "a\u00a0b", "#", "😀"])
        tag = random.choice(READER.names)
        middle = random.choice([[], ["NN", "x"]]) if not rows else lines[-1][1] * ["NN"]
        lines.append((random.choice([" ", "\t", "  \t"]).join([word, *middle, tag]), len(middle)))
        rows.append((word, tag))
    expected += [(len(lines) - len(rows) + 1, rows)] if rows else []
    ends = [random.choice(["\n", "\r\n"]) for _ in lines]
    text = "".join(line + end for (line, _), end in zip(lines, ends)) + random.choice(["", "\n", " "])
    index = index_of(tmp_path, text)
    assert [sample.read() for sample in index] == [
        {"tokens": [word for word, _ in rows], "tags": [tag for _, tag in rows]} for _, rows in expected
    ]
    assert [sample.key for sample in index] == [f"line {number}" for number, _ in expected]


def test_marks_and_one_column(tmp_path: Path) -> None:
    index = index_of(tmp_path, b"\xef\xbb\xbfKim\nlives\n\nhere\n")
    assert [sample.read() for sample in index] == [{"tokens": ["Kim", "lives"]}, {"tokens": ["here"]}]
    assert READER.read(index[0], False).words == ["Kim", "lives"]
    with pytest.raises(BadSample, match=r"data\.conll line 4: it does not have 'tags'"):
        READER.read(index[1], True)


def test_the_three_forms_of_a_sentence_are_the_same(tmp_path: Path) -> None:
    words, tags = ["Kim", "Lee", "is", "in", "Rome"], ["B-PER", "I-PER", "O", "O", "B-LOC"]
    text = "Kim Lee is in Rome"
    lines = [{"tokens": words, "tags": tags}, {"text": text, "entities": [[14, 18, "LOC"], [0, 7, "PER"]]}]
    made = [READER.read(sample, True) for sample in index_of(tmp_path, "\n".join(map(json.dumps, lines)), "jsonl")]
    made.append(READER.read(index_of(tmp_path, conll([list(zip(words, tags))]))[0], True))
    assert made[0] == made[1] == made[2]
    assert made[0].tags == [1, 2, 0, 0, 3]
    assert READER.read(index_of(tmp_path, "Kim Lee is in Rome", "txt")[0], False).words == words


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, r"one tag for each word \(1 for 2 words\)"),
        ({"tokens": ["a"], "tags": [1]}, "does not have 'tags'"),
        ({"tokens": ["a"]}, "does not have 'tags'"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "'tokens' is not a list of words"),
        ({"tokens": [], "tags": []}, "'tokens' is not a list of words"),
        ({"words": ["a"]}, "neither a field 'tokens' nor 'text'"),
        ({"text": "Kim", "entities": {}}, r"is not a list of \[start, end, label\]"),
        ({"text": "Kim"}, r"is not a list of \[start, end, label\]"),
        ({"text": " ", "entities": []}, "'text' holds no text"),
        ({"text": "Kim", "entities": [[0, 9, "PER"]]}, r"not \[start, end, label\] in its text"),
        ({"text": "Kim", "entities": [[2, 1, "PER"]]}, r"not \[start, end, label\] in its text"),
        ({"text": "Kim", "entities": [["0", 3, "PER"]]}, r"not \[start, end, label\] in its text"),
        ({"text": "Kimberly", "entities": [[0, 3, "PER"]]}, "does not begin and end where words do .*'Kim'"),
        ({"text": "a  b", "entities": [[1, 3, "PER"]]}, "does not begin and end where words do"),
        ({"text": "Kim Lee", "entities": [[0, 7, "PER"], [4, 7, "PER"]]}, "two of its entities overlap .*'Lee'"),
        ({"tokens": ["a", "b\ud800"], "tags": ["O", "O"]}, "'tokens' holds a text not UTF-8"),
        ({"tokens": ["a\0b"], "tags": ["O"]}, "'tokens' holds a text with NUL characters"),
        ({"tokens": ["a"], "tags": ["B-X"]}, "a tag that the head does not know .*'B-X'"),
    ],
)
def test_broken_lines_of_json(line: dict, message: str, tmp_path: Path) -> None:
    index = index_of(tmp_path, json.dumps({"tokens": ["x"], "tags": ["O"]}) + "\n" + json.dumps(line), "jsonl")
    with pytest.raises(BadSample, match=rf"data\.jsonl line 2: .*{message}"):
        READER.read(index[1], True)


def test_a_file_without_tags(tmp_path: Path) -> None:
    for ending, content in (("conll", "a\nb\n\nc\n"), ("tsv", "text\tlabel\na b\tO O\n"), ("txt", "a b\n")):
        index = index_of(tmp_path, content, ending)
        with pytest.raises(
            DataError, match=rf"no sample of .*data\.{ending} has words with tags, as head 'names' reads"
        ):
            READER.check(index, "names")


def test_broken_columns_name_their_line(tmp_path: Path) -> None:
    index = index_of(tmp_path, "a O\nb O\n\nKim B-PER\nlives\nhere O\n")
    with pytest.raises(BadSample, match=r"line 4: its lines have different numbers of columns \(line 5: 1, not 2"):
        READER.read(index[1], True)
    READER.check(index, "names")  # A bad sample is counted when it is read.


# Tags


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a O\nb B-PER\n\nc O\nd B-ORG\n", r"line 5: tag 'B-ORG' is not a tag of head 'names' .*labels, or correct"),
        ("a O\nb b-PER\n", r"line 2: tag 'b-PER' .*did you mean"),
        ("a O\nb PER\n", "line 2: tag 'PER'"),
        ("a X\n", "line 1: tag 'X'"),
        ("a B-\n", "line 1: tag 'B-'"),
    ],
)
def test_tags_unknown_to_the_head(rows: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data\.conll {message}") as caught:
        READER.check(index_of(tmp_path, rows), "names")
    assert "\n" not in str(caught.value)


def test_a_tag_that_a_head_of_iob1_lacks(tmp_path: Path) -> None:
    reader = WordReader(("O", "I-PER"), "iob1")
    reader.check(index_of(tmp_path, "a B-PER\nb I-PER\nc O\n"), "names")
    with pytest.raises(DataError, match="line 2: tag 'B-PER' is not a tag of head"):
        reader.check(index_of(tmp_path, "a I-PER\nb B-PER\n"), "names")


@pytest.mark.parametrize("scheme", ["iob2", "iob1", "bioes"])
def test_other_schemes_are_converted_and_said(scheme: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    forms = {
        "iob1": ["I-PER", "I-PER", "B-PER", "O", "I-LOC"],
        "iob2": ["B-PER", "I-PER", "B-PER", "O", "B-LOC"],
        "bioes": ["B-PER", "E-PER", "S-PER", "O", "S-LOC"],
    }
    reader = make_head(HeadConfig("token_classification", ("PER", "LOC"), scheme=scheme)).window_reader()
    assert reader is not None
    for written, tags in forms.items():
        index = index_of(tmp_path, conll([[("w", "O")], [("w", tag) for tag in tags]]), "conll")
        caplog.clear()
        reader.check(index, f"head of {tmp_path.name}, {written}")
        assert ("1 sentence of 2 do not follow its scheme" in caplog.text) == (written != scheme)
        first = next((i for i, tag in enumerate(tags) if tag != forms[scheme][i]), None)
        assert first is None or f"line {first + 3}: {tags[first]} became {forms[scheme][first]}" in caplog.text
        assert [reader.names[i] for i in reader.read(index[1], True).tags] == forms[scheme]


@pytest.mark.parametrize(
    ("labels", "scheme", "message"),
    [
        ((), "iob2", "needs labels"),
        (("PER",), "iob", "scheme 'iob' must be"),
        (("O", "B-PER", "E-PER"), "iob2", "label 'E-PER' is not a tag of scheme iob2"),
        (("O", "NOUN"), "iob2", "label 'NOUN' is not a tag"),
        (("B-PER", "I-PER"), "iob2", "types of entities alone, or tags with 'O'"),
        (("PER", "PER"), "iob2", "each of its labels once"),
    ],
)
def test_labels_of_a_head(labels: tuple[str, ...], scheme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig("token_classification", labels, scheme=scheme)  # type: ignore[arg-type]


def test_types_become_tags() -> None:
    head = HeadConfig("token_classification", ("PER", "creative-work"), scheme="bioes")
    assert head.labels[:6] == ("O", "B-PER", "I-PER", "E-PER", "S-PER", "B-creative-work")
    assert HeadConfig("token_classification", head.labels, scheme="bioes") == head
    given = ("I-PER", "O", "B-PER")
    assert HeadConfig("token_classification", given).labels == given


# Tokens and windows


def byte_level(prefix: bool) -> Backend:
    """Return a tokenizer of bytes as RoBERTa's, with a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("Ġ", "R"), ("ĠR", "o"), ("m", "e"), ("ĠRo", "me")]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, *("".join(pair) for pair in merges), "<mask>"]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)  # type: ignore[assignment]
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))  # type: ignore[assignment]
    return backend


def metaspace(scheme: str) -> Backend:
    pieces = [
        ("<unk>", 0.0),
        ("▁", -3.0),
        ("▁Rome", -1.0),
        ("Rome", -2.0),
        *((letter, -4.0) for letter in "Romeacid.,"),
    ]
    backend = Backend(models.Unigram(pieces, 0))
    backend.normalizer = normalizers.NFKC()  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[assignment]
    return backend


SENTENCE = ["Rome", ",", "a", "Rome.", "\u200b", "co\u0301d", "東京", "", "acid"]


def test_words_have_the_tokens_of_transformers() -> None:
    """Compare with `is_split_into_words`, which for bytes needs a tokenizer that puts a blank before each text."""
    peers = [(tiny_tokenizer(64).backend, PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(64).backend))]
    peers += [(byte_level(on), PreTrainedTokenizerFast(tokenizer_object=byte_level(True))) for on in (False, True)]
    peers += [
        (metaspace(on), PreTrainedTokenizerFast(tokenizer_object=metaspace("always"))) for on in ("first", "never")
    ]
    for ours, theirs in peers:
        expected = theirs(SENTENCE, is_split_into_words=True)
        ((window,),) = Tokenizer(ours, 64).encode_split([SENTENCE], 8)
        assert window[0] == expected["input_ids"]
        assert window[1] == [-1 if number is None else number for number in expected.word_ids()]


def test_control_is_without_a_blank() -> None:
    """Check that the blank before words matters, so that the comparison above would notice if it was missing."""
    glued = byte_level(False).encode(["Rome", "a"], is_pretokenized=True).ids
    ((window,),) = Tokenizer(byte_level(False), 64).encode_split([["Rome", "a"]], 8)
    assert window[0] != glued


@pytest.mark.parametrize("length", [3, 4, 7, 12, 40])
def test_each_word_is_judged_once_where_it_has_most_around_it(length: int, seed: int) -> None:
    tokenizer, whole = tiny_tokenizer(length), tiny_tokenizer(1000).backend
    room = length - 2
    overlap = room // 4
    for _ in range(20):
        words = random.choices([*WORDS, "\u200b", "catdogs", "boatboatboat"], k=random.randint(0, 60))
        tags = random.choices(range(5), k=len(words))
        item = join_words(words)._replace(tags=tags)
        (sample,) = READER.windows([item], tokenizer)
        pieces = [whole.encode(word, add_special_tokens=False).ids for word in words]
        flat = [(piece, number, i == 0) for number, ids in enumerate(pieces) for i, piece in enumerate(ids)]
        starts = [0]
        while starts[-1] + room < len(flat):
            starts.append(starts[-1] + room - overlap)
        spans = [(start, min(start + room, len(flat))) for start in starts]
        chosen: dict[int, list[int]] = {}
        for at, (_, word, first) in enumerate(flat):
            if first:
                sides = [min(at - a, b - 1 - at) if a <= at < b else -1 for a, b in spans]
                chosen.setdefault(sides.index(max(sides)), []).append(word)
        assert sample.kept.judged == [word for number in sorted(chosen) for word in chosen[number]]
        assert sorted(sample.kept.judged) == [i for i, ids in enumerate(pieces) if ids]
        kept = [spans[number] for number in sorted(chosen)] or spans[:1]
        assert [one.ids[1:-1] for one in sample.windows] == [[piece for piece, _, _ in flat[a:b]] for a, b in kept]
        for window, own in zip(sample.windows, [chosen[number] for number in sorted(chosen)]):
            assert [window.ids[place] for place in window.places] == [pieces[word][0] for word in own]
            assert window.labels == [tags[word] for word in own]


def test_a_context_without_room() -> None:
    with pytest.raises(DataError, match="context_length 2 has no room for windows"):
        READER.windows([join_words(["a"])], tiny_tokenizer(2))


# Texts


def test_words_of_a_text_are_those_of_bert() -> None:
    text = "Zoë\u2019s café—in 東京, x\u0301y 👩\u200d👩!\u00a0“R.H.”\n#wow  タワー"
    words = split_text(text).words
    assert words == [
        *(
            "Zoë",
            "\u2019",
            "s",
            "café",
            "—",
            "in",
            "東",
            "京",
            ",",
            "x\u0301y",
            "👩\u200d👩",
            "!",
            "“",
            "R",
            ".",
            "H",
            ".",
        ),
        *("”", "#", "wow", "タワー"),
    ]
    encoding = tiny_tokenizer(64).backend.encode(text, add_special_tokens=False)
    assert len(set(encoding.word_ids)) == len(words)
