"""Settings of a run, from configuration files and options: their keys and values are checked before jsonargparse.

jsonargparse parses the settings in the end. It cannot tell the line of a file, suggests nothing, and replaces a dict of
which an option sets one key. Where the signatures do not say which keys a setting has, nothing is refused here.
"""

import dataclasses
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import yaml

from dualenc.cli.annotations import element, fits, members, must_be
from dualenc.cli.common import UsageError, config_folder
from dualenc.utils.decoding import TextError, decode_text
from dualenc.utils.imports import import_by_path
from dualenc.utils.text import did_you_mean, one_line, quoted, reason

TRAINER_DEFAULTS = {
    "default_root_dir": "runs/dualenc",
    "logger": False,
    "use_distributed_sampler": False,  # the epoch plan gives each rank its part
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
}
OF_CLASS = ("class_path", "init_args", "dict_kwargs")
PASSED = ("config", "print_config", "help")  # options of jsonargparse's own
EXAMPLES = {"model": "dualenc.training.ContrastiveTask", "data": "dualenc.training.PairData"}
OWN = ("dualenc.training", "dualenc.data", "dualenc.losses")  # modules whose names are suggested
HINTS = {  # what PyYAML says, and what it means
    r"found character '\\t'": "a tab cannot indent YAML: use spaces",
    r"mapping values are not allowed": "the key is indented differently from the keys around it, the line before lacks "
    "its colon, or a text with ': ' needs quotes",
    r"expected <block end>": "a line is indented differently from the lines around it",
    r"could not find expected ':'": "a key lacks its colon, or a line is indented differently from the lines around it",
    r"expected ',' or '\W'": "a bracket is not closed",
    r"found '<stream end>'": "a bracket is not closed",
    r"unexpected end of stream": "a quote is not closed",
}
# Contexts whose beginning is the line of the mistake.
BEGUN = ("while parsing a flow", "while scanning a quoted", "while scanning a simple key")


class ConfigFile(NamedTuple):
    """Configuration file.

    Attributes:
        path: its path.
        node: its content, with the numbers of the lines.
        values: its content.
    """

    path: str
    node: yaml.MappingNode
    values: dict[str, Any]


class _AnyKey(dict[str, Any]):
    """Keys of a dict, which may have any name.

    Args:
        value: type of the values.
    """

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        return self.value


# Files


def read_configs(words: Sequence[str]) -> list[ConfigFile]:
    """Read the configuration files that the words of a command line name.

    Raises:
        UsageError: If a file is missing or is not YAML with keys; the message names the file and the line.
    """
    found = []
    for name, value in _options(words):
        if name in ("--config", "-c") and value is not None and "\n" not in value and not value.startswith("{"):
            found.append(read_config(value))
    return found


def read_config(path: str | os.PathLike[str]) -> ConfigFile:
    """Read a configuration file.

    Raises:
        UsageError: If the file is missing, or is not YAML with keys; the message names the file and the line.
    """
    path = str(path)
    if not Path(path).exists():
        stems = {one.stem: one for one in config_folder().glob("*.yaml")}
        near = sorted(one.name for one in Path(path).parent.glob("*.y*ml"))
        if Path(path).stem in stems:
            hint = f"write it by `dualenc configs {Path(path).stem} > {Path(path).with_suffix('.yaml')}`"
        else:
            hint = did_you_mean(Path(path).name, near, "`dualenc configs` lists those that come with the package")
        raise UsageError(f"configuration {path} does not exist: {hint}")
    try:
        text = decode_config(Path(path))
    except OSError as error:
        raise UsageError(f"configuration {path} cannot be read: {reason(error)}") from error
    try:
        node, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}{_yaml_problem(error)}") from None
    except ValueError as error:  # such as a date that does not exist
        raise UsageError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else "something else"
        raise UsageError(f"{path} must hold keys such as model and data, found {found}")
    return ConfigFile(path, node, values)


