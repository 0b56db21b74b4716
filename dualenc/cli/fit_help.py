"""Help of `fit`, `validate`, `test` and `predict`, from the sources of the classes, so that torch is not loaded."""

import ast
import importlib.util
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dualenc.cli.annotations import metavar
from dualenc.cli.settings import TRAINER_DEFAULTS
from dualenc.utils.text import shorten

TASKS = ("ContrastiveTask", "TextTask", "ReplacedTokenTask")
DATA = ("PairData", "TextData")
# Keys that the command line sets itself.
LINKED = {"model": ("seed", "tokenizer"), "data": ("seed", "preprocess", "text", "heads", "mask")}
LONGEST = 12  # characters of a metavar
GENERAL = {
    "--config FILE": "settings in YAML; `dualenc configs` lists those of the package; several are merged",
    "--ckpt_path auto": "resume from the newest checkpoint of the run, or start it; or PATH of a checkpoint or run",
    "--seed_everything N": "seed of weights, order, augmentation and dropout",
    "--print_config": "print all settings with their values, and do nothing else",
}
NOT_PLANNED = ("--ckpt_path auto", "--print_config")  # options that `plan` ignores
PLAN_OPTIONS = {  # of `plan` alone
    "--device_memory GIB": "memory of a GPU, for the largest batch and micro-batch that fit",
    "--tokens N": "mean number of tokens of a text; by default the longest text is planned for",
    "--samples_per_second RATE": "rate of all ranks, for the time of the run",
}
# The keys that have a line of their own in the short help.
MAIN = {
    "model": ("image", "text", "embed_dim", "pretrained", "text_from", "loss", "optimizer"),
    "data": ("train", "val", "captions", "tokenizer", "batch_size", "micro_batch_size", "workers"),
    "run": ("monitor", "every_n_minutes", "accept_changes"),
}
TRAINER = {
    "default_root_dir": "folder of the run",
    "max_epochs": "number of epochs after which training ends",
    "max_steps": "number of steps after which training ends; -1 for no limit",
    "accelerator": "kind of device: auto, cpu, gpu",
    "devices": "number of devices of each machine; auto for all",
    "num_nodes": "number of machines",
    "precision": "bf16-mixed, 16-mixed, 32-true",
    "gradient_clip_val": "largest norm of the gradient",
    "log_every_n_steps": "number of steps between lines of metrics.csv",
    "check_val_every_n_epoch": "number of epochs between validations; null to count steps only",
    "val_check_interval": "steps, or share of an epoch, between validations",
    "callbacks": "a list of callbacks, such as dualenc.training.Evaluation",
}


@dataclass(frozen=True)
class Key:
    """Parameter of a class, as its source describes it.

    Attributes:
        name: name of the parameter.
        source: source code of its annotation.
        default: source code of its default; empty if it has none.
        text: its description in the docstring of the class.
        parts: names of the fields, if its type is a dataclass.
    """

    name: str
    source: str
    default: str
    text: str
    parts: tuple[str, ...]

    def label(self, whole: bool) -> str:
        """Return name and metavar; unless it must be whole, a long metavar is VALUE."""
        word = metavar(self.source)
        return (
            f"{self.name}.KEY VALUE"
            if self.parts
            else f"{self.name} {word if whole or len(word) <= LONGEST else 'VALUE'}"
        )

    @property
    def shown_default(self) -> str:
        """Default, spelled as in YAML; empty if there is none to show."""
        plain = {"None": "", "True": "true", "False": "false", "()": ""}
        return "" if self.parts else plain.get(self.default, self.default.strip("'\""))


def trainer_help(command: str, summary: str, width: int, whole: bool = False) -> str:
    """Return the help of a command of the trainer.

    Args:
        command: fit, plan, validate, test or predict.
        summary: what the command does, in a sentence.
        width: number of columns.
        whole: whether to print all keys of all classes with their whole descriptions.
    """
    general = GENERAL
    if command == "plan":
        general = PLAN_OPTIONS | {name: what for name, what in GENERAL.items() if name not in NOT_PLANNED}
    lines = [
        f"usage: dualenc {command} --config FILE [--KEY VALUE ...]",
        "",
        summary,
        "Each key of the file is an option too, without init_args: --data.batch_size 64",
        "",
        *_rows(general, width, whole),
    ]
    for section, names in {"model": TASKS, "data": DATA, "run": ("RunDirectory",)}.items():
        for name in names if whole else names[:1]:
            lines += ["", f"{section}: dualenc.training.{name}", *_section(section, name, width, whole)]
        for name in () if whole else names[1:]:
            listed = ", ".join(key.name for key in class_keys(section, name))
            lines += _wrap(f"  of dualenc.training.{name}: {listed}", width)
    if whole:
        shown = {f"--trainer.{key.label(whole)}": _plain(key.text) for key in trainer_keys()}
    else:
        labels = {key.name: key.label(whole) for key in trainer_keys()}
        shown = {f"--trainer.{labels[name]}": text + _default(name) for name, text in TRAINER.items()}
    lines += ["", "trainer: lightning.pytorch.Trainer", *_rows(shown, width, whole)]
    rest = [] if whole else ["", f"All keys with their descriptions: dualenc {command} --help=all"]
    return "\n".join([*lines, *rest])


