"""The limit on open files, which an error of any library may come from."""

import errno
import os
import resource

_TEXTS = (os.strerror(errno.EMFILE), os.strerror(errno.ENFILE), "items of ancdata")  # the last one is multiprocessing's


def hits_file_limit(error: object) -> bool:
    """Return whether an error says that too many files are open; libraries wrap it in errors of many kinds."""
    return any(text in str(error) for text in _TEXTS)


def file_limit() -> str:
    """Return the limit on open files and the way to raise it, for messages."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = max(4096, 4 * soft)
    way_out = (
        f"raise it with `ulimit -n {enough}`"
        if enough <= hard or hard == resource.RLIM_INFINITY
        else (f"raise it with `ulimit -n {hard}`" if soft < hard else "let the administrator raise it")
    )
    return f"the limit of open files is {soft:,} (ulimit -n): {way_out}, or use fewer workers"