def decode_config(path: Path) -> str:
    """Return the text of a configuration file.

    Raises:
        UsageError: If the file is not UTF-8, which is all that jsonargparse reads; the message names it.
        OSError: If the file cannot be read.
    """
    try:
        return decode_text(path.read_bytes(), part=True)
    except TextError as error:
        raise UsageError(f"{path} {error}: a configuration must be a text in UTF-8") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if (getattr(error, "context", None) or "").startswith(BEGUN):
        mark = getattr(error, "context_mark", mark)
    said = one_line(getattr(error, "problem", None) or error)
    hint = next((hint for pattern, hint in HINTS.items() if re.search(pattern, said)), said)
    return f" cannot be read as YAML: {hint}" if mark is None else f", line {mark.line + 1}: {hint}"


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the options of a command line with their values.

    Raises:
        UsageError: If a word is neither an option nor the value of one.
    """
    i = 0
    while i < len(words):
        name, equals, value = words[i].partition("=")
        i += 1
        if not _is_option(name):
            raise UsageError(f"unexpected argument {words[i - 1]!r}: {_stray(words[: i - 1], name)}")
        if equals:
            yield name, value
        elif i < len(words) and not _is_option(words[i]):
            yield name, words[i]
            i += 1
        else:
            yield name, None


def _stray(before: Sequence[str], word: str) -> str:
    """Return what to write for a word that is neither an option nor the value of one."""
    if word.endswith((".yaml", ".yml")):
        return f"write --config {quote(word)}"
    if len(before) > 1 and _is_option(before[-2]) and Path(word).suffix == Path(before[-1]).suffix != "":
        return f"{before[-2]} takes one value: quote a pattern, '*.tar', or write a list, '[a, b]'"
    return "a setting is written --KEY VALUE"


def _is_option(word: str) -> bool:
    return bool(re.match(r"--[A-Za-z]|-[a-z]$", word)) and " " not in word.partition("=")[0]


# Keys


def keys_of(kind: Any, value: Any) -> dict[str, Any] | None:
    """Return the keys that a setting may have, with their types; None if it is not known.

    Args:
        kind: annotation of the setting, or its keys.
        value: the setting, which may name a class.
    """
    if isinstance(kind, dict):
        return kind
    path = _class_path(kind, value)
    if path is not None:
        found = parameters(_import(path)[0])
        return None if found is None else {**found, "class_path": str, "init_args": found, "dict_kwargs": Any}
    found = [keys for one in members(kind) if (keys := _fields(one)) is not None]
    return found[0] if len(found) == 1 else None


def _fields(kind: Any) -> dict[str, Any] | None:
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind)
        names = [one.name for one in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else list(hints)
        return {name: hints[name] for name in names}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _AnyKey((*typing.get_args(kind), Any, Any)[1])
    return None


def _class_path(kind: Any, value: Any) -> str | None:
    """Return the import path of the class or function that a setting names; None if it names none."""
    path = value.get("class_path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", path):
        return None
    if isinstance(value, str) and not _takes_class(kind):
        return None
    if "." in path:
        return path
    return f"{OWN[0]}.{path}" if path in public_names(OWN[0]) else None


def _takes_class(kind: Any) -> bool:
    """Return whether a value of a type is a class or function, and never a text."""
    found = [typing.get_origin(one) or one for one in members(kind)]
    plain = ("builtins", "pathlib")
    classes = [one for one in found if one is Callable or (isinstance(one, type) and one.__module__ not in plain)]
    return bool(classes) and str not in found and not any(_fields(one) is not None for one in found)


def _import(path: str) -> tuple[Any, str]:
    """Return the object with an import path, or None and the reason why there is none."""
    try:
        return import_by_path(path), ""
    except ImportError as error:
        return None, str(error)


def parameters(function: Any) -> dict[str, Any] | None:
    """Return the parameters of a class or function with their types; None if it takes any."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a class of C
        return None
    hints: dict[str, Any] = {}
    with suppress(TypeError, NameError):  # names that are imported for type checkers only
        hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.parameters.values()):
        return None
    return {name: hints.get(name, Any) for name in signature.parameters}


def _unknown(name: str, path: str, known: Mapping[str, Any], places: Mapping[str, str]) -> str:
    """Return the end of a message about an unknown key.

    Args:
        name: the key.
        path: path of the keys above it, with a dot at its end.
        known: keys that are known here.
        places: paths of other settings, by their last keys.
    """
    if not path and name.replace("-", "_") in places:
        return f"did you mean {places[name.replace('-', '_')]}?"
    listed = [one for one in known if one not in (*OF_CLASS, *PASSED)]
    return did_you_mean(name, known, f"choose one of {', '.join(listed)}")


# Checks


