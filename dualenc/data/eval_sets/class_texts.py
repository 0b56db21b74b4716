"""Class names and templates: the texts by which zero-shot classification knows the classes of a set."""

import json
import os
from collections import Counter
from pathlib import PurePath
from typing import Any, NamedTuple

from dualenc.data.eval_sets.base import Problems, SetOptions, read_text
from dualenc.data.eval_sets.known_sets import short_name
from dualenc.data.prepare.caption_sources import TEMPLATES
from dualenc.utils.decoding import is_blank, lines_of, text_problem
from dualenc.utils.errors import DataError
from dualenc.utils.text import did_you_mean, plural, printable, quoted
from dualenc.utils.urls import join, shown

CLASSNAMES, TEMPLATE_FILE = "classnames.txt", "zeroshot_classification_templates.txt"
NAMED = OPENAI, SIMPLE = "openai", "simple"  # templates of CLIP's paper, which the open_clip library has


class ClassTexts(NamedTuple):
    """Class names and templates of a set, and where they are from."""

    classnames: list[str] | None  # None if nothing names the classes
    templates: list[str]
    prompts: str  # which templates these are, for display
    has_own: bool  # if the set has templates, or the user names some: they are not the usual one


def class_texts(folder: str, options: SetOptions, problems: Problems, name: str) -> ClassTexts:
    """Read the class names and templates that the user names, or else those of the set.

    Args:
        folder: folder or URL of the set's own files.
        options: names of the user's files.
        problems: problems of the set, which are added to.
        name: name of the set, for files that hold the texts of several sets.

    Raises:
        DataError: If a file is missing, empty or wrong.
    """
    if options.classnames is None:
        classnames = read_lines(join(folder, CLASSNAMES))
    else:
        classnames = _read_entries(options.classnames, "classnames", name)
    if classnames is not None:
        note_duplicates(classnames, problems)
    if options.templates is not None:
        templates = _templates_of(options.templates, name)
        where = options.templates if options.templates in NAMED else shown(options.templates)
    else:
        own = read_templates(join(folder, TEMPLATE_FILE), problems)
        templates, where = own or list(TEMPLATES), "the set"
        if own is None:
            return ClassTexts(classnames, templates, TEMPLATES[0], False)
    prompts = templates[0] if len(templates) == 1 else f"{plural(len(templates), 'template')} of {where}"
    return ClassTexts(classnames, templates, printable(prompts), True)


def check_count(classnames: list[str], count: int, options: SetOptions, where: str) -> None:
    """Refuse class names of another number than a set has classes.

    Args:
        classnames: the names.
        count: number of classes.
        options: options that may name the file of the names.
        where: the set's classes, for the message, such as "set/classnames.txt".

    Raises:
        DataError: If the numbers differ.
    """
    if len(classnames) != count and options.classnames is not None:
        raise DataError(
            f"classnames {shown(options.classnames)} has {plural(len(classnames), 'class name')}, but {where} has "
            f"{plural(count, 'class').replace('classs', 'classes')}: it needs one for each, in order"
        )


def note_duplicates(names: list[str], problems: Problems) -> None:
    """Note the names that several classes share: no text distinguishes these classes."""
    for name, count in Counter(names).items():
        if count > 1:
            classes = ", ".join(str(i) for i, other in enumerate(names) if other == name)
            problems["duplicate class name"].append(f"{name!r} (classes {classes})")


def read_templates(path: str, problems: Problems) -> list[str] | None:
    """Read the templates of a set, one on each line; None if the file does not exist. Those without `{c}` are left out.

    Raises:
        DataError: If the file is empty, a line is blank, or no template has `{c}`.
    """
    templates = read_lines(path)
    if templates is None:
        return None
    for number, template in enumerate(templates, 1):
        if "{c}" not in template:
            problems["template without {c}"].append(f"{shown(path)} line {number}: {template!r}")
    usable = [template for template in templates if "{c}" in template]
    if not usable:
        raise DataError(f"{shown(path)}: {templates[0]!r} has no {{c}} for the class name, and no other line has one")
    return usable


def read_lines(path: str) -> list[str] | None:
    """Read the lines of a file, which are names by number or templates; None if the file does not exist.

    Raises:
        DataError: If the file is empty, or a line is blank.
    """
    text = read_text(path)
    if text is None:
        return None
    if is_blank(text):
        raise DataError(f"{shown(path)} is empty: write one entry on each line, or remove the file")
    lines = lines_of(text)
    while is_blank(lines[-1]):
        lines.pop()
    if blank := [number for number, line in enumerate(lines, 1) if is_blank(line)]:
        raise DataError(f"{shown(path)}: line {blank[0]} is blank, which would shift the lines after it: remove it")
    return lines


def _templates_of(option: str, name: str) -> list[str]:
    """Return the templates of a name or file of the user, who is told of each one that is wrong."""
    if option in NAMED:
        from open_clip import zero_shot_metadata

        functions = getattr(zero_shot_metadata, f"{option.upper()}_IMAGENET_TEMPLATES")
        return [function("{c}") for function in functions]
    templates = _read_entries(option, "templates", name)
    for number, template in enumerate(templates, 1):
        if "{c}" not in template:
            raise DataError(
                f"templates {shown(option)}: entry {number}, {quoted(template)}, has no {{c}}, which stands for the "
                "class name"
            )
    return templates


def _read_entries(path: str, option: str, name: str) -> list[str]:
    """Read a file that the user names: one entry on each line, or a JSON, of this set alone or by names of sets."""
    if os.path.isdir(path):
        raise DataError(f"{option} {path} is a folder: name a file with one entry on each line")
    text = read_text(path)
    if text is None:
        names = f", and is neither {OPENAI!r} nor {SIMPLE!r}" if option == "templates" else ""
        raise DataError(f"{option} {shown(path)} does not exist{names}")
    if PurePath(shown(path)).suffix.lower() != ".json":
        return read_lines(path) or []
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{option} {shown(path)} cannot be read as JSON ({error})") from None
    entries = _of_set(content, name, f"{option} {shown(path)}") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries or any(map(text_problem, entries)):
        raise DataError(
            f"{option} {shown(path)} must hold a list of texts, or such a list for each set by its name, as "
            "CLIP_benchmark's files do"
        )
    return entries


def _of_set(content: dict[str, Any], name: str, where: str) -> Any:
    """Return the entries of a set in a JSON by names of sets; the only ones if there are no others."""
    short = short_name(name)
    if len(content) == 1 or short in content or name in content:
        return content.get(name, content.get(short, next(iter(content.values()))))
    some = ", ".join(map(quoted, list(content)[:5])) + (", ..." if len(content) > 5 else "")
    hint = did_you_mean(short, map(printable, content), f"it has {some}")
    raise DataError(f"{where} has no entry {short!r}, the name of the set: {hint}")
