"""Bodies of requests: strict JSON, and fields with their types and limits."""

import base64
import binascii
import json
import re
from collections.abc import Sequence
from typing import Any

from dualenc.search.service.refusals import Refusal
from dualenc.utils.arguments import shown_value, strings
from dualenc.utils.text import did_you_mean, plural, quoted

MAX_VALUES = 1_000_000  # values of a body; each takes memory many times its bytes
MAX_CHARACTERS = 100_000  # characters of a text; a model reads far fewer
PICTURE = "data:image/"  # the beginning of a picture in a data URI
_HEADER = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64", re.ASCII)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse the body of a request.

    Raises:
        Refusal: If it is not an object of JSON in UTF-8: broken, too deep, with NaN, or with a key that stands twice.
    """
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
        raise Refusal(413, f"the body has more than {plural(MAX_VALUES, 'value')}: send several requests")
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refusal(400, "the body must be an object of JSON, such as {}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, whose keys must differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {quoted(next(one for one in names if names.count(one) > 1))} stands twice")
    return found


def _no_constant(name: str) -> float:
    """Refuse NaN and infinities, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is not a number")


class Fields:
    """Fields of the body of a request, which are read by name and type.

    Args:
        body: the parsed body.
        known: names of all fields of the request.

    Raises:
        Refusal: If the body has another field.
    """

    def __init__(self, body: dict[str, Any], known: Sequence[str]) -> None:
        for name in body:
            if name not in known:
                raise Refusal(400, f"unknown field {quoted(name)}: {did_you_mean(name, known)}")
        self.body = body

    def __contains__(self, name: str) -> bool:
        return self.body.get(name) is not None

    def texts(self, name: str, most: int, *, one: bool = False) -> list[str]:
        """Return a list of texts, which is empty where the field is missing or null.

        Args:
            name: name of the field.
            most: largest number of texts.
            one: whether a single string stands for itself.

        Raises:
            Refusal: If it is something else, a text is blank or too long, or there are too many.
        """
        given = self.body.get(name)
        if given is None:
            return []
        if not isinstance(given, list) and not (one and isinstance(given, str)):
            raise Refusal(400, f"{name} is {_shown(given)}: send {'a string or ' if one else ''}a list of strings")
        try:
            found = strings(given, name, one=one)
        except ValueError as error:
            raise Refusal(400, error) from None
        if len(found) > most:
            raise Refusal(400, f"{name} has {len(found):,} items: send at most {most:,} at once")
        for i, text in enumerate(found):
            if not text.strip():
                raise Refusal(400, f"{name} must have texts, but number {i} (from 0) is empty")
            if len(text) > MAX_CHARACTERS and not text.startswith(PICTURE):
                raise Refusal(400, f"{name}: number {i} (from 0) is longer than {MAX_CHARACTERS:,} characters")
        return found

    def whole(self, name: str, low: int, high: int, default: int) -> int:
        """Return a whole number from `low` to `high`, or the default where the field is missing or null.

        Raises:
            Refusal: If it is something else.
        """
        given = self.body.get(name)
        if given is None:
            return default
        if not isinstance(given, int) or isinstance(given, bool) or not low <= given <= high:
            raise Refusal(400, f"{name} is {_shown(given)}: it must be a whole number from {low:,} to {high:,}")
        return given

    def real(self, name: str, low: float, high: float) -> float | None:
        """Return a number from `low` to `high`, or None where the field is missing or null.

        Raises:
            Refusal: If it is something else.
        """
        given = self.body.get(name)
        if given is None:
            return None
        number = isinstance(given, int | float) and not isinstance(given, bool)
        if not number or not low <= given <= high:  # NaN is not
            raise Refusal(400, f"{name} is {_shown(given)}: it must be a number from {low:g} to {high:g}")
        return float(given)

    def rows(self, name: str, count: int, most: int) -> list[int]:
        """Return rows of an index, a list that is empty where the field is missing or null.

        Args:
            name: name of the field.
            count: number of rows of the index.
            most: largest number of rows in the list.

        Raises:
            Refusal: If it is something else, or the index does not have a row.
        """
        given = self.body.get(name)
        if given is None:
            return []
        if not isinstance(given, list) or any(not isinstance(row, int) or isinstance(row, bool) for row in given):
            raise Refusal(400, f"{name} must be a list of whole numbers")
        if len(given) > most:
            raise Refusal(400, f"{name} has {len(given):,} items: send at most {most:,} at once")
        for row in given:
            if not 0 <= row < count:
                raise Refusal(400, f"{name} has {_shown(row)}: the index has the rows 0 to {count - 1:,}")
        return given

    def string(self, name: str, choices: Sequence[str] = ()) -> str | None:
        """Return a string, or None where the field is missing or null.

        Args:
            name: name of the field.
            choices: the strings that are allowed; empty for all of up to 1,000 characters.

        Raises:
            Refusal: If it is something else.
        """
        given = self.body.get(name)
        if given is None:
            return None
        if not isinstance(given, str):
            raise Refusal(400, f"{name} is {_shown(given)}: send a string")
        if choices and given not in choices:
            raise Refusal(400, f"{name} is {quoted(given)}: choose one of {', '.join(choices)}")
        if len(given) > 1000:
            raise Refusal(400, f"{name} is longer than 1,000 characters")
        return given


def _shown(value: Any) -> str:
    """Return a value for a message; a long number would fill it."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return "a number of 19 digits or more"
    return shown_value(value)


def picture_bytes(uri: str) -> bytes:
    """Return the file in a data URI.

    Its media type is not relied on: the decoder looks at the file itself.

    Raises:
        Refusal: If it is something else; a URL is not fetched.
    """
    header, comma, content = uri.partition(",")
    if not comma or not _HEADER.fullmatch(header):
        raise Refusal(
            400, f"{quoted(header, 60)} is not a picture: send it as data:image/png;base64,... (no URL is read)"
        )
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"the data URI of a picture is not base64 ({error})") from None
    if not data:
        raise Refusal(400, "the data URI of a picture is empty")
    return data
