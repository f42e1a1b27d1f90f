"""Documents, and the files that they are read from. Nothing is cut, dropped or joined in silence."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

_BUNDLED = "heldout.jsonl"


@dataclass(frozen=True)
class Document:
    """A piece of text: its name (unique in a corpus), what it is about, and whether it is one of the demo's."""

    name: str
    topic: str
    text: str
    demo: bool = False


def bundled_documents(*, demo_only: bool = False) -> list[Document]:
    """The package's held-out documents, which the bundled model was never trained on.

    Args:
        demo_only: the fixed subset that `moe-lens demo` runs.

    Raises:
        FileNotFoundError: the file is not in this installation.
    """
    documents = read_documents(Path(str(files("moe_lens.assets"))) / _BUNDLED)
    return [document for document in documents if document.demo] if demo_only else documents


def read_documents(path: str | Path) -> list[Document]:
    """Documents from JSON lines `{"document": name, "topic": ..., "text": ..., "demo": bool}`; the last is optional.

    This is the format of the bundled documents, every field of it required; `read_jsonl` takes any JSON lines
    with text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no such document, a name that comes twice, or no document at all.
    """
    path = Path(path)
    documents = []
    for number, row in _json_rows(path):
        try:
            name, topic, text, demo = row["document"], row["topic"], row["text"], row.get("demo", False)
        except KeyError as error:
            raise ValueError(
                f"line {number} of {path.name} is no document (an object with document, topic and text): {error!r}"
            ) from error
        if not all(isinstance(value, str) for value in (name, topic, text)) or not isinstance(demo, bool):
            raise ValueError(
                f"line {number} of {path.name}: document, topic and text must be strings, demo a bool"
            )
        documents.append(Document(name, topic, text, demo))
    return list(checked_documents(documents, path.name))


def read_jsonl(path: str | Path, *, text_field: str = "text") -> list[Document]:
    """Documents from any JSON lines whose rows are objects with a text field, in their order.

    A row's `document` is the name where it is a string that no other row has, and `FILE#LINE` is otherwise. A string
    in `topic` is the topic (else the file's name), a bool in `demo` is kept, other fields are not read. A text of
    null is an empty one. Empty texts are kept: `token_batches` raises for them, or counts them with a `min_length`.

    Args:
        text_field: the field that holds the text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no object or has no text in `text_field`, or no line at all.
    """
    path = Path(path)
    rows = list(_json_rows(path))
    times = Counter(row["document"] for _, row in rows if isinstance(row.get("document"), str))
    documents = []
    for number, row in rows:
        name, topic = row.get("document"), row.get("topic")
        documents.append(
            Document(
                name=name if isinstance(name, str) and times[name] == 1 else f"{path.name}#{number}",
                topic=topic if isinstance(topic, str) else path.name,
                text=text_of(row, text_field, f"line {number} of {path.name}"),
                demo=row.get("demo") is True,
            )
        )
    return list(checked_documents(documents, path.name, empty_ok=True))


def read_text(path: str | Path) -> list[Document]:
    """A plain text file as documents: one for each paragraph, which empty lines divide, spaces in them or not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no text, or is not UTF-8.
    """
    path = Path(path)
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", _decoded(path, "text file"))]
    documents = [
        Document(f"{path.name}#{number}", path.name, paragraph)
        for number, paragraph in enumerate((p for p in paragraphs if p), start=1)
    ]
    return list(checked_documents(documents, path.name))


def read_lines(path: str | Path) -> list[Document]:
    """A plain text file as documents: one for each line with anything but white space, as `FILE#LINE`.

    A line is kept as it stands, with the spaces at its ends and its line feed, as the rows of WikiText on the hub are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no text, or is not UTF-8.
    """
    path = Path(path)
    # Not splitlines: it would divide at U+2028 and U+0085, which may stand in a line.
    lines = re.findall(r"[^\n]*\n|[^\n]+", _decoded(path, "text file"))
    documents = [
        Document(f"{path.name}#{number}", path.name, line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    return list(checked_documents(documents, path.name))


def text_of(row: dict[str, Any], text_field: str, where: str) -> str:
    """The text of a row of a file or dataset; null is an empty text.

    Raises:
        ValueError: the row lacks the field, or holds something else than text there. It names the row's fields.
    """
    if text_field not in row:
        raise ValueError(f"{where} has no field {text_field!r} with its text; its fields are {sorted(row)}")
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        fields = sorted(field for field, value in row.items() if isinstance(value, str))
        raise ValueError(
            f"{where}: the field {text_field!r} must be text, and is {type(text).__name__}; fields with text: {fields}"
        )
    return text or ""


def _decoded(path: Path, what: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not text in UTF-8 (a compressed file must be unpacked): {error}"
        ) from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines: it would divide at U+2028 and U+0085, which may stand in JSON strings.
    for number, line in enumerate(_decoded(path, "file of documents").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number} of {path.name} is no document, not even JSON: {error}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"line {number} of {path.name} is no document: {type(row).__name__}, not an object"
            )
        yield number, row


def checked_documents(
    documents: Iterable[Document], source: str, *, empty_ok: bool = False
) -> Iterator[Document]:
    """The documents one by one, checked.

    Raises:
        TypeError: something else than a document.
        ValueError: an empty one unless `empty_ok`, a name that comes twice, no valid Unicode, or none at all.
    """
    names = set()
    for document in documents:
        if not isinstance(document, Document):
            raise TypeError(f"{source} must hold Documents, not {type(document).__name__}")
        if document.name in names:
            raise ValueError(
                f"{source}: at least 2 documents are named {document.name!r}; every name must be unique"
            )
        names.add(document.name)
        if not document.text and not empty_ok:
            raise ValueError(
                f"{source}: document {document.name!r} is empty; with a min_length, such are left out and counted"
            )
        try:
            document.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{source}: document {document.name!r} is no valid Unicode text: {error}"
            ) from error
        yield document
    if not names:
        raise ValueError(f"{source} holds no documents")