class Settings:
    """The settings of a run, checked key by key.

    Args:
        sections: keys at the top, each with its type, or with the keys below it.
    """

    def __init__(self, sections: Mapping[str, Any]) -> None:
        self.sections = dict(sections)
        self.values: dict[str, Any] = {}
        self._where = ""

    def check(self, words: Sequence[str]) -> list[str]:
        """Check files and options; return the options spelled as jsonargparse reads them.

        An option that sets a key inside a dict becomes one that sets the whole dict, with the other keys of the files.

        Args:
            words: the words of the command line after the command.

        Raises:
            UsageError: If a key is unknown or a value does not fit; the message names it, and the line of a file.
        """
        for file in read_configs(words):
            self._where = file.path
            self._check_node(file.node, self.sections, "")
            _merge(self.values, file.values)
        self._where = ""
        spelled = [word for name, value in _options(words) for word in self._check_option(name, value)]
        asks = any(re.match(r"--print_config|--[\w.]+\.help\b", word) for word in spelled)
        missing = [section for section in EXAMPLES if not self.values.get(section)]
        if missing and not asks:
            raise UsageError(
                f"{missing[0]} is missing: give --config FILE; `dualenc configs` lists those of the package"
            )
        return spelled

    def _error(self, message: str, node: yaml.Node | None = None) -> UsageError:
        where = f"{self._where}, line {node.start_mark.line + 1}: " if node is not None and self._where else ""
        return UsageError(f"{where}{message}")

    def _places(self) -> dict[str, str]:
        """Return the paths of all settings by their last keys; of equal ones, the highest."""
        found: dict[str, str] = {}
        level = [("", self.sections, self.values)]
        while level:
            below = []
            for path, kind, value in level:
                for name, part in (keys_of(kind, value) or {}).items():
                    if name not in OF_CLASS:
                        found.setdefault(name, f"{path}{name}")
                        below.append((f"{path}{name}.", part, _child(value, name)))
            level = below
        return found

    # Files

    def _check_node(self, node: yaml.Node, kind: Any, path: str) -> None:
        """Check a part of a file.

        Args:
            node: the part.
            kind: its type, or its keys.
            path: path of its key, with a dot at its end; empty at the top.
        """
        if isinstance(node, yaml.SequenceNode):
            for i, child in enumerate(node.value):
                self._check_node(child, element(kind), f"{path}{i}.")
        if not isinstance(node, yaml.MappingNode):
            if path:
                self._check_value(path[:-1], kind, _construct(node), node)
            return
        value = {key.value: child.value for key, child in node.value if isinstance(child, yaml.ScalarNode)}
        if isinstance(value.get("class_path"), str):
            line = next(child for key, child in node.value if key.value == "class_path")
            self._check_import(f"{path}class_path", value["class_path"], line)
        keys = keys_of(kind, value)
        named = isinstance(self.values.get(path[:-1]), dict)  # by a file before this one
        if path in ("model.", "data.") and "class_path" not in value and not named:
            raise self._error(f"{path}class_path is missing: name a class, such as {EXAMPLES[path[:-1]]}", node)
        for key, child in node.value:
            name = key.value
            if not isinstance(name, str) or name == "<<":
                continue
            if keys is not None and name not in keys:
                hint = _unknown(name, path, keys, self._places() if not path else {})
                raise self._error(f"unknown key {path}{name}: {hint}", key)
            self._check_node(child, Any if keys is None else keys[name], f"{path}{name}.")

    def _check_value(self, path: str, kind: Any, value: Any, node: yaml.Node | None = None) -> None:
        """Refuse a value that does not fit, and a class that does not exist."""
        name = path if node is not None else f"--{path}"
        if path.endswith(".init_args") and node is not None:
            raise self._error(f"{path} must be keys with their values, found {quoted(str(value))}", node)
        if path in EXAMPLES and not isinstance(value, str | dict | None):
            example = f"class_path: {EXAMPLES[path]}"
            raise self._error(f"{name} must name a class, such as {example}, found {quoted(str(value))}", node)
        if isinstance(kind, dict) or kind is Any:
            return
        if not fits(value, kind):
            raise self._error(must_be(name, kind, value), node)
        if isinstance(value, str) and _takes_class(kind) and not Path(value).is_file():
            self._check_import(name, value, node)

    def _check_import(self, name: str, path: str, node: yaml.Node | None = None) -> None:
        """Refuse the import path of a class that does not exist."""
        if "." not in path:
            known = public_names(OWN[0])
            hint = did_you_mean(path, known, "")
            if path not in known and hint and not _is_loaded(path):
                raise self._error(f"{name} {path!r} is unknown: {hint}", node)
            return
        if problem := _import(path)[1]:
            raise self._error(f"{name} {path} cannot be imported: {_similar_class(path) or problem}", node)

    # Options

    def _check_option(self, name: str, value: str | None) -> list[str]:
        """Return the words of an option, checked and spelled as jsonargparse reads them."""
        words = [name] if value is None else [f"{name}={value}"] if name.startswith("--") else [name, value]
        name, plus = name.removeprefix("--").removesuffix("+"), name.endswith("+")
        if name in ("-c", "-h") or name.rpartition(".")[2].replace("-", "_") in PASSED:
            return [words[0].replace("print-config", "print_config"), *words[1:]]
        keys, kind, dict_at = self._resolve(name)
        key = ".".join(keys)
        if value is None:
            raise UsageError(f"--{key} needs a value: write --{key} VALUE, or --{key}=VALUE if it begins with a dash")
        loaded = _load(value, kind)
        if isinstance(loaded, (list, dict)):
            self._check_node(yaml.compose(value, yaml.SafeLoader), kind, f"{key}.")
        if not plus or isinstance(loaded, str):  # other items of a list are not values of the setting
            self._check_value(key, kind, loaded)
        if plus:
            return [f"--{key}+={value}"]
        if keys[-1] == "class_path" and isinstance(loaded, str):
            self._check_import(f"--{key}", loaded)
        self._set(keys, loaded, kind)
        if dict_at is None:
            return [f"--{key}={value}"]
        whole = yaml.safe_dump(self._get(keys[:dict_at]), default_flow_style=True, sort_keys=False, width=sys.maxsize)
        return [f"--{'.'.join(keys[:dict_at])}={whole.strip()}"]

    def _resolve(self, name: str) -> tuple[list[str], Any, int | None]:
        """Return the keys of a dotted name, the type of the setting, and the number of keys above a dict, if any.

        Raises:
            UsageError: If a key is unknown.
        """
        kind: Any = self.sections
        value: Any = self.values
        path: list[str] = []
        dict_at = None
        for part in name.split("."):
            keys = keys_of(kind, value)
            if keys is None:
                # A class with **kwargs has parameters that are not known here, whose names have no dashes.
                path.append(part if _class_path(kind, value) is None else part.replace("-", "_"))
                kind, value = Any, None
                continue
            if isinstance(keys, _AnyKey) and dict_at is None:
                dict_at = len(path)
            spelled = part if part in keys else part.replace("-", "_")
            if spelled not in keys:
                above = "".join(f"{one}." for one in path)
                known = {**keys, **dict.fromkeys(PASSED)} if not path else keys
                hint = _unknown(part, above, known, self._places() if not path else {})
                raise UsageError(f"unknown option --{above}{part}: {hint}")
            value = _child(value, spelled)
            kind = keys[spelled]
            path.append(spelled)
        return path, kind, dict_at

    def _get(self, keys: Sequence[str]) -> Any:
        value: Any = self.values
        for key in keys:
            value = _child(value, key)
        return value

    def _set(self, keys: Sequence[str], value: Any, kind: Any) -> None:
        """Set a value, and keep its siblings."""
        place = self.values
        for key in keys[:-1]:
            place = _arguments(place, key)
            below = place.get(key)
            if isinstance(below, str):
                below = {"class_path": below}
            place[key] = below if isinstance(below, dict) else {}
            place = place[key]
        place = _arguments(place, keys[-1])
        old = place.get(keys[-1])
        if isinstance(value, str) and isinstance(old, dict) and _class_path(kind, value):
            old["class_path"] = value
        else:
            place[keys[-1]] = value


