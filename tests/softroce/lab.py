"""The lab: Soft-RoCE (rxe) in throw-away machines, alone and joined.

    lab = Lab.prepare()                          raises LabUnavailable with what is missing
    with lab.machine() as machine:               one; rxe0 inside
        machine.run(["rdma", "link"])
    with lab.two_machines() as (one, two):       192.0.2.1 and 192.0.2.2; rxe0 in each
        one.run(["ping", "-c1", "192.0.2.2"])

By hand:

    python -m tests.softroce.lab [--two] [--nics 2] [--cpus 2] [--seconds 300] COMMAND …

runs the command in a machine (the first of two), prints what it says, and ends with its status; 124
means that it took too long, 125 that the machine was lost.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from tests.softroce.hooks import Hooks
from tests.softroce.kernel import Kernel, LabUnavailable, prepare
from tests.softroce.machine import PROJECT, Machine, MachineLost

_PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "rdma": "iproute2 rdma-core",
    "ibv_devinfo": "ibverbs-utils ibverbs-providers",
    "ib_read_bw": "perftest",
    "ip": "iproute2",
}
_PYVERBS = Path("/usr/lib/python3/dist-packages/pyverbs")


class Lab:
    """What machines are made of; makes none by itself."""

    def __init__(self, kernel: Kernel, bindings: Path) -> None:
        self.kernel = kernel
        self._environ = {"PYTHONPATH": f"{PROJECT}:{bindings}"}
        self._environ |= {"OMP_NUM_THREADS": "1", "CI": "true", "SOFTROCE_INSIDE": "1"}

    @classmethod
    def prepare(cls, cache: Path | None = None) -> Lab:
        """With the kernel from `cache` (default: SOFTROCE_CACHE, ~/.cache/…), fetched into
        it once. Raises LabUnavailable."""
        if missing := _missing():
            raise LabUnavailable(f"the lab needs: apt-get install {' '.join(missing)}")
        if cache is None:
            named = os.environ.get("SOFTROCE_CACHE")
            cache = Path(named) if named else Path.home() / ".cache/pdbatch-softroce"
        return cls(prepare(cache), _bindings(cache))

    @contextmanager
    def machine(
        self, *, nics: int = 1, num_cpus: int = 1, memory_mb: int = 1536
    ) -> Iterator[Machine]:
        """One, with `nics` RDMA devices that reach themselves alone; 0: none."""
        with Machine(
            self.kernel,
            rdma=f"alone {nics}" if nics else "",
            num_cpus=num_cpus,
            memory_mb=memory_mb,
            environ=self._environ,
        ) as machine:
            Hooks(machine, None)
            machine.wait_ready()
            yield machine

    @contextmanager
    def two_machines(
        self, *, nics: int = 1, num_cpus: int = 1, memory_mb: int = 1024
    ) -> Iterator[tuple[Machine, Machine]]:
        """Two, joined by as many cables as each has RDMA devices."""
        cables = [socket.socketpair() for _ in range(nics)]
        with ExitStack() as stack:
            both = [
                stack.enter_context(
                    Machine(
                        self.kernel,
                        rdma=f"joined {nics} {number}",
                        number=number,
                        num_cpus=num_cpus,
                        memory_mb=memory_mb,
                        cables=[ends[number - 1] for ends in cables],
                        environ=self._environ,
                    )
                )
                for number in (1, 2)
            ]
            for machine, other in (both, both[::-1]):
                Hooks(machine, other)
                machine.wait_ready()
            yield both[0], both[1]


def _missing() -> list[str]:
    """Debian packages."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    found = [package for name, package in _PROGRAMS.items() if not shutil.which(name, path=path)]
    if not _PYVERBS.is_dir():
        found.append("python3-pyverbs")
    return found


def _bindings(cache: Path) -> Path:
    """A folder with the system's pyverbs alone, for PYTHONPATH: what lies beside it in the system's
    folder must not hide the project's packages. Raises LabUnavailable."""
    if not any((_PYVERBS / f"device{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        raise LabUnavailable(
            f"{_PYVERBS} is built for another Python than {sys.version.split()[0]}: "
            "make the environment with the system's version (PYTHON=/usr/bin/python3)"
        )
    folder = cache / "bindings"
    folder.mkdir(exist_ok=True)
    if not (folder / "pyverbs").exists():
        (folder / "pyverbs").symlink_to(_PYVERBS)
    return folder


def main(argv: Sequence[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.softroce.lab")
    parser.add_argument("--two", action="store_true", help="two machines; runs in the first")
    parser.add_argument("--nics", type=int, default=1, help="RDMA devices in each; 1")
    parser.add_argument("--cpus", type=int, default=1, help="of each; 1")
    parser.add_argument("--seconds", type=float, default=600, help="that it may take; 600")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    try:
        lab = Lab.prepare()
        with ExitStack() as stack:
            if args.two:
                pair = lab.two_machines(nics=args.nics, num_cpus=args.cpus)
                machine, _ = stack.enter_context(pair)
            else:
                one = lab.machine(nics=args.nics, num_cpus=args.cpus)
                machine = stack.enter_context(one)
            done = machine.run(args.command, args.seconds, cwd=Path.cwd(), hears=show)
            return done.returncode
    except LabUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.TimeoutExpired as error:
        print(error, file=sys.stderr)
        return 124
    except MachineLost as error:
        print(error, file=sys.stderr)
        return 125


def show(text: str) -> None:
    """At once."""
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
