"""Text as bytes: the files that `text:FILES` names, cut into windows whose every byte has a next one to predict."""

import os
import re
import sysconfig
from glob import glob
from pathlib import Path

import numpy as np

from paraxis.errors import TaskError

CONTEXT = 64  # bytes of a window, unless it is said
TESTED = 10  # the last 1/10 of all bytes is the test set ...
MOST_TESTED = 1 << 16  # ... but no more than these: an accuracy is then known to some 0.2%
_TEXT = re.compile(r"text(?::(.*?)(?:,context=([1-9]\d{0,8}))?)?", re.DOTALL)


def is_text(text: str) -> bool:
    """Whether a data set is text."""
    return text == "text" or text.startswith("text:")


def in_windows_of(text: str, context: int) -> str:
    """A text data set's full name: what it says itself comes first, else windows of `context` bytes."""
    files, own = _parts(text)
    return f"text:{files},context={own or context}"


def windows(text: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(training bytes, test bytes, context) of `text[:FILES][,context=T]`: uint8, each (m T + 1,) of some m above 0.

    FILES are files, patterns and folders (with all below), joined by `+`; none: the modules that lie directly in the
    folder of Python's own library, about 5 MB. Their bytes stand one after the other, those of a folder or a pattern
    sorted by path. The last tenth, of much text the last 64 KiB, is for tests; what is left behind the last window of
    either part is dropped. Raises TaskError.
    """
    files, own = _parts(text)
    context = own or CONTEXT
    raw = np.frombuffer(b"".join(_read(path) for path in _files(files)), np.uint8)
    border = len(raw) - min(len(raw) // TESTED, MOST_TESTED)
    train, test = (part[: (len(part) - 1) // context * context + 1] for part in (raw[:border], raw[border:]))
    if min(len(train), len(test)) <= context:
        raise TaskError(
            f"data {text!r}: the last tenth of {len(raw)} bytes holds no window of {context} and the byte after it; "
            "give more text or a smaller context"
        )
    return train, test, context


def _parts(text: str) -> tuple[str, int]:
    """(FILES, context or 0)."""
    match = _TEXT.fullmatch(text)
    return (match[1] or "", int(match[2] or 0)) if match else ("", 0)


def _files(names: str) -> list[Path]:
    if not names:
        return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found: list[Path] = []
    for name in names.split("+"):
        path = Path(os.path.expanduser(name))
        matching = [path] if path.exists() else [Path(p) for p in glob(str(path), recursive=True)]
        inside = [sorted(p.rglob("*")) if p.is_dir() else [p] for p in sorted(matching)]
        fresh = [p for group in inside for p in group if p.is_file()]
        if not fresh:
            raise TaskError(f"text {name!r}: no such file; give files, a folder or a pattern such as text:notes/*.txt")
        found += fresh
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TaskError(f"text {str(path)!r}: cannot be read ({error.strerror}); give readable files") from None
