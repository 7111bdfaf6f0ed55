"""The token that a retriever for other machines asks for: a file, for its owner's eyes only."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from searche1.types import UserError


def read_token(path: Path) -> str:
    """The token in a file. Raises UserError."""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the retriever's token file {path}: {error}; give the file that its --token-file names"
        ) from error
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(f"the token file {path} holds no token; remove it and start the retriever to have one made")
    return token


def make_token(path: Path) -> bool:
    """Writes a new token unless the file is there; tells whether it did. Raises UserError."""
    if path.is_file():
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UserError(
            f"cannot make the token file {path}: {error.strerror}; give a file in a folder that you may write"
        ) from error
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    return True
