"""Images of a source of captions: in files of a folder, in a column of tables, or in shards."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dualenc.data.images import ImageError
from dualenc.data.shards.index import ShardIndex
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.limits import hits_file_limit

NO_PICTURE = "no image in its row"
# First bytes of a file -> extension of the image.
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}
ROWS_AT_ONCE = 64  # rows of a table whose images are held in memory


class PictureRef(NamedTuple):
    """An image that is not a file of its own."""

    number: int  # of its row, in all tables or shards
    name: str | None  # name of the file that it was made of, if known


def image_kind(data: bytes) -> str | None:
    """Return the extension of an image by its first bytes; None for other files."""
    kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    return None if kind == "webp" and data[8:12] != b"WEBP" else kind


class Pictures:
    """The images of a source, by the names and numbers of its items.

    Attributes:
        where: place of the images, with the way out if they are not there.
        content: facts that change if the images do, as JSON; empty for files, which are not read to know them.
    """

    where: str
    content: list[Any] = []

    @contextmanager
    def opened(self, folder: Path) -> Iterator[None]:
        """Make `read` possible inside of the block; temporary files are written into the folder."""
        yield

    def read(self, name: str, number: int) -> bytes:
        """Read the bytes of an image.

        Raises:
            ImageError: If the image is missing.
        """
        raise NotImplementedError


class PictureFiles(Pictures):
    """Images in the files of a folder, which no name may lead out of."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.where = f"the images were searched in {folder}: name another folder with --images"

    def read(self, name: str, number: int) -> bytes:
        """See `Pictures.read`."""
        path = path_inside(self.folder, name)
        if path is None:
            raise ImageError("a URL, not a file" if "://" in name else "outside of the image folder")
        if not os.path.isfile(path):  # opening a pipe or a device could block
            raise ImageError("not a regular file" if os.path.exists(path) else "image missing")
        try:
            with open(path, "rb") as file:
                head = file.read(1024)
                return head + file.read() if image_kind(head) else head  # other files may be very large
        except OSError as error:
            if hits_file_limit(error):  # the fault of the machine, not of the file
                raise
            raise ImageError(f"image cannot be read ({error.strerror})") from None


class ShardPictures(Pictures):
    """Images in shards, read by position."""

    def __init__(self, index: ShardIndex) -> None:
        self.index, self.content = index, [index.fingerprint]
        self.where = f"the images are in {', '.join(index.shards[:3])}{', ...' if len(index.shards) > 3 else ''}"

    def read(self, name: str, number: int) -> bytes:
        """See `Pictures.read`."""
        sample = self.index[number]
        try:
            return sample.read(sample.image or "")
        except BadSample as error:
            raise ImageError(error.cause) from None


class TablePictures(Pictures):
    """Images in a column of Parquet tables.

    A row cannot be read without the rows around it, and items are read in random order. So the images are copied to
    a temporary file first, from which they are read by position.

    Args:
        tables: paths of the tables.
        column: path of the column of bytes, such as "image.bytes".
    """

    def __init__(self, tables: Sequence[Path], column: str) -> None:
        self.tables, self.column = tables, column
        self.where = f"the images are in the column {column} of {tables[0]}{' and others' if len(tables) > 1 else ''}"
        self.content = [[path.name, path.stat().st_size] for path in tables]
        self._copies = ""  # path of the temporary file
        self._ends = np.zeros(0, np.int64)  # (R,) end of the image of each row in the file

    @contextmanager
    def opened(self, folder: Path) -> Iterator[None]:
        """See `Pictures.opened`."""
        handle, self._copies = tempfile.mkstemp(".part", ".pictures-", folder)
        sizes = []
        try:
            with open(handle, "wb") as file:
                for data in self._rows():
                    sizes.append(len(data or b""))
                    file.write(data or b"")
            self._ends = np.cumsum(sizes, dtype=np.int64)
            yield
        finally:
            os.unlink(self._copies)

    def read(self, name: str, number: int) -> bytes:
        """See `Pictures.read`."""
        start, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        if start == end:
            raise ImageError(NO_PICTURE)
        with open(self._copies, "rb") as file:
            return os.pread(file.fileno(), end - start, start)

    def _rows(self) -> Iterator[bytes | None]:
        """Yield the bytes of all rows, None where a row has no image."""
        for table in self.tables:
            for batch in parquet_batches(table, [self.column], ROWS_AT_ONCE):
                column = batch.column(0)
                yield from (column.field("bytes") if "." in self.column else column).to_pylist()


def picture_columns(tables: Sequence[Path]) -> dict[str, str]:
    """Return the columns of bytes, or of Hugging Face's `{bytes, path}`: name -> path of the bytes, as "image.bytes".

    Raises:
        DataError: If a table cannot be read, or the tables have different columns.
    """
    found: dict[str, str] = {}
    first: list[str] = []
    for table in tables:
        schema = _parquet_file(table).schema_arrow
        kinds = {field.name: str(field.type) for field in schema}
        paths = {
            name: f"{name}.bytes" if kind.startswith("struct<") else name
            for name, kind in kinds.items()
            if kind.startswith(("binary", "large_binary"))
            or (kind.startswith("struct<") and str(_field(schema.field(name).type, "bytes")).endswith("binary"))
        }
        if table == tables[0]:
            found, first = paths, sorted(kinds)
        elif paths != found or sorted(kinds) != first:
            raise DataError(f"{table} has other columns than {tables[0]}: name only tables of the same columns")
    return found


def _field(struct: Any, name: str) -> Any:
    """Return the type of a field of a struct, or None."""
    return next((struct.field(i).type for i in range(struct.num_fields) if struct.field(i).name == name), None)


def parquet_rows(tables: Sequence[Path], pictures: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location and the fields of each row of Parquet tables, with a `PictureRef` for each image.

    Args:
        tables: paths of the tables.
        pictures: columns of bytes, see `picture_columns`; only the names of the files in them are read.
    """
    number = 0
    for table in tables:
        schema = _parquet_file(table).schema_arrow
        named = {name for name, path in pictures.items() if path != name and _field(schema.field(name).type, "path")}
        columns = [f"{name}.path" if name in named else name for name in schema.names if name not in pictures]
        columns += [f"{name}.path" for name in named]
        row = 0
        for batch in parquet_batches(table, columns):
            for record in batch.to_pylist():
                for name in pictures:
                    record[name] = PictureRef(number, (record.get(name) or {}).get("path"))
                number, row = number + 1, row + 1
                yield f"{table.name} row {row}" if len(tables) > 1 else f"row {row}", record


def parquet_batches(table: Path, columns: Sequence[str], rows: int = 65536) -> Iterator[Any]:
    """Yield the batches of some columns of a Parquet table.

    Raises:
        DataError: If the table cannot be read.
    """
    from pyarrow import ArrowException

    try:
        yield from _parquet_file(table).iter_batches(rows, columns=columns)
    except (ArrowException, OSError) as error:
        raise _unreadable(table, error) from None


def _parquet_file(table: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{table}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        return ParquetFile(table)
    except (ArrowException, OSError) as error:
        raise _unreadable(table, error) from None


def _unreadable(table: Path, error: Exception) -> DataError:
    return DataError(f"{table} cannot be read as Parquet ({error})")


def path_inside(folder: str, name: str) -> str | None:
    """Return the path of an image, or None if its name leads out of the folder. Symbolic links are followed."""
    path = os.path.normpath(os.path.join(folder, name))
    return path if "\0" not in path and "://" not in name and path.startswith(folder.rstrip("/") + "/") else None
