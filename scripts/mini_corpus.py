"""Text for the bundled model: English that every installation of the project already has.

Sources, all read as files and never imported or executed: the language reference in `pydoc_data.topics`, the
docstrings of the standard library and of the project's dependencies (parsed with `ast`), and the Markdown and
reStructuredText files that those packages ship.

The unit is the *paragraph*: every paragraph is kept once, at its first place in a fixed order, before the text
is divided. The division is by *topic* (a standard-library module, a subpackage, a page of the language
reference), decided by a hash of the topic's name, so no held-out topic is seen in training.
"""

import ast
import hashlib
import importlib.util
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    "torch", "transformers", "numpy", "scipy", "pandas", "datasets", "nnsight", "transformer_lens", "plotly",
    "pyarrow", "einops", "jaxtyping", "safetensors", "huggingface_hub", "tqdm", "sympy", "networkx", "accelerate",
    "wandb", "fsspec", "httpx", "pydantic", "rich", "requests", "jinja2", "yaml", "regex", "narwhals", "click",
    "mpmath", "tokenizers", "filelock", "packaging", "typeguard", "beartype", "dateutil", "multiprocess", "dill",
    "urllib3", "anyio", "pygments", "psutil", "setuptools", "typer", "markdown_it",
)  # fmt: skip
"""Dependencies, direct and indirect, whose documentation is read."""

HELD_OUT_PER_MILLE = 40
"""Topics out of a thousand that are held out."""

HELD_OUT_SALT = 198
"""Chosen, by the sizes of the topics alone, so that no single topic or package is most of the held-out text."""

MAX_DOCUMENT_CHARACTERS = 1200
"""Longer documents are divided at a paragraph's end, so that a whole document fits a short context."""

MIN_DOCUMENT_CHARACTERS = 250
"""Shorter ones are joined with their neighbours of the same module."""

MAX_PACKAGE_CHARACTERS = 5_000_000
"""A package's share is bounded, so that no single one decides what the model knows."""

_SKIPPED_DIRECTORIES = {
    "tests",
    "test",
    "testing",
    "_vendor",
    "vendor",
    "idlelib",
    "site-packages",
    "__pycache__",
}
_SKIPPED_TOPICS = {"plotly.validators", "torch.testing", "lib2to3", "pydoc_data"}


@dataclass(frozen=True)
class Document:
    """A short piece of text with its origin.

    Attributes:
        name: Where it stands, as in `docstring:torch.nn.modules.linear#2` or `pydoc:with`.
        topic: What decides on which side of the split it falls, as in `torch.nn`.
        text: The text, paragraphs divided by an empty line.
    """

    name: str
    topic: str
    text: str


def is_held_out(topic: str) -> bool:
    """Whether a topic is kept from training; a function of its name alone."""
    return (
        int.from_bytes(hashlib.sha256(f"{topic}{HELD_OUT_SALT}".encode()).digest()[:8], "big") % 1000
        < HELD_OUT_PER_MILLE
    )


def topic_of(module: str) -> str:
    """The topic of a dotted module name: two parts deep, three where the second part is only a container."""
    parts = module.split(".")
    container = len(parts) > 2 and (parts[0], parts[1]) in {
        ("transformers", "models"), ("pandas", "core"), ("plotly", "graph_objs"), ("pandas", "io"),
    }  # fmt: skip
    return ".".join(parts[: 3 if container else 2])


def _readable(paragraph: str) -> bool:
    """Whether a paragraph is prose rather than a table, a drawing, an example session or another language."""
    if len(paragraph) < 20 or ">>>" in paragraph or len(paragraph) > 4000:
        return False
    if sum(character > "\x7f" for character in paragraph) > 0.01 * len(paragraph):
        return False
    dense = [character for character in paragraph if not character.isspace()]
    return sum(character.isalpha() for character in dense) >= 0.75 * len(dense)


def _fingerprint(paragraph: str) -> str:
    """What makes two paragraphs the same: their letters, whatever the spacing, case, digits and punctuation."""
    return hashlib.sha256(re.sub(r"[^a-z]+", "", paragraph.lower()).encode()).hexdigest()


def _docstrings(source: str) -> Iterator[list[str]]:
    """Groups of docstrings: the module's, then one group for each top-level class or function."""

    def inside(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield text
        for child in ast.iter_child_nodes(node):
            yield from inside(child)

    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    opening = ast.get_docstring(tree, clean=True)
    yield [opening] if opening else []
    for child in tree.body:
        texts = list(inside(child))
        # torch documents its built-in functions by calling add_docstr(function, text).
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            for argument in ast.walk(child.value):
                value = argument.value if isinstance(argument, ast.Constant) else None
                if isinstance(value, str) and len(value) > 100:
                    texts.append(inspect.cleandoc(value))
        yield texts


def _package_root(package: str) -> Path:
    specification = importlib.util.find_spec(package)
    if specification is None or not specification.origin:
        raise FileNotFoundError(f"the text needs the package {package!r}, which is not installed")
    return Path(specification.origin).parent


def _python_files(root: Path) -> list[Path]:
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_DIRECTORIES & set(path.relative_to(root).parts[:-1])
        and not path.name.startswith("test_")
    ]


