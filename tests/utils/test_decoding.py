"""Texts that others wrote: byte-order marks, UTF-16, NULs, invisible text; and that one module decodes all of them."""

import ast
import random
import sys
import unicodedata
from pathlib import Path

import pytest
import regex

from dualenc.utils.decoding import (
    TextError,
    decode_text,
    is_blank,
    lines_of,
    mark_size,
    open_text,
    read_text,
    text_problem,
    trimmed,
)
from dualenc.utils.errors import DataError
from dualenc.utils.files import read_json

PACKAGE = Path(__file__).parents[2] / "dualenc"
MARK = "\ufeff"
ALL = [chr(code) for code in range(sys.maxunicode + 1)]


def letters(rng: random.Random, most: int = 9) -> str:
    return "".join(rng.choices("aé猫😀ß \n\u200b", k=rng.randint(1, most))) + "z"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_mark_is_no_part_of_a_text(seed: int, encoding: str) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        text = letters(rng)
        mark = MARK if encoding.endswith(("le", "be")) else ""
        assert decode_text(f"{mark}{text}".encode(encoding)) == text
    assert decode_text(f"{MARK}{MARK}a".encode()) == "a"
    assert decode_text(MARK.encode(encoding)) == ""
    assert decode_text(f"a{MARK}b".encode()) == f"a{MARK}b"


def test_a_part_of_a_text_begins_with_no_mark() -> None:
    assert decode_text(f"{MARK}a".encode(), part=True) == f"{MARK}a"
    with pytest.raises(TextError, match="is not UTF-8"):
        decode_text(f"{MARK}a".encode("utf-16-le"), part=True)
    assert mark_size(b"a") == 0
    assert mark_size(MARK.encode()) == 3
    assert mark_size((2 * MARK).encode() + b"a") == 6
    with pytest.raises(TextError, match="is UTF-16"):
        mark_size("a".encode("utf-16"))


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"a \xff cat", "is not UTF-8"),
        ("é".encode()[:1], "is not UTF-8"),
        ("a cat".encode("utf-16")[:-1], "is not UTF-16"),
        (b"\xff\xfe\x00\xd8", "is not UTF-16"),
        (b"a\0b", "has NUL characters"),
        ("a cat".encode("utf-16-le"), "has NUL characters"),
        ("a\0".encode("utf-16"), "has NUL characters"),
        ("a cat".encode("utf-32"), "has NUL characters"),
    ],
)
def test_what_is_not_a_text_is_refused(tmp_path: Path, data: bytes, cause: str) -> None:
    with pytest.raises(TextError) as error:
        decode_text(data)
    assert error.value.cause == cause
    assert error.value.detail
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.txt {cause}"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"a\.txt"):
        read_json(tmp_path / "a.txt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt cannot be read"):
        read_text(tmp_path / "gone.txt")


def test_invisible_characters_are_those_of_unicode() -> None:
    """Compare each character with the properties in `regex`; the blank of Braille has no property of its own."""
    blank = regex.compile(r"[\p{White_Space}\p{Cc}\p{Default_Ignorable_Code_Point}\u2800]")
    known = [character for character in ALL if unicodedata.category(character) != "Cs"]
    different = [hex(ord(c)) for c in known if is_blank(c) != bool(blank.fullmatch(c))]
    assert different == []
    assert is_blank("")
    assert is_blank(f" {MARK}\u200b\t\x01")
    assert not is_blank(f"{MARK}a")


def test_trimming_removes_white_space_and_marks() -> None:
    assert [c for c in ALL if (trimmed(c) == "") != (c.isspace() or c == MARK)] == []
    assert trimmed(f" {MARK} a{MARK} b\n{MARK}") == f"a{MARK} b"
    assert trimmed("\u2764\ufe0f") == "\u2764\ufe0f"  # the variation selector makes the heart red


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system(end: str) -> None:
    assert lines_of(f"a {end}{end} b\u2028c{end}") == ["a", "", "b\u2028c", ""]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("a cat", None),
        (f"{MARK}a", None),
        ("\u0301", None),
        (None, "empty"),
        ([], "empty"),
        (float("nan"), "empty"),
        ("", "empty"),
        (" \u200b\ufeff\x07", "empty"),
        ("a\0", "with NUL characters"),
        ("\0", "with NUL characters"),
        ("a\ud800", "not UTF-8"),
        (7, "not text"),
        (1.5, "not text"),
        (["a"], "not text"),
        ({"a": 1}, "not text"),
        (b"a", "not text"),
    ],
)
def test_problems_of_a_text(value: object, problem: str | None) -> None:
    assert text_problem(value) == problem


