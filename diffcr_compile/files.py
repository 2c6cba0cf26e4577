"""Files that are there whole or not at all, folders for them, and records that tell whether they were changed since."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from .errors import ArtefactError

REPORT_TYPE = "diffcr_compile.report"
"""Of the report beside a routing, which ``save`` tells from a file of another program."""


def make_folder(folder: Path) -> None:
    """Make a folder before the work whose result goes there, which an impossible place would lose. Raises ArtefactError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtefactError(
            f"the folder {folder} can't be made ({error.strerror}). Expected a path below a folder that can be written to."
        ) from error


def write_files(contents: dict[Path, bytes]) -> None:
    """Write files, each whole or not at all, with the permissions that the umask gives. All are written beside their places before
    the first is moved there, in order: a disk that is full leaves everything as it was."""
    fresh = {file: file.with_name(f".{file.name}.{uuid.uuid4().hex}") for file in contents}
    try:
        for file, data in contents.items():
            fresh[file].write_bytes(data)
        for file, written in fresh.items():
            os.replace(written, file)
    finally:
        for written in fresh.values():
            written.unlink(missing_ok=True)


def holds_type(file: Path, kind: str) -> bool:
    """Whether a file holds a JSON object of this ``type``, or what may have been one before it was damaged."""
    try:
        found = json.loads(file.read_text())
    except OSError:  # no file, or none that can be read
        return False
    except ValueError:
        return True
    return isinstance(found, dict) and found.get("type") == kind


def record_checksum(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its checksum."""
    text = json.dumps({key: value for key, value in record.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
