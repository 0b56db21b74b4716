"""Questions about texts: SQuAD's files, and windows equal to those of transformers' fast tokenizers."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from helpers import ROOT, WORDS, tiny_tokenizer
from tokenizers import Encoding, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from dualenc.data.text.files import TextIndex
from dualenc.data.text.questions import Question, QuestionReader
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.utils.errors import BadSample, DataError

SQUAD = ROOT.parent / "shared" / "data" / "text" / "squad"
ODD = ["naïve", "Straße", "漢字かな", "e\u0301te\u0301", "👍🏽", "don't", "3.50€", "ﬁne", "\u00a0", "a--b", "İstanbul"]


def some_text(rng: random.Random, words: int) -> str:
    """Return words of several scripts with single and multiple blanks between them."""
    return "".join(rng.choice(WORDS + ODD) + rng.choice([" ", " ", "  ", ", ", "\n"]) for _ in range(words))


def some_question(rng: random.Random, words: int, number: int = 0) -> Question:
    """Return a question whose answer is any part of its context."""
    context = rng.choice(["a ", " a "]) + some_text(rng, words)
    start = rng.randrange(len(context) - 1)
    text = context[start : start + 1 + rng.randrange(min(40, len(context) - start))]
    return Question(f"what {some_text(rng, rng.randrange(0, 5))}", context, ((text, start),), f"q{number}")


# Windows


def word_pieces() -> Backend:
    return tiny_tokenizer(64).backend


def byte_pieces() -> Backend:
    """Return a tokenizer like RoBERTa's: bytes, and two tokens between question and context."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([" ".join(WORDS + ODD)] * 3, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    return backend


def sentence_pieces(pair: str = "<s> $A </s> </s> $B </s>") -> Backend:
    """Return a tokenizer like that of XLM-R, or with another template that of ALBERT."""
    text = " ".join(WORDS + ODD)
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -5.0) for letter in sorted(set(text) - {" ", "▁"})]
    pieces += [(f"▁{word}", -3.0 - i / 50) for i, word in enumerate(dict.fromkeys(WORDS))]
    backend = Backend(models.Unigram(pieces, 3))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return backend


