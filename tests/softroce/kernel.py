"""Debian's kernel for the machines, and the initrd that gives them the host's root.

    prepare(cache)    a Kernel, out of the cache or fetched into it; raises LabUnavailable

The package is the one that the release's meta-package names; it is downloaded and unpacked, never
installed. An initrd holds busybox and the modules that mount a 9p root, and is made anew where what
it is made of has changed. Safe for several processes at once.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import lzma
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

GUEST = Path(__file__).resolve().parent / "guest"
_META = "linux-image-amd64"
_IMAGE = re.compile(r"linux-image-\d+\.\d+\.\d+(?:-\d+|\+deb\d+)-amd64(?![\w-])")
"""linux-image-6.1.0-56-amd64, linux-image-6.12.57+deb13-amd64; not the meta-packages"""
_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_rng")
_APPLETS = ("sh", "mount", "insmod", "mkdir", "echo", "switch_root", "sleep")


class LabUnavailable(Exception):
    """This host has not what the lab needs; the text says what is missing and what to do."""


class Kernel(NamedTuple):
    """What a machine boots."""

    version: str
    image: Path
    initrd: Path
    modules: Path
    """The folder that belongs at /lib/modules/VERSION."""


def prepare(cache: Path) -> Kernel:
    """See the module."""
    if platform.machine() != "x86_64":
        raise LabUnavailable(f"the lab's kernel is for x86_64, this is {platform.machine()}")
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache):
        root = _kept(cache) or _fetched(cache)
        version = _only(root / "lib/modules").name
        return Kernel(
            version=version,
            image=root / f"boot/vmlinuz-{version}",
            initrd=_initrd(root, version),
            modules=root / "lib/modules" / version,
        )


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    with (cache / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def _kept(cache: Path) -> Path | None:
    """The newest that was fetched before."""
    found = [path for path in cache.iterdir() if _IMAGE.fullmatch(path.name)]
    return max(found, key=lambda path: _numbers(path.name), default=None)


def _numbers(package: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", package)]


def _fetched(cache: Path) -> Path:
    package = _package()
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as name:
        folder, root = Path(name), Path(name) / "root"
        _run("apt-get", "download", package, cwd=folder)
        (archive,) = folder.glob("*.deb")
        _run("dpkg-deb", "-x", str(archive), str(root))
        if not (root / "lib/modules").is_dir():
            (root / "lib").symlink_to("usr/lib")  # later releases have no /lib in packages
        _run("depmod", "-b", str(root), _only(root / "lib/modules").name)
        root.rename(cache / package)
    return cache / package


def _package() -> str:
    """What the meta-package asks for; the newest there is where that is not known."""
    for words in (
        ("depends", _META),
        ("search", "--names-only", r"^linux-image-[0-9].*-amd64$"),
    ):
        try:
            said = subprocess.run(["apt-cache", *words], capture_output=True, text=True).stdout
        except OSError as error:
            raise LabUnavailable(f"the lab's kernel comes from Debian's archive: {error}") from None
        if found := [match[0] for match in _IMAGE.finditer(said)]:
            return max(found, key=_numbers)
    raise LabUnavailable("apt-cache knows no linux-image package: apt-get update")


def _run(*words: str, cwd: Path | None = None) -> str:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            words, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
    except OSError as error:
        raise LabUnavailable(f"{words[0]} cannot be run: {error}") from error
    if done.returncode:
        raise LabUnavailable(f"{' '.join(words)}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _initrd(root: Path, version: str) -> Path:
    busybox = shutil.which("busybox")
    if busybox is None:
        raise LabUnavailable("busybox is missing: apt-get install busybox-static")
    program = Path(busybox).read_bytes()
    if b"/lib64/ld-linux" in program[:4096]:
        raise LabUnavailable(f"{busybox} needs libraries: apt-get install busybox-static")
    parts = [(GUEST / "init").read_bytes(), program, repr(_MODULES).encode()]
    digest = hashlib.sha256(b"".join(parts)).hexdigest()[:12]
    made = root / f"initrd-{digest}.gz"
    if not made.exists():
        with tempfile.TemporaryDirectory() as name:
            _fill(Path(name), root, version, Path(busybox))
            files = "\n".join(str(p.relative_to(name)) for p in sorted(Path(name).rglob("*")))
            words = [busybox, "cpio", "-o", "-H", "newc"]
            packed = subprocess.run(
                words, cwd=name, input=files.encode(), capture_output=True, check=True
            ).stdout
        unfinished = made.with_suffix(".new")
        unfinished.write_bytes(gzip.compress(packed, 1))
        unfinished.rename(made)
    return made


def _fill(folder: Path, root: Path, version: str, busybox: Path) -> None:
    """With what the machine has before it has a root."""
    for name in ("bin", "dev", "proc", "sys", "modules", "host", "writes", "new"):
        (folder / name).mkdir()
    shutil.copy(busybox, folder / "bin/busybox")
    for applet in _APPLETS:
        (folder / "bin" / applet).symlink_to("busybox")
    shutil.copy(GUEST / "init", folder / "init")
    (folder / "init").chmod(0o755)
    order = []
    for path in _with_dependencies(root, version):
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        order.append(path.name.removesuffix(".xz"))
        (folder / "modules" / order[-1]).write_bytes(data)
    (folder / "modules/order").write_text("".join(f"{name}\n" for name in order))


def _with_dependencies(root: Path, version: str) -> list[Path]:
    """The files of the modules, each after those that it needs."""
    found: dict[str, None] = {}
    for module in _MODULES:
        said = _run("modprobe", "-S", version, "-d", str(root), "--show-depends", module)
        found |= dict.fromkeys(re.findall(r"^insmod (\S+)", said, re.MULTILINE))
    return [Path(name) for name in found]