def test_a_table_is_opened_in_its_encoding(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = [letters(rng).replace("\n", "") + rng.choice(["\n", "\r\n"]) for _ in range(20)]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a.csv").write_bytes("".join(rows).encode(encoding))
        with open_text(tmp_path / "a.csv", newline="") as file:
            assert list(file) == rows, encoding
    (tmp_path / "a.csv").write_bytes(b"a,b\n\xff,c\n")
    with open_text(tmp_path / "a.csv", newline="") as file:
        first, second = file
    assert (first, text_problem(first), text_problem(second)) == ("a,b\n", None, "not UTF-8")
    for data, cause in (("a,b\n".encode("utf-16-le"), "has NULs"), ("a".encode("utf-16")[:-1], "is not UTF-16")):
        (tmp_path / "a.csv").write_bytes(data)
        with pytest.raises(DataError, match=rf"a\.csv {cause}"):
            open_text(tmp_path / "a.csv", newline="")


# The rule

# Functions that decode what dualenc or another program wrote for it, or what is not a text: module -> functions, "*"
# for all. Texts of users, of data sets and of other people's models are decoded by `dualenc.utils.decoding` only.
EXEMPT = {
    "dualenc.utils.decoding": {"*"},
    "dualenc.cli.fit_help": {"_parse"},  # modules of Python
    "dualenc.inference.image_files": {"_listed"},  # the extension of a file name
    "dualenc.cli.data": {"configs"},  # the configurations of the package
    "dualenc.curation.tables": {"read_scores"},  # scores.json
    "dualenc.data.image_features": {"read_about"},  # files of `dualenc embed`
    "dualenc.data.image_notes": {"_png_content"},  # letters that stand for bytes
    "dualenc.data.prepare.caption_sources": {"clean"},  # a string in place of bytes
    "dualenc.data.prepare.make_shards": {"_finished"},  # summary.json
    "dualenc.data.prepare.resumable": {"read_begun"},  # shrink.json, reshard.json
    "dualenc.data.shards.shard": {"key", "scan", "add"},  # names of members, which may have any bytes
    "dualenc.data.shards.tar": {"members"},  # names of members
    "dualenc.data.text.formats": {"texts", "_paragraphs"},  # bytes as letters, to find records of a CSV and of JSON
    "dualenc.evaluation.results": {"*"},  # results of evaluations
    "dualenc.hub.card": {"*"},  # metrics and results of a run
    "dualenc.hub.push": {"*"},  # the card
    "dualenc.interop.references": {"*"},  # exchanged with a process of dualenc
    "dualenc.report.formatting": {"*"},  # base64
    "dualenc.report.plots": {"*"},  # metrics of a run
    "dualenc.search.folder": {"read_about"},  # search.json
    "dualenc.search.segments": {"_mapped"},  # files of `dualenc build-search`
    "dualenc.search.service.app": {"_encoded"},  # base64
    "dualenc.search.service.fields": {"parse_object"},  # JSON, which has no other encoding
    "dualenc.search.service.guard": {"_check"},  # headers, which may have any bytes
    "dualenc.training.ranks": {"*"},  # addresses of ranks
    "dualenc.training.run_lock": {"*"},  # the process that holds a run
    "dualenc.training.run_record": {"*"},  # records of a run
}


def decoding(tree: ast.AST, function: str = "") -> list[tuple[str, int, str]]:
    """Return function, line and code of each place that turns bytes of a file into text."""
    found = []
    for node in ast.iter_child_nodes(tree):
        name = node.name if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        if isinstance(node, ast.Call) and decodes(node):
            found.append((function, node.lineno, ast.unparse(node)))
        found += decoding(node, name)
    return found


def decodes(call: ast.Call) -> bool:
    """Return whether a call is `x.decode()` with a name of an encoding or nothing, `read_text`, or `open` for text."""
    match call.func:
        case ast.Attribute(attr="decode"):
            values = [*call.args, *(keyword.value for keyword in call.keywords)]
            return all(isinstance(value, ast.Constant) and isinstance(value.value, str) for value in values)
        case ast.Attribute(value=ast.Name("json"), attr="load"):
            return True
        case ast.Attribute(value=ast.Name("json"), attr="loads"):
            argument = ast.unparse(call.args[0])
            return "read" in argument and not argument.startswith(("read_text(", "decode_text("))
        case ast.Attribute(value=ast.Name("Path") | ast.Call(), attr="open"):
            return True
        case ast.Attribute(attr="read_text", value=owner):
            return not (isinstance(owner, ast.Name) and owner.id in ("sample", "self"))  # `Sample.read_text`
        case ast.Name("open"):
            mode = call.args[1:2] + [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
            letters = str(mode[0].value) if mode and isinstance(mode[0], ast.Constant) else "r"
            return "b" not in letters and ("r" in letters or "+" in letters)
        case ast.Attribute(value=ast.Name("io" | "codecs"), attr="open" | "TextIOWrapper" | "StreamReader"):
            return True
    return False


def test_one_module_decodes_the_texts_of_others() -> None:
    found: dict[str, list[tuple[str, int, str]]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        places = decoding(ast.parse(path.read_text("utf-8")))
        if places:
            found[name] = places
    wrong = [
        f"{name}:{line} {code}"
        for name, places in found.items()
        for function, line, code in places
        if not EXEMPT.get(name, set()) & {"*", function}
    ]
    assert wrong == [], "decode by dualenc.utils.decoding, or add what is no text of others to EXEMPT"
    used = {(name, function) for name, places in found.items() for function, *_ in places}
    unused = [
        f"{name} {function}"
        for name, functions in EXEMPT.items()
        for function in functions
        if name not in found or (function != "*" and (name, function) not in used)
    ]
    assert unused == [], "these decode nothing any more"


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("data.decode('utf-8')", True),
        ("data.decode()", True),
        ("data.decode(encoding='latin-1', errors='replace')", True),
        ("path.read_text('utf-8')", True),
        ("Path(path).read_text()", True),
        ("open(path)", True),
        ("open(path, 'r', encoding='utf-8')", True),
        ("open(path, mode='w+')", True),
        ("json.load(file)", True),
        ("json.loads(path.read_bytes())", True),
        ("Path(path).open()", True),
        ("open(path, 'rb')", False),
        ("open(path, mode='rb')", False),
        ("open(path, 'w')", False),
        ("source.decode(row)", False),
        ("tokenizer.decode(ids, skip=True)", False),
        ("json.loads(read_text(path))", False),
        ("json.loads(decode_text(path.read_bytes()))", False),
        ("json.loads(text)", False),
        ("read_text(path)", False),
        ("sample.read_text('txt')", False),
    ],
)
def test_the_rule_sees_what_decodes(code: str, seen: bool) -> None:
    assert bool(decoding(ast.parse(f"def f():\n    return {code}"))) == seen
