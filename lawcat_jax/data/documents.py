"""What text sources hold: documents, and rows with all of their fields.

A source is a path, directory or glob of .txt, .md, .jsonl and .parquet files, or a data set of a hub (``hf:``, ``tfds:``).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lawcat_jax.data.source_files import is_remote, local_files
from lawcat_jax.errors import UserError
from lawcat_jax.files import object_of
from lawcat_jax.runtime import network

_BOM = "\ufeff"
_OTHER_UNICODE = {  # by the mark that their files begin with
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_SURROGATE = re.compile("[\ud800-\udfff]")


def documents(source: str, text_key: str = "text") -> Iterator[str]:
    """Documents of a source in a fixed order: a .txt or .md file is one document, a row or line of the others is one.

    A byte order mark at the beginning of a document is left out, and so are documents of white space alone. Line ends stay
    as they are in the file (LF, CR LF or CR), of every kind of file. Bytes of a row that are not UTF-8, and lone surrogates,
    are read as U+FFFD. How many there were of both is printed at the end.

    Raises:
      UserError: naming the source and what is wrong (no match, empty file, missing key, unreadable, offline).
    """
    replaced = empty = 0
    try:
        for document in _documents(source, text_key):
            document, count = mended(document.removeprefix(_BOM))
            replaced += count
            if document.strip():
                yield document
            else:
                empty += 1
    except OSError as problem:
        raise UserError(f"text source {source!r}: cannot be read ({problem.strerror or problem})") from problem
    finally:
        _say_replaced(replaced, source)
        if empty:
            count = "1 document is" if empty == 1 else f"{empty} documents are"
            print(f"text source {source!r}: {count} empty and left out", flush=True)


def mended(text: str) -> tuple[str, int]:
    """Text without lone surrogates, which no tokenizer takes: each is U+FFFD; and how many there were."""
    return _SURROGATE.subn("\ufffd", text)


def _say_replaced(count: int, source: str) -> None:
    if count:
        print(f"text source {source!r}: {count} bytes or characters that are no Unicode are read as U+FFFD", flush=True)


def _documents(source: str, text_key: str) -> Iterator[str]:
    if source.startswith("tfds:"):
        yield from _tfds_documents(source, text_key)
    elif source.startswith("hf:"):
        yield from _hf_documents(source, text_key)
    else:
        for file in local_files(source):
            if file.stat().st_size == 0:
                raise UserError(f"text source {str(file)!r}: the file is empty")
            yield from _READERS[file.suffix.lower()](file, text_key)


def _refuse_other_unicode(file: Path, start: bytes) -> None:
    """Refuse a file that begins with ``start`` where it is UTF-16 or UTF-32, of which half and more of a text is NUL."""
    found = [name for name, marks in _OTHER_UNICODE.items() if start.startswith(marks)]
    if not found and start.count(0) * 4 > len(start):
        found = ["UTF-16, or no text"]
    if found:
        raise UserError(f"text source {str(file)!r}: it is {found[0]}; save it as UTF-8")


def _txt_documents(file: Path, text_key: str) -> Iterator[str]:
    with file.open("rb") as stream:
        _refuse_other_unicode(file, stream.read(1024))
    try:
        yield file.read_bytes().decode()  # read_text() would make \n of other line ends
    except UnicodeDecodeError as problem:
        raise UserError(f"text source {str(file)!r}: not UTF-8 at byte {problem.start}") from problem


def _jsonl_documents(file: Path, text_key: str) -> Iterator[str]:
    for where, row in _jsonl_rows(file):
        yield _field(row, text_key, where)


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                _refuse_other_unicode(file, line)
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:  # bytes that are not UTF-8 become surrogates, which are counted and replaced later
                row = json.loads(line.decode("utf-8", "surrogateescape"), object_pairs_hook=object_of)
            except ValueError as problem:
                raise UserError(f"text source {str(file)!r}, line {number}: not JSON ({problem})") from problem
            except RecursionError:
                raise UserError(f"text source {str(file)!r}, line {number}: JSON nested too deeply") from None
            yield f"{str(file)!r}, line {number}", row


def _parquet_documents(file: Path, text_key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as problem:
        raise UserError(f"text source {str(file)!r}: not a readable parquet file ({_first_line(problem)})") from problem
    with table:
        if text_key not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise UserError(f"text source {str(file)!r}: no column {text_key!r} (text_key); it has {names}")
        row = 0
        try:
            for batch in table.iter_batches(batch_size=256, columns=[text_key]):
                column = batch.column(0)
                if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                    column = column.cast(pyarrow.large_binary())  # decoded below: its bytes need not be UTF-8
                for value in column.to_pylist():
                    yield _text(value, text_key, f"{str(file)!r}, row {row}")
                    row += 1
        except (pyarrow.ArrowException, OSError) as problem:
            reason = _first_line(problem)
            raise UserError(f"text source {str(file)!r}: damaged after row {row} ({reason})") from problem


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _txt_documents,
    ".md": _txt_documents,
    ".jsonl": _jsonl_documents,
    ".parquet": _parquet_documents,
}


def _tfds_documents(source: str, text_key: str) -> Iterator[str]:
    import tensorflow_datasets as tfds

    name, split = _split_of(source.removeprefix("tfds:"))
    try:
        if Path(name).expanduser().is_dir():
            builder: Any = tfds.builder_from_directory(str(Path(name).expanduser()))  # its decorators hide signatures
            rows: Any = builder.as_data_source(split)
        else:
            online = network.answers("https://storage.googleapis.com")
            core: Any = tfds.core
            core.utils.gcs_utils._is_gcs_disabled = not online  # it would try for minutes
            rows = tfds.data_source(name, split=split, download=online)
    except (Exception, SystemExit) as problem:  # tfds raises many types: unknown name, split, file format, no network
        raise UserError(f"text source {source!r} cannot be opened: {_first_line(problem)}") from problem
    for index in range(len(rows)):
        yield _field(rows[index], text_key, f"{source!r}, row {index}")


def _hf_documents(source: str, text_key: str) -> Iterator[str]:
    for where, row in _hf_rows(source):
        yield _field(row, text_key, where)


def _hf_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, *options = source.removeprefix("hf:").split(":")
    if not name or len(options) > 2:
        raise UserError(f"text source {source!r}: expected hf:<name>[:config][:split]")
    config = options[0] if len(options) == 2 else None
    split = options[-1] if options else "train"
    network.hub_or_offline()
    try:
        # streamed: only the shards that are needed get downloaded
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as problem:  # hub, network and parsing errors of many types
        raise UserError(f"text source {source!r} cannot be opened: {_first_line(problem)}") from problem
    iterator = enumerate(rows)
    while True:
        try:
            index, row = next(iterator)
        except StopIteration:
            return
        except Exception as problem:
            raise UserError(f"text source {source!r} broke off while reading: {_first_line(problem)}") from problem
        yield f"{source!r}, row {index}", row


def rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every row of .jsonl or .parquet files, or of a hub dataset (``hf:``), with all fields.

    Raises:
      UserError: for other sources, and for rows that are not objects.
    """
    if source.startswith("hf:"):
        found = _hf_rows(source)
    elif is_remote(source):
        raise UserError(f"source {source!r}: rows of several fields come from .jsonl or .parquet files or hf:...")
    else:
        found = (pair for file in local_files(source) for pair in _file_rows(file))
    replaced = 0

    def sound(value: Any) -> Any:
        nonlocal replaced
        if isinstance(value, str):
            value, count = mended(value)
            replaced += count
        elif isinstance(value, list):
            value = [sound(item) for item in value]
        elif isinstance(value, dict):
            value = {key: sound(item) for key, item in value.items()}
        return value

    try:
        for where, row in found:
            if not isinstance(row, dict):
                raise UserError(f"source {where}: a {type(row).__name__}, not an object with fields")
            yield where, sound(row)
    except OSError as problem:
        raise UserError(f"source {source!r}: cannot be read ({problem.strerror or problem})") from problem
    finally:
        _say_replaced(replaced, source)


def _file_rows(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix.lower() == ".jsonl":
        yield from _jsonl_rows(file)
        return
    if file.suffix.lower() != ".parquet":
        raise UserError(f"source {str(file)!r}: rows of several fields come from .jsonl or .parquet files")
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as problem:  # ValueError: bytes that are not UTF-8
        raise UserError(f"source {str(file)!r}: not a readable parquet file ({_first_line(problem)})") from problem
    for number, row in enumerate(found):
        yield f"{str(file)!r}, row {number}", row


def _split_of(name: str) -> tuple[str, str]:
    name, _, split = name.partition(":")
    return name, split or "train"


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).split("\n")[0]


def _field(row: object, key: str, where: str) -> str:
    if not isinstance(row, dict) or key not in row:
        has = f"it has {', '.join(map(str, row))}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise UserError(f"text source {where}: no field {key!r} (text_key); {has}")
    return _text(row[key], key, where)


def _text(value: object, key: str, where: str) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="surrogateescape")
    if not isinstance(value, str):
        raise UserError(f"text source {where}: field {key!r} holds a {type(value).__name__}, not text")
    return value
