"""The bytes of a source file as text: decompression, decoding, and refusal of what is no text.

file -> gz or zstd by its first bytes -> data.encoding -> the whole text, or lines, or consecutive JSON values
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from hybridtrain.errors import UserError, install, refusal
from hybridtrain.runtime.files import is_lfs_pointer, lfs_pointer

READ_BYTES = 1 << 20
UTF8 = "utf-8"
MOST_VALUE_CHARS = 256 << 20  # largest element of a JSON array
_HEAD_BYTES = 1 << 16
_LEAST_BAD = 3  # fewer undecodable bytes are tolerated, and counted
_BAD_SHARE = 1000  # more than 1 undecodable byte in 1000: another encoding, or no text
_COMPRESSIONS = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}
_OTHERS = {
    b"\xfd7zXZ": ("compressed by xz", "xz -d FILE"),
    b"BZh": ("compressed by bzip2", "bzip2 -d FILE"),
    b"PK\x03\x04": ("a zip archive", "unzip FILE"),
    b"7z\xbc\xaf": ("a 7z archive", "7z x FILE"),
    b"%PDF": ("a PDF", "pdftotext FILE"),
    b"PAR1": ("Parquet", "data.format=parquet"),
    b"ARROW1": ("Arrow", "data.format=datasets, with the folder that holds it"),
}
_WIDE = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_AFTER_NUMBER = (",", "]", " ", "\n", "\r", "\t")
_BLANK = re.compile(r"[ \t\r\n]*")


def compression(path: str) -> str:
    """gz, zst or "", by the first bytes: the file ending may be wrong, and dictzip's is .dz.

    Raises OSError.
    """
    with Path(path).open("rb") as file:
        start = file.read(4)
    return next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), "")


def opened(path: str, *, compression: str) -> BinaryIO:
    """The decompressed bytes of a file."""
    if compression == "gz":
        return io.BufferedReader(gzip.open(path, "rb"), READ_BYTES)  # type: ignore[arg-type]
    if compression == "zst":
        return io.BufferedReader(package("pyarrow").input_stream(path, compression="zstd"), READ_BYTES)
    return Path(path).open("rb", buffering=READ_BYTES)


def head(path: str, *, compression: str) -> bytes:
    """The first 64 KiB of the decompressed file."""
    with opened(path, compression=compression) as file:
        return file.read(_HEAD_BYTES)


def check_beginning(path: str, start: bytes, *, encoding: str) -> None:
    """Refuse a file that by its first bytes is no text, a git-lfs pointer or UTF-16 (raises UserError)."""
    if is_lfs_pointer(Path(path)):
        raise lfs_pointer("data.source", Path(path))
    other = next((what for magic, what in _OTHERS.items() if start.startswith(magic)), None)
    if other is not None:
        words, instead = other
        raise refusal(
            "data.source",
            path,
            f"it is {words}, not text",
            allowed="text and JSONL, also gz or zstd",
            instead=instead.replace("FILE", path),
        )
    wide = next((name for mark, name in _WIDE.items() if start.startswith(mark)), "")
    if wide and encoding == UTF8:
        raise refusal(
            "data.source",
            path,
            f"it is {wide}, not UTF-8",
            allowed="text in the encoding that data.encoding names",
            instead=f"data.encoding={wide}",
        )


def text(path: str, *, compression: str, encoding: str) -> tuple[str, str]:
    """(the decoded file, problem). Undecodable bytes become U+FFFD; many of them are a problem."""
    with opened(path, compression=compression) as file:
        data = file.read()
    decoded = data.decode("utf-8-sig" if encoding == UTF8 else encoding, errors="replace")
    bad = decoded.count("\0")
    if "\ufffd" in decoded:
        bad += decoded.count("\ufffd") - (data.count("\ufffd".encode()) if encoding == UTF8 else 0)
    if bad >= _LEAST_BAD and bad * _BAD_SHARE > len(data):
        return "", f"{bad:,} of its {len(data):,} bytes are no text in {encoding}"
    return decoded, ""


def lines(path: str, *, compression: str, encoding: str) -> Iterator[bytes]:
    """The lines of a file, as UTF-8."""
    with opened(path, compression=compression) as file:
        if encoding == UTF8:
            yield from file
        else:
            yield from (
                line.encode("utf-8", "surrogatepass")
                for line in io.TextIOWrapper(file, encoding=encoding, newline="\n")
            )


def holds_values(start: bytes, *, encoding: str) -> bool:
    """Whether a JSON file, by its beginning, is an array or indented objects, not one object per line."""
    shown = start.decode("utf-8-sig" if encoding == UTF8 else encoding, errors="replace").lstrip()
    first = shown.partition("\n")[0].rstrip() if "\n" in shown else ""
    return shown.startswith("[") or (shown.startswith("{") and first.endswith(("{", "[", ",", ":")))


def values(path: str, *, compression: str, encoding: str) -> Iterator[Any]:
    """The elements of a JSON array, or consecutive JSON values. Needs memory for one of them.

    Raises UserError, with the line, for invalid JSON.
    """
    with opened(path, compression=compression) as file:
        stream = io.TextIOWrapper(file, encoding="utf-8-sig" if encoding == UTF8 else encoding)
        yield from _Values(path, stream).read()


class _Values:
    """Parses JSON values in a window of the text, which grows until the next value fits."""

    def __init__(self, path: str, stream: TextIO) -> None:
        self._path, self._stream = path, stream
        self._window, self._at, self._lines, self._ended = "", 0, 0, False
        self._parse = json.JSONDecoder().raw_decode

    def read(self) -> Iterator[Any]:
        array = self._next() == "["
        self._at += array
        first = True
        while (mark := self._next()) and not (array and mark == "]"):
            if array and not first:
                self._expect(mark == ",", "a comma is missing between two elements")
                self._at += 1
                self._expect(self._next() not in ("]", ""), "a comma comes before the end of the array")
            yield self._value()
            first = False
        if array:
            self._expect(mark == "]", "the file ends within the array")
            self._at += 1
            self._expect(not self._next(), "something follows the array")

    def _next(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            self._at = _BLANK.match(self._window, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._more(READ_BYTES):
                return ""

    def _more(self, chars: int) -> bool:
        self._lines += self._window.count("\n", 0, self._at)
        block = self._stream.read(chars)
        self._window, self._at = self._window[self._at :] + block, 0
        self._ended = self._ended or not block
        return bool(block)

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._parse(self._window, self._at)
            except RecursionError:
                raise self._problem("its brackets are nested too deeply") from None
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._window) - 16 or error.msg.startswith("Unterminated string")
                if self._ended or not cut:
                    self._at = min(error.pos, len(self._window))
                    raise self._problem(error.msg) from None
            else:
                # A number at the end of the window may continue.
                if (
                    isinstance(value, dict | list | str)
                    or self._window[end : end + 1] in _AFTER_NUMBER
                    or self._ended
                ):
                    self._at = end
                    return value
            left = len(self._window) - self._at
            self._expect(left <= MOST_VALUE_CHARS, f"an element is longer than {MOST_VALUE_CHARS >> 20} MiB")
            self._more(max(READ_BYTES, left))

    def _expect(self, holds: bool, problem: str) -> None:
        if not holds:
            raise self._problem(problem)

    def _problem(self, problem: str) -> UserError:
        line = self._lines + self._window.count("\n", 0, self._at) + 1
        return refusal(
            "data.source",
            f"{self._path} line {line}",
            f"it is not JSON ({problem})",
            allowed="one object per line, one array of objects, or consecutive objects",
            instead="a valid file; pandas converts CSV to Parquet: read_csv(FILE).to_parquet('FILE.parquet')",
        )


def package(name: str) -> Any:
    """An optional package. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        raise refusal(
            "data.format",
            top,
            f"the package {top} is not installed ({error})",
            allowed="text and JSONL without it",
            instead=install("data"),
        ) from error
