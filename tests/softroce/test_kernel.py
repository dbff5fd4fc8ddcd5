"""Which kernel is taken, and what is said where something is missing. No machine is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.softroce import kernel, lab
from tests.softroce.kernel import LabUnavailable

_SEARCH = """\
linux-image-6.1.0-9-amd64 - Linux 6.1 for 64-bit PCs (signed)
linux-image-6.1.0-47-amd64 - Linux 6.1 for 64-bit PCs (signed)
linux-image-6.12-amd64 - Linux for 64-bit PCs (meta-package)
"""


def answers(monkeypatch: pytest.MonkeyPatch, **said: str) -> None:
    """What apt-cache says to each of its commands."""

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(words, 0, said.get(words[1], ""), "")

    monkeypatch.setattr(subprocess, "run", run)


def test_the_meta_package_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    depends = "linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n"
    answers(monkeypatch, depends=depends, search=_SEARCH)
    assert kernel._package() == "linux-image-6.1.0-56-amd64"


def test_the_newest_without_a_meta_package(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, search=_SEARCH)
    assert kernel._package() == "linux-image-6.1.0-47-amd64"


def test_other_forms_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, depends="  Depends: linux-image-6.12.57+deb13-amd64\n")
    assert kernel._package() == "linux-image-6.12.57+deb13-amd64"


def test_no_lists_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    with pytest.raises(LabUnavailable, match="apt-get update"):
        kernel._package()


def test_no_debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabUnavailable, match="Debian"):
        kernel._package()


def test_another_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(LabUnavailable, match="x86_64, this is aarch64"):
        kernel.prepare(tmp_path)


def test_missing_programs_are_named_by_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path: None if "qemu" in name else name)
    monkeypatch.setattr(lab, "_PYVERBS", tmp_path / "none")
    with pytest.raises(LabUnavailable, match="apt-get install qemu-system-x86 python3-pyverbs"):
        lab.Lab.prepare(tmp_path)


def test_pyverbs_of_another_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "device.cpython-27-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(lab, "_PYVERBS", tmp_path)
    with pytest.raises(LabUnavailable, match="built for another Python"):
        lab._bindings(tmp_path)


def test_modules_may_be_compressed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import lzma

    packed = tmp_path / "a.ko.xz"
    packed.write_bytes(lzma.compress(b"module"))
    monkeypatch.setattr(kernel, "_with_dependencies", lambda root, version: [packed])
    (folder := tmp_path / "made").mkdir()
    kernel._fill(folder, tmp_path, "1", Path(sys.executable))
    assert (folder / "modules/a.ko").read_bytes() == b"module"
    assert (folder / "modules/order").read_text() == "a.ko\n"