TOKENIZERS = {
    "BERT": word_pieces,
    "RoBERTa": byte_pieces,
    "XLM-R": sentence_pieces,
    "ALBERT": lambda: sentence_pieces("<s>:0 $A:0 </s>:0 $B:1 </s>:1"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_windows_equal_those_of_transformers(name: str, seed: int) -> None:
    rng = random.Random(seed)
    backend = TOKENIZERS[name]()
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(backend.to_str()))
    several = held = 0
    for number in range(40):
        max_length, stride = rng.randrange(60, 90), rng.randrange(0, 20)
        item = some_question(rng, rng.randrange(1, 60), number)
        reader = QuestionReader(max_length, stride, False)
        tokenizer = Tokenizer(backend, 8)  # The context length of the tokenizer does not cut windows.
        if reader.problem(item, tokenizer):
            continue
        (found,) = reader.windows([item], tokenizer)
        expected = peer(
            item.question, item.context, truncation="only_second", max_length=max_length, stride=stride,
            return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
            split_special_tokens=True,
        )  # fmt: skip
        assert [window.ids for window in found.windows] == expected["input_ids"]
        if name != "XLM-R":  # Models like XLM-R do not have segments: transformers leaves their types out.
            assert [window.types for window in found.windows] == expected["token_type_ids"]
        several += len(found.windows) > 1
        for row, (window, places) in enumerate(zip(found.windows, found.kept.offsets, strict=True)):
            sequence = expected.sequence_ids(row)
            wanted = [
                list(pair) if one == 1 else [-1, -1] for pair, one in zip(expected["offset_mapping"][row], sequence)
            ]
            if row and name == "RoBERTa":
                # The library may take a blank before the first token of a further window for a part of it.
                first = sequence.index(1)
                mine, other = (item.context[slice(*pair)] for pair in (places[first].tolist(), wanted[first]))
                assert mine.strip() == other.strip()
                wanted[first] = places[first].tolist()
            assert places.tolist() == wanted
            assert window.places == list(range(len(window.ids)))
            label = reference_label(item.answers[0], wanted, sequence)
            assert window.labels == [label]
            held += label != (0, 0)
    assert several > 5
    assert held > 10


def reference_label(answer: tuple[str, int], offsets: list[list[int]], sequence: list[Any]) -> tuple[int, int]:
    """Return the label as the documentation of transformers describes it: walk in from both ends of the context."""
    start, end = answer[1], answer[1] + len(answer[0])
    left = sequence.index(1)
    right = len(sequence) - 1 - sequence[::-1].index(1)
    if offsets[left][0] > start or offsets[right][1] < end:
        return 0, 0
    first, last = left, right
    while first <= right and offsets[first][0] <= start:
        first += 1
    while last >= left and offsets[last][1] >= end:
        last -= 1
    return first - 1, last + 1


def cut_by_the_library(backend: Backend, item: Question, max_length: int, stride: int) -> Encoding | None:
    """Return the library's first window; None where it refuses the pair, or panics."""
    own = Backend.from_str(backend.to_str())
    own.encode_special_tokens = True
    own.enable_truncation(max_length, stride=stride, strategy="only_second")
    try:
        return own.encode(item.question, item.context)
    except BaseException as error:  # The library's panics derive from it.
        if "Panic" in type(error).__name__ or "Truncation" in str(error):
            return None
        raise


@pytest.mark.parametrize("name", TOKENIZERS)
def test_questions_without_room_are_found_before_they_are_cut(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with the library: it fails, even by a panic, exactly where the reader names a problem."""
    monkeypatch.setenv("RUST_BACKTRACE", "0")
    rng = random.Random(seed)
    backend = TOKENIZERS[name]()
    counts = {True: 0, False: 0}
    for _ in range(80):
        max_length, stride = rng.randrange(12, 24), rng.randrange(0, 9)
        item = some_question(rng, rng.randrange(1, 8))
        reader, tokenizer = QuestionReader(max_length, stride, False), Tokenizer(backend, 8)
        encoding = cut_by_the_library(backend, item, max_length, stride)
        works = encoding is not None
        assert (reader.problem(item, tokenizer) is None) == works
        counts[works] += 1
        if encoding is not None:
            (found,) = reader.windows([item], tokenizer)
            assert found.windows[0].ids == encoding.ids
        else:
            with pytest.raises(DataError, match="no room"):
                reader.windows([item], tokenizer)
    assert min(counts.values()) > 5


def test_context_without_tokens_and_tokenizer_without_opening_token(seed: int) -> None:
    backend = Backend.from_str(word_pieces().to_str())
    backend.normalizer = normalizers.Replace("gone", "")
    reader = QuestionReader(20, 3, False)
    (found,) = reader.windows([Question("a dog", "gone", (("gone", 0),))], Tokenizer(backend, 20))
    assert [window.labels for window in found.windows] == [[(0, 0)]]
    assert (found.kept.offsets[0] == -1).all()
    backend.post_processor = processors.Sequence([])
    with pytest.raises(DataError, match="post-processor"):
        reader.windows([Question("a dog", "a cat")], Tokenizer(backend, 20))


# Files


def squad(questions: list[Question], version: int = 1) -> dict[str, Any]:
    """Return questions in SQuAD's JSON: three paragraphs an article, in which neighbors with one context are joined."""
    paragraphs: list[dict[str, Any]] = []
    for one in questions:
        if not paragraphs or paragraphs[-1]["context"] != one.context:
            paragraphs.append({"context": one.context, "qas": []})
        found = {"answers": [{"text": text, "answer_start": start} for text, start in one.answers]}
        found |= {
            "question": one.question,
            "id": one.name,
            **({"is_impossible": not one.answers} if version > 1 else {}),
        }
        paragraphs[-1]["qas"].append(found)
    articles = [{"title": "Ü", "paragraphs": paragraphs[i : i + 3]} for i in range(0, len(paragraphs), 3)]
    return {"version": f"v{version}", "data": articles, "more": {"data": [1]}}


def drawn(seed: int, count: int = 40) -> list[Question]:
    """Return questions, some of which share a context and some of which lack an answer."""
    rng = random.Random(seed)
    found: list[Question] = []
    for number in range(count):
        one = some_question(rng, rng.randrange(2, 30), number)
        while one.answers[0][0].isspace():
            one = some_question(rng, rng.randrange(2, 30), number)
        shared = found and rng.random() < 0.6
        answers = one.answers
        if shared:
            context = found[-1].context
            answers = ((context.split()[-1], context.rindex(context.split()[-1])),)
        answers = () if rng.random() < 0.2 else answers
        found.append(Question(one.question, found[-1].context if shared else one.context, answers, one.name))
    return found


@pytest.mark.parametrize("style", ["one line", "indented", "with a mark", "letters beyond ASCII"])
def test_squad_is_indexed_by_its_bytes(style: str, tmp_path: Path, seed: int) -> None:
    questions = drawn(seed)
    text = json.dumps(squad(questions, 2), indent=2 if style == "indented" else None, ensure_ascii=style == "one line")
    (tmp_path / "q.json").write_text(text, "utf-8-sig" if style == "with a mark" else "utf-8")
    index = TextIndex.build(tmp_path / "q.json")
    reader = QuestionReader(64, 8, True)
    assert [reader.read(line, True) for line in index] == questions
    assert [reader.read(line, False).answers for line in index] == [()] * len(questions)
    assert len({line.key for line in index}) == len(questions)
    rest, held_out = index.split(0.4)
    contexts = [{reader.read(line, True).context for line in part} for part in (rest, held_out)]
    assert not contexts[0] & contexts[1]
    assert rest.fingerprint != held_out.fingerprint != index.fingerprint


def test_json_lines_hold_the_same(tmp_path: Path, seed: int) -> None:
    questions = drawn(seed)
    lines = []
    for i, one in enumerate(questions):
        texts, starts = [text for text, _ in one.answers], [start for _, start in one.answers]
        lists, objects = {"text": texts, "answer_start": starts}, [
            {"text": text, "answer_start": start} for text, start in one.answers
        ]  # fmt: skip
        lines.append({"question": one.question, "context": one.context, "answers": lists if i % 2 else objects})
        lines[-1] |= {"id": one.name} if i % 3 else {}
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = [QuestionReader(64, 8, True).read(line, True) for line in TextIndex.build(tmp_path / "q.jsonl")]
    expected = [
        Question(one.question, one.context, one.answers, one.name if i % 3 else None) for i, one in enumerate(questions)
    ]
    assert found == expected


def test_an_unanswerable_question_needs_a_head_for_it(tmp_path: Path, seed: int) -> None:
    questions = [Question("a dog", "a cat sits", (("cat", 2),), "x"), Question("a mat", "a cat sits", (), "y")]
    (tmp_path / "q.json").write_text(json.dumps(squad(questions, 2)))
    index = TextIndex.build(tmp_path / "q.json")
    QuestionReader(64, 8, True).check(index, "answer")
    with pytest.raises(DataError, match=r"question 2: question 'y' does not have an answer: set .*answer\.no_answer"):
        QuestionReader(64, 8, False).check(index, "answer")
    (tmp_path / "q.tsv").write_text("question\tcontext\na\tb\n")
    with pytest.raises(DataError, match=r"q\.tsv: head 'answer' reads questions from \.json or \.jsonl only"):
        QuestionReader(64, 8, True).check(TextIndex.build(tmp_path / "q.tsv"), "answer")


GOOD = {
    "id": "a1",
    "question": "Who?",
    "context": "Kim lives in Rome.",
    "answers": [{"text": "Kim", "answer_start": 0}],
}
BAD = [
    ({"answers": [{"text": "Kim", "answer_start": 4}]}, "an answer is not in its context", "'Kim' at 4"),
    ({"answers": [{"text": "Kim", "answer_start": -18}]}, "an answer is not in its context", "'Kim' at -18"),
    ({"answers": [{"text": "Rome.", "answer_start": 99}]}, "an answer is not in its context", "has ''"),
    ({"answers": [*GOOD["answers"], {"text": "kim", "answer_start": 0}]}, "an answer is not in", "'kim' at 0"),
    ({"answers": [{"text": "", "answer_start": 0}]}, "an answer is empty", "'a1'"),
    ({"answers": [{"text": "Kim"}]}, "not a list of objects with text and answer_start", "'a1'"),
    ({"answers": {"text": ["Kim"], "answer_start": []}}, "not a list of objects", "'a1'"),
    ({"answers": "Kim"}, "not a list of objects", "'a1'"),
    ({"answers": [{"text": "Kim", "answer_start": True}]}, "not a list of objects", "'a1'"),
    ({"answers": None}, "not a list of objects", "'a1'"),
    ({"context": None}, "its column 'context' holds no text", ""),
    ({"question": " \u200b"}, "its column 'question' holds no text", ""),
    ({"context": "Kim\0"}, "its column 'context' holds a text with NUL", ""),
]


@pytest.mark.parametrize(("change", "cause", "detail"), BAD)
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_bad_questions_are_named(ending: str, change: dict[str, Any], cause: str, detail: str, tmp_path: Path) -> None:
    fields = {**GOOD, **change}
    path = tmp_path / f"q{ending}"
    context = {"context": fields.pop("context")} if ending == ".json" else {}
    whole = {"data": [{"paragraphs": [{**context, "qas": [fields]}]}]} if ending == ".json" else fields
    path.write_text(json.dumps(whole))
    (line,) = TextIndex.build(path)
    with pytest.raises(BadSample) as caught:
        QuestionReader(64, 8, True).read(line, True)
    assert cause in caught.value.cause
    assert detail in caught.value.detail
    assert "line 1" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "Expecting '{'"),
        ("{}", 'has no "paragraphs"'),
        ('{"data": []}', 'has no "paragraphs"'),
        ('{"data": {"a": 1}}', r"Expecting '\['"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', 'has no "paragraphs"'),
        ('{"data": [{"paragraphs": [{"qas": [1]}]}]', "Expecting ','"),
        ('{"data": [{"paragraphs": [{"qas": [1]}]}]} {}', "Extra data: line 1 column 44"),
        ('{"data": [{"paragraphs": [{"qas": ["', "Unterminated"),
        ('{"data": [{"question": "Who?", "context": "Kim"}]}', 'has no "paragraphs"'),
        ("{" + '"a": ' + "[" * 100_000, "recursion"),
    ],
)
def test_other_json_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        TextIndex.build(tmp_path / "q.json")
    assert f"{tmp_path / 'q.json'} cannot be read: it is not the JSON of SQuAD" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_paragraphs_are_bad_samples(tmp_path: Path) -> None:
    paragraphs = [{"qas": 3}, "no", {"qas": [7, GOOD]}, {"qas": [{"question": "Who?"}]}]
    (tmp_path / "q.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    causes = []
    for line in TextIndex.build(tmp_path / "q.json"):
        try:
            causes.append(QuestionReader(64, 8, True).read(line, True).name)
        except BadSample as error:
            causes.append(error.cause)
    lacks = 'its paragraph does not have a list of questions, "qas"'
    assert causes == [lacks, "it is not a JSON object", lacks, "a1", "it has no field 'context'"]


def test_real_squad() -> None:
    path = SQUAD / "dev-newwiki.json"
    if not path.is_file():
        pytest.skip("the shared data is absent")
    index, reader = TextIndex.build(path), QuestionReader(384, 128, False)
    found = [reader.read(line, True) for line in index]
    data = json.loads(path.read_text())["data"]
    expected = [
        (qa["id"], paragraph["context"], tuple((one["text"], one["answer_start"]) for one in qa["answers"]))
        for article in data
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    assert [(one.name, one.context, one.answers) for one in found] == expected
    assert len(np.unique(index.parts[0].starts)) == sum(len(article["paragraphs"]) for article in data)