def _raw_documents() -> Iterator[tuple[str, str, str, str]]:
    """Yield (package, name, topic, text) in a fixed order, before deduplication."""
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    topics_source = (standard_library / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    for node in ast.parse(topics_source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "topics":
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield "pydoc", f"pydoc:{topic}", f"pydoc.{topic}", text
    roots = [("stdlib", standard_library)] + [(package, _package_root(package)) for package in PACKAGES]
    for package, root in roots:
        for path in _python_files(root):
            parts = path.relative_to(root).with_suffix("").parts
            if package == "stdlib" and parts[0] not in sys.stdlib_module_names:
                continue
            if package != "stdlib":
                parts = (package, *parts)
            module = ".".join(part for part in parts if part != "__init__")
            topic = parts[0] if package == "stdlib" else topic_of(module)
            if topic in _SKIPPED_TOPICS:
                continue
            source = path.read_text(encoding="utf-8", errors="replace")
            for group in _docstrings(source):
                if group:
                    yield package, f"docstring:{module}", topic, "\n\n".join(group)
        if package != "stdlib":
            for path in sorted([*root.rglob("*.md"), *root.rglob("*.rst")]):
                name = ".".join((package, *path.relative_to(root).parts))
                yield package, f"page:{name}", name, path.read_text(encoding="utf-8", errors="replace")


def _cut(paragraphs: list[str]) -> Iterator[str]:
    """Join paragraphs into texts of at most MAX_DOCUMENT_CHARACTERS, dividing a longer one at line ends."""
    pieces: list[str] = []
    for paragraph in paragraphs:
        block = ""
        for line in paragraph.split("\n"):
            if block and len(block) + len(line) + 1 > MAX_DOCUMENT_CHARACTERS:
                pieces.append(block)
                block = ""
            block = f"{block}\n{line}" if block else line
        pieces.append(block)
    text = ""
    for piece in pieces:
        if text and len(text) + len(piece) + 2 > MAX_DOCUMENT_CHARACTERS:
            yield text
            text = ""
        text = f"{text}\n\n{piece}" if text else piece
    if text:
        yield text


def gather_documents() -> tuple[list[Document], list[Document]]:
    """Read all sources, keep each paragraph once, and divide by topic.

    Returns:
        The training documents and the held-out documents, both in a fixed order.

    Raises:
        FileNotFoundError: A package of PACKAGES is not installed.
    """
    seen: set[str] = set()
    spent: dict[str, int] = {}
    modules: dict[str, tuple[str, list[str]]] = {}
    for package, name, topic, text in _raw_documents():
        if spent.get(package, 0) > MAX_PACKAGE_CHARACTERS:
            continue
        kept = []
        for paragraph in re.split(r"\n\s*\n", text.expandtabs(4)):
            paragraph = "\n".join(line.rstrip() for line in paragraph.strip("\n").split("\n"))
            # An opening indentation says nothing once the surrounding text is gone.
            paragraph = inspect.cleandoc("\n" + paragraph)
            if not _readable(paragraph):
                continue
            fingerprint = _fingerprint(paragraph)
            if fingerprint not in seen:
                seen.add(fingerprint)
                kept.append(paragraph)
                spent[package] = spent.get(package, 0) + len(paragraph)
        if kept:
            modules.setdefault(name, (topic, []))[1].append("\x00".join(kept))
    training: list[Document] = []
    held_out: list[Document] = []
    for name, (topic, groups) in modules.items():
        side = held_out if is_held_out(topic) else training
        number = 0
        waiting: list[str] = []
        for index, group in enumerate(groups):
            waiting += group.split("\x00")
            if sum(map(len, waiting)) < MIN_DOCUMENT_CHARACTERS and index + 1 < len(groups):
                continue
            for text in _cut(waiting):
                number += 1
                side.append(Document(f"{name}#{number}", topic, text))
            waiting = []
    # Long paragraphs that differ as wholes may have pieces in common once they are divided.
    trained = {_fingerprint(piece) for document in training for piece in document.text.split("\n\n")}
    unseen = []
    for document in held_out:
        pieces = [piece for piece in document.text.split("\n\n") if _fingerprint(piece) not in trained]
        if pieces:
            unseen.append(Document(document.name, document.topic, "\n\n".join(pieces)))
    return training, unseen


if __name__ == "__main__":
    train, held = gather_documents()
    for label, documents in (("training", train), ("held out", held)):
        size = sum(len(document.text) for document in documents)
        print(
            f"{label}: {len(documents)} documents, {size / 1e6:.2f} M characters,",
            f"{len({document.topic for document in documents})} topics",
        )