def _arguments(place: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the dict that holds a key: the arguments of a class, whose `init_args` options leave out."""
    if "class_path" in place and key not in OF_CLASS:
        return place.setdefault("init_args", {})
    return place


def _child(value: Any, key: str) -> Any:
    return _arguments(value, key).get(key) if isinstance(value, dict) else None


def _load(text: str, kind: Any) -> Any:
    """Return the value of an option: YAML, or a text where a text fits and the YAML is a number or a date."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    return text if str in members(kind) and not isinstance(value, (list, dict, bool, type(None))) else value


def _construct(node: yaml.Node) -> Any:
    """Return the value of a part of a file."""
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Add the values of another file to those of the files before it."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def public_names(module: str) -> list[str]:
    """Return the public names of a module, which is imported."""
    found = import_module(module)
    return getattr(found, "__all__", [name for name in dir(found) if not name.startswith("_")])


def _is_loaded(name: str) -> bool:
    """Return whether a class with this name is loaded: jsonargparse takes it by its name alone."""
    left: list[type] = [object]
    seen: set[type] = set()
    while left:
        one = left.pop()
        if one.__name__ == name:
            return True
        seen.add(one)
        left += [below for below in type.__subclasses__(one) if below not in seen]
    return False


def _similar_class(path: str) -> str:
    """Return a suggestion of an import path that exists; empty if none is similar."""
    module, _, name = path.rpartition(".")
    known = [f"{one}.{found}" for one in OWN for found in public_names(one)]
    same = [one for one in known if one.rpartition(".")[2] == name]
    if same:
        return f"did you mean {same[0]}?"
    try:
        names = public_names(module)
    except ImportError:
        return did_you_mean(path, known, "")
    hint = did_you_mean(name, names, "")
    return re.sub(r"(?<=mean )(.*)(?=\?)", lambda found: re.sub(r"\w+(?= or |$)", rf"{module}.\g<0>", found[0]), hint)
