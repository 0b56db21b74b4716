"""URLs: what of them is a path, and what is a secret."""

import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, unquote

PROTOCOLS = {"https": "http", "http": "http", "s3": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
# User and password end at the last @ before the path. A password with a slash makes no URL, but is a secret all the
# same: a colon gives it away, unless a port follows.
_USER = r"(?:[^\s/]*@|[^\s/:]*:(?!\d+(?:[/\s]|$))[^\s@]*@)?"
_PAIR = r"\?(?=[\w.%-]+=)"  # where names may hold a ?, a query is what looks like one
_GO_ON = r"""(?!["'](?:[\s,\]}):;]|$)|[\])},.:;]+(?:\s|$))"""  # no end of a URL in a text
_URL = re.compile(
    rf"\b(https?://){_USER}((?:{_GO_ON}[^\s?#])*)(?:[?#](?:{_GO_ON}\S)*)?"
    rf"|\b([a-z][a-z0-9+.-]{{0,20}}://){_USER}",
    re.IGNORECASE,
)
_STRAY = re.compile(rf"{_PAIR}(?:{_GO_ON}\S)*")  # a query of another store, or of a URL with a space in it


def is_remote(path: str) -> bool:
    """Whether this is a URL and no local path."""
    return "://" in path


def shown(url: str) -> str:
    """A URL without user, password, query and fragment; local paths as they are."""
    if not is_remote(url):
        return url
    scheme, _, rest = _without_query(url).partition("://")
    return f"{scheme}://{rest[_user(rest) :]}"


def folder_of(path: str) -> str:
    """The folder of a path or URL; that of a URL keeps user and password, and has no query."""
    return os.path.dirname(_without_query(path) if is_remote(path) else path)


def join(folder: str, name: str) -> str:
    """The path or URL of a file in a folder; that of a URL keeps user, password and query."""
    if not is_remote(folder):
        return os.path.join(folder, name)
    bare = _without_query(folder)
    return f"{bare.rstrip('/')}/{name}{folder[len(bare) :]}"


def _without_query(url: str) -> str:
    scheme, _, rest = url.partition("://")
    start = _user(rest)  # what looks like a query in it is none
    query = re.search(r"[?#]" if PROTOCOLS.get(scheme.lower()) == "http" else _PAIR, rest[start:])
    return f"{scheme}://{rest[: start + query.start()] if query else rest}"


def _user(rest: str) -> int:
    """The length of user, password and @ at the beginning of a URL after its scheme, whatever letters they have."""
    found = re.match(_USER.replace(r"\s", ""), rest)
    return found.end() if found else 0


def redact(text: str) -> str:
    """A text without the secrets of the URLs in it."""
    return _STRAY.sub("", _URL.sub(lambda found: f"{found[1]}{found[2]}" if found[1] else found[3], text))


def redact_url(url: str, text: str) -> str:
    """A text about one URL without its secrets, however they came in."""
    rest = url.partition("://")[2]
    user = rest[: _user(rest)].removesuffix("@")
    query = url.removeprefix(_without_query(url)).lstrip("?#")
    secrets = {user, *user.split(":"), query}
    secrets |= {value for _, value in parse_qsl(query)} | set(re.findall("=([^&]*)", query))
    for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
        if len(secret) > 2:
            text = text.replace(secret, "...")
    return redact(text)


def cache_folder() -> Path:
    """Where indexes and fetched shards are kept: DUALENC_CACHE, or else ~/.cache/dualenc."""
    if own := os.environ.get("DUALENC_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualenc"
