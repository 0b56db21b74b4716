"""Rules of the package: imports, lengths of files and functions, and the libraries that commands load."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import encode, tiny_tokenizer, write_shards

import dualenc.data.pairs as pairs
from dualenc.data import PairDataset, ShardIndex
from dualenc.data.images import Preprocess

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dualenc"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def imports(tree: ast.AST) -> set[str]:
    """Return the package's modules that a tree imports anywhere, also lazily or for types only."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= MODULES.keys() else (names & MODULES.keys()) | {str(node.module)}
    return found & MODULES.keys()


def cycles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected groups of modules, by Kosaraju's algorithm (1978)."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str, of: dict[str, set[str]], out: list[str]) -> None:
        if name not in seen:
            seen.add(name)
            for other in sorted(of[name]):
                visit(other, of, out)
            out.append(name)

    for name in arrows:
        visit(name, arrows, order)
    back = {name: {other for other in arrows if name in arrows[other]} for name in arrows}
    seen.clear()
    groups = []
    for name in reversed(order):
        group: list[str] = []
        visit(name, back, group)
        groups.append(set(group))
    return [group for group in groups if len(group) > 1]


def loaded(code: str, *names: str) -> list[str]:
    """Return the modules of `names` that a new Python process has loaded after it ran `code`."""
    code = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(*[m for m in {names} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.splitlines()[-1].split()


def test_import_cycles_are_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [{"b", "c"}]
    assert imports(ast.parse("if x:\n    def f():\n        from dualenc.utils import files, urls")) == {
        "dualenc.utils.files",
        "dualenc.utils.urls",
    }


def test_no_import_cycles() -> None:
    """Imports of a package count as imports of its modules, since its `__init__` imports their names."""
    assert cycles({name: imports(tree) - {name} for name, tree in TREES.items()}) == []


def test_the_contracts_hold() -> None:
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_public_class_names_are_unique() -> None:
    names = Counter(
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert names["DualEncoder"] == 1
    assert [name for name, count in names.items() if count > 1] == []


def test_no_file_is_over_550_lines_and_no_function_over_65() -> None:
    files = {name: len(path.read_text("utf-8").splitlines()) for name, path in MODULES.items()}
    functions = {
        f"{name}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTION)
    }
    assert any(name.endswith(" training_step") for name in functions)
    assert {name: lines for name, lines in files.items() if lines > 550} == {}
    assert {name: lines for name, lines in functions.items() if lines > 65} == {}


def unmarked(tree: ast.Module) -> list[str]:
    """Return the tests of a module that ask whether there is a CUDA device, and do not carry the gpu mark."""
    asking = "is_available"
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and asking in ast.unparse(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION) and node.name.startswith("test_"):
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            skips = any("skipif" in mark and asking in mark for mark in marks) or bool(names & set(marks))
            if skips and "pytest.mark.gpu" not in marks:
                found.append(node.name)
    return found


def test_tests_that_need_a_device_carry_the_gpu_mark() -> None:
    skip = '@pytest.mark.skipif(not torch.cuda.is_available(), reason="")'
    code = f"needs = {skip[1:]}\n@needs\ndef test_a(): pass\n{skip}\ndef test_b(): pass\n@pytest.mark.gpu\n@needs\n"
    assert unmarked(ast.parse(f"{code}def test_c(): pass\ndef test_d(): pass")) == ["test_a", "test_b"]
    texts = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    trees = {name: ast.parse(text) for name, text in texts.items() if "is_available" in text}
    assert {name: found for name, tree in trees.items() if (found := unmarked(tree))} == {}


@pytest.mark.long
def test_only_training_and_cli_import_the_trainer() -> None:
    """Everything except training and cli imports without lightning, transformers and libraries that import them."""
    modules = [name for name in MODULES if not name.startswith(("dualenc.training", "dualenc.cli", "dualenc.__main__"))]
    assert "dualenc.models.text_encoder" in modules
    heavy = "lightning", "transformers", "torchmetrics", "open_clip"
    assert loaded(f"import importlib; [importlib.import_module(m) for m in {modules!r}]", *heavy) == []


@pytest.mark.parametrize("package", ["dualenc", "dualenc.data"])
def test_lazy_names_are_those_that_a_type_checker_sees(package: str) -> None:
    """In a lazy package, `__all__`, the imports for type checkers and the attributes agree."""
    module = importlib.import_module(package)
    seen = {
        alias.name: getattr(importlib.import_module(str(node.module)), alias.name)
        for block in TREES[package].body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sorted(module.__all__)
    assert {name: getattr(module, name) for name in seen} == seen
    assert set(seen) <= set(dir(module))


@pytest.mark.long
def test_the_package_loads_nothing_until_it_is_used() -> None:
    assert loaded("import dualenc", "torch", "numpy") == []
    assert loaded("import dualenc; dualenc.DataError", "torch", "numpy") == []
    assert loaded("import dualenc; dualenc.losses.clip_loss, dualenc.data.Augment", "torch", "lightning") == ["torch"]
    assert loaded("import dualenc; dualenc.Tokens", "torch", "torchvision", "lightning") == ["torch"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        [],
        ["--version"],
        ["configs"],
        ["zerosht"],
        ["fit", "--help"],
        ["test", "--help=all"],
        ["fit", "--config", "no"],
    ],
)
def test_commands_without_models_do_not_load_torch(arguments: list[str]) -> None:
    heavy = "torch", "numpy", "lightning", "PIL", "transformers"
    assert loaded(f"from dualenc.cli import main; main({arguments!r})", *heavy) == []


@pytest.mark.long
def test_data_commands_load_no_torchvision(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "cat.png").write_bytes(encode(rng.integers(0, 255, (300, 300, 3), np.uint8)))
    (tmp_path / "captions.csv").write_text("file,caption\ncat.png,a cat\n")
    commands = [
        ["make-shards", str(tmp_path), f"{tmp_path}/shards", "--workers", "0"],
        ["index", f"{tmp_path}/shards"],
        ["doctor", f"{tmp_path}/shards", "--workers", "0"],
        ["shrink", f"{tmp_path}/shards", f"{tmp_path}/small", "--workers", "0"],
    ]
    heavy = "torchvision", "lightning", "open_clip", "transformers", "timm"
    assert loaded(f"from dualenc.cli import main; [main(x) for x in {commands!r}]", "torch", *heavy) == ["torch"]
    assert list(tmp_path.glob("small/*.tar"))


def test_at_most_four_calls_until_an_image_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[str]] = []
    decode = pairs.decode_image

    def decode_image(data: bytes) -> Any:
        ours = [frame.function for frame in inspect.stack()[1:] if Path(frame.filename).is_relative_to(PACKAGE)]
        found.append(["decode_image", *ours])
        return decode(data)

    monkeypatch.setattr(pairs, "decode_image", decode_image)
    write_shards(tmp_path, [3], 0)
    dataset = PairDataset(ShardIndex.build(str(tmp_path)), "txt", tiny_tokenizer(), Preprocess(8), seed=0)
    dataset[0, 0, np.arange(3)]
    assert len(found) == 3
    assert max(map(len, found)) <= 4, found


@pytest.mark.parametrize("name", ["weights_only=False", "allow_pickle=True", "shell=True", "extractall("])
def test_nothing_unsafe(name: str) -> None:
    assert not [path for path in PACKAGE.rglob("*.py") if name in path.read_text()]
