"""Where compiled kernels are kept from one process to the next: below `<home>/cache`.

Whoever sets Triton's or torch's own variable keeps that. A home that cannot be written costs
nothing but time: kernels are then compiled by each process for itself.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDERS = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
"""By variable, which Triton and torch read when they first compile: the folder in the cache."""


def keep_compiled(home: str) -> None:
    """Name the folders to Triton and torch, for this process and its children."""
    for variable, name in FOLDERS.items():
        if not os.environ.get(variable):
            os.environ[variable] = _folder(Path(home).expanduser() / "cache" / name)


def _folder(wanted: Path) -> str:
    """The wanted folder, or one for this process alone where nothing can be written into it."""
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return str(wanted)
    except OSError as error:
        logger.warning("compiled kernels cannot be kept in %s: %s", wanted, error)
    own = tempfile.mkdtemp(prefix="pdbatch-compiled-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own
