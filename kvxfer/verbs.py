"""Whether pyverbs, the binding to RDMA devices, can be used here; and if not, what to install.

It belongs to rdma-core and is a system package on most distributions; the package of that name on
PyPI builds against an rdma-core of its own version (59 or newer) alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

PACKAGES: Final = {
    "debian": "apt-get install python3-pyverbs ibverbs-providers",
    "fedora": "dnf install python3-pyverbs libibverbs",
    "rhel": "dnf install python3-pyverbs libibverbs",
    "suse": "zypper install python3-pyverbs libibverbs",
    "arch": "pacman -S rdma-core python-pyverbs",
}
"""What to install, by `ID` or `ID_LIKE` of /etc/os-release."""
_PLACES: Final = (
    "usr/lib/python3/dist-packages",
    "usr/lib64/python{version}/site-packages",
    "usr/lib/python{version}/site-packages",
)


class Trouble(NamedTuple):
    """Why pyverbs cannot be used, and what helps."""

    why: str
    remedy: str


def pyverbs_trouble() -> Trouble | None:
    """None where pyverbs can be used. Imports it."""
    try:
        with logging_kept():
            import pyverbs.device
            import pyverbs.qp  # noqa: F401
    except Exception as error:  # a build against other libraries fails in its own ways
        return Trouble(f"pyverbs cannot be imported: {error}", remedy())
    return None


@contextmanager
def logging_kept() -> Iterator[None]:
    """pyverbs sets up the root logger when it is imported; whose it is keeps it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def remedy(root: Path = Path("/"), prefix: str = sys.prefix) -> str:
    """One sentence for this Python on this distribution; `root` is that of the file system."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for place in _PLACES:
        there = root / place.format(version=version) / "pyverbs"
        if there.is_dir():
            return _for_installed(there, version, prefix)
    command = PACKAGES.get(_distribution(root))
    if command is None:
        return (
            "Install rdma-core with its Python binding pyverbs, or `pip install pyverbs` where "
            "rdma-core is 59 or newer."
        )
    if prefix in ("/usr", "/usr/local"):
        return f"Run `{command}`."
    return f"Run `{command}`, then `pdbatch doctor` again: it says how this environment gets it."


def _for_installed(there: Path, version: str, prefix: str) -> str:
    tag = f"cpython-{version.replace('.', '')}-"
    builds = sorted(path.name for path in there.glob("device*.so"))
    if any(tag in name for name in builds):
        into = Path(prefix) / "lib" / f"python{version}" / "site-packages"
        return f"Run `ln -s {there} {into}/pyverbs`; it is built for this Python."
    other = builds[0].split("cpython-")[-1].split("-")[0] if builds else "another one"
    return (
        f"{there} is built for CPython {other}: make the environment with that Python, or "
        "`pip install pyverbs` where rdma-core is 59 or newer."
    )


def _distribution(root: Path) -> str:
    """The first name of PACKAGES that /etc/os-release mentions."""
    try:
        text = (root / "etc/os-release").read_text(encoding="utf-8")
    except OSError:
        return ""
    named = dict(line.partition("=")[::2] for line in text.splitlines())
    mine = f"{named.get('ID', '')} {named.get('ID_LIKE', '')}".replace('"', "").split()
    return next((name for name in mine if name in PACKAGES), "")
