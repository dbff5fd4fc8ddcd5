"""Reading a sysfs tree, wherever its root is: missing and unreadable files are empty, not errors.

A driver may refuse to give an attribute (EINVAL for a GID that is not set, EIO for a device that
fell off the bus), a container may hide a folder; none of it may keep the rest from being read.
"""

from __future__ import annotations

import os
import re
from pathlib import Path


class Sysfs:
    """One tree. Paths are given in parts, below the root."""

    def __init__(self, root: str | Path = "/sys") -> None:
        self._root = Path(os.path.realpath(root))

    def text(self, *parts: str) -> str:
        """A file's content without blanks around it; "" where there is none to be read."""
        try:
            return self._root.joinpath(*parts).read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            return ""

    def number(self, *parts: str, default: int = -1) -> int:
        """A file's whole number, decimal or with 0x."""
        try:
            return int(self.text(*parts), 0)
        except ValueError:
            return default

    def names(self, *parts: str) -> list[str]:
        """What a folder holds, numbers in names sorted as numbers; [] where there is none."""
        try:
            found = [path.name for path in self._root.joinpath(*parts).iterdir()]
        except OSError:
            return []
        return sorted(found, key=natural)

    def has(self, *parts: str) -> bool:
        """Whether there is such a file or folder."""
        return self._root.joinpath(*parts).exists()

    def place(self, *parts: str) -> tuple[str, ...]:
        """Where a link leads in the end, below the root; () where it leads nowhere or out of it."""
        found = Path(os.path.realpath(self._root.joinpath(*parts)))
        if not found.exists() or not found.is_relative_to(self._root):
            return ()
        return found.relative_to(self._root).parts


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A sorting key by which `mlx5_9` comes before `mlx5_10`."""
    pieces = re.findall(r"\d+|\D+", name)
    return tuple((int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces)
