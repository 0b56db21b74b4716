"""URLs: their folders and files, and the secrets in them that must not be printed or stored."""

import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, unquote

PROTOCOLS = {"https": "http", "http": "http", "s3": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
# User and password end at the last @ before the path. A password with a slash makes the URL invalid, but is a secret
# too: it is recognized by the colon before it, except if a port follows the colon.
_USER = r"(?:[^\s/]*@|[^\s/:]*:(?!\d+(?:[/\s]|$))[^\s@]*@)?"
_QUERY = r"\?(?=[\w.%-]+=)"  # in stores whose file names may have a ?, a query needs a key and a =
_NOT_END = r"""(?!["'](?:[\s,\]}):;]|$)|[\])},.:;]+(?:\s|$))"""  # no quote or punctuation that ends a URL in a text
_URL = re.compile(
    rf"\b(https?://){_USER}((?:{_NOT_END}[^\s?#])*)(?:[?#](?:{_NOT_END}\S)*)?"
    rf"|\b([a-z][a-z0-9+.-]{{0,20}}://){_USER}",
    re.IGNORECASE,
)
_STRAY_QUERY = re.compile(rf"{_QUERY}(?:{_NOT_END}\S)*")  # a query of another store, or of a URL with a space in it


def is_remote(path: str) -> bool:
    """Return whether a path is a URL."""
    return "://" in path


def shown(url: str) -> str:
    """Return a URL without user, password, query and fragment, as printed in messages; or a local path unchanged."""
    if not is_remote(url):
        return url
    scheme, _, rest = _without_query(url).partition("://")
    return f"{scheme}://{rest[_user_length(rest) :]}"


def folder_of(path: str) -> str:
    """Return the folder of a path or URL; the folder of a URL keeps user and password, but not the query."""
    return os.path.dirname(_without_query(path) if is_remote(path) else path)


def join(folder: str, name: str) -> str:
    """Return the path or URL of a file in a folder; a URL keeps user, password and query."""
    if not is_remote(folder):
        return os.path.join(folder, name)
    bare = _without_query(folder)
    return f"{bare.rstrip('/')}/{name}{folder[len(bare) :]}"


def _without_query(url: str) -> str:
    scheme, _, rest = url.partition("://")
    start = _user_length(rest)  # a password may have a ?, which does not begin a query
    query = re.search(r"[?#]" if PROTOCOLS.get(scheme.lower()) == "http" else _QUERY, rest[start:])
    return f"{scheme}://{rest[: start + query.start()] if query else rest}"


def _user_length(rest: str) -> int:
    """Return the length of user, password and @ in a URL without its scheme; they may have any characters."""
    found = re.match(_USER.replace(r"\s", ""), rest)
    return found.end() if found else 0


def redact(text: str) -> str:
    """Remove the secrets of all URLs from a text."""
    return _STRAY_QUERY.sub("", _URL.sub(lambda found: f"{found[1]}{found[2]}" if found[1] else found[3], text))


def redact_url(url: str, text: str) -> str:
    """Remove the secrets of one URL from a text, even where they stand outside of the URL, or decoded."""
    rest = url.partition("://")[2]
    user = rest[: _user_length(rest)].removesuffix("@")
    query = url.removeprefix(_without_query(url)).lstrip("?#")
    secrets = {user, *user.split(":"), query}
    secrets |= {value for _, value in parse_qsl(query)} | set(re.findall("=([^&]*)", query))
    for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
        if len(secret) > 2:
            text = text.replace(secret, "...")
    return redact(text)


def cache_folder() -> Path:
    """Return the folder of cached indexes and remote shards: DUALENC_CACHE, or by default ~/.cache/dualenc."""
    if own := os.environ.get("DUALENC_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualenc"