def _default(name: str) -> str:
    value = TRAINER_DEFAULTS.get(name)
    return "" if value is None else f" (default: {value})"


def _section(section: str, name: str, width: int, whole: bool) -> list[str]:
    """Return the lines of a class: one for each main key, and the names of the others; or all keys in full."""
    keys = class_keys(section, name)
    main = [key for key in keys if whole or key.name in MAIN[section]]
    texts = {}
    for key in main:
        parts = f": {', '.join(key.parts)}" if key.parts else ""
        shown = f" Default: {key.shown_default}." if whole and key.shown_default else ""
        texts[f"--{section}.{key.label(whole)}"] = (
            _plain(key.text).removesuffix(".") + parts + (f".{shown}" if shown else "")
        )
    rest = ", ".join(key.name for key in keys if key not in main)
    return [*_rows(texts, width, whole), *(_wrap(f"  also {rest}", width) if rest else [])]


def _rows(texts: dict[str, str], width: int, whole: bool) -> list[str]:
    """Return lines of labels and descriptions: whole ones wrapped, or the beginning that fits the line."""
    indent = 36
    lines = []
    for label, text in texts.items():
        if whole:
            lines += [f"  {label}", *_wrap(f"{' ' * 8}{text}", width, more=0)]
        else:
            column = max(indent, len(label) + 4)
            lines.append(f"  {label:{column - 2}}{shorten(text, width - column)}")
    return lines


def _wrap(text: str, width: int, more: int = 2) -> list[str]:
    """Return the lines of a text: all begin like the first, and those after it `more` columns further right."""
    indent = " " * (len(text) - len(text.lstrip()) + more)
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)


def _plain(text: str) -> str:
    """Return a description without the marks of reStructuredText, and with null as in YAML."""
    text = re.sub(r"\bNone\b", "null", text)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text).replace("``", "")
    return " ".join(text.split())


def class_keys(section: str, name: str) -> list[Key]:
    """Return the keys of a class of `dualenc.training`, except those that the command line sets."""
    return [key for key in read_keys("dualenc.training", name) if key.name not in LINKED.get(section, ())]


def trainer_keys() -> list[Key]:
    """Return the keys of Lightning's trainer."""
    return read_keys("lightning.pytorch.trainer.trainer", "Trainer")


def read_keys(module: str, name: str) -> list[Key]:
    """Return the parameters of a class from its source.

    Args:
        module: module that defines or imports the class.
        name: name of the class.
    """
    import docstring_parser

    module, node = find_definition(module, name)
    assert isinstance(node, ast.ClassDef)
    (init,) = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    docs = docstring_parser.parse(ast.get_docstring(node) or "").params
    docs = docs or docstring_parser.parse(ast.get_docstring(init) or "").params
    texts = {item.arg_name: item.description or "" for item in docs}
    places, named = init.args.args[1:], init.args.kwonlyargs
    defaults = [*[None] * (len(places) - len(init.args.defaults)), *init.args.defaults, *init.args.kw_defaults]
    found = []
    for argument, default in zip([*places, *named], defaults, strict=True):
        source, parts = _resolve(module, argument.annotation)
        found.append(Key(argument.arg, source, ast.unparse(default) if default else "", texts[argument.arg], parts))
    return found


def _resolve(module: str, annotation: ast.expr | None) -> tuple[str, tuple[str, ...]]:
    """Return the source code of an annotation, with a name for choices replaced, and the fields of a dataclass."""
    assert annotation is not None
    for part in ast.walk(annotation):
        if isinstance(part, ast.Name) and module.startswith("dualenc"):
            _, node = find_definition(module, part.id)
            if isinstance(node, ast.Assign) and part is annotation:
                return ast.unparse(node.value), ()
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
                fields = [one.target for one in node.body if isinstance(one, ast.AnnAssign)]
                return part.id, tuple(one.id for one in fields if isinstance(one, ast.Name) and one.id.islower())
    return ast.unparse(annotation), ()


def find_definition(module: str, name: str) -> tuple[str, ast.stmt | None]:
    """Return the module that defines a name, and the definition; None where that is outside this package."""
    for node in _parse(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dualenc"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find_definition(str(node.module), alias.name)
    return module, None


@cache
def _parse(module: str) -> ast.Module:
    """Return the syntax tree of a module, which is not imported."""
    package, *rest = module.split(".")
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent.joinpath(*rest)
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8"))
