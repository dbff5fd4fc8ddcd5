"""Which transports there are for whom, and why not."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import sysfs_trees

from kvxfer import opening, verbs
from kvxfer.choice import AUTO, End, check_names, meet, select
from kvxfer.errors import KVUsageError, UnknownTransport, UnusableTransport
from kvxfer.offers import Offer, available
from kvxfer.opening import near_nics, open_transport
from kvxfer.topology import Machine

OFFERS = [
    Offer("cuda_ipc", False, "the KV lies in host memory"),
    Offer("shm", True, "one machine"),
    Offer("rdma", False, "no RDMA device", "Buy one."),
    Offer("tcp", True, "anywhere"),
]


def machine(name: str, tmp_path: Path) -> Machine:
    return sysfs_trees.build(name, tmp_path / name).machine()


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    folder = tmp_path / "dev"
    folder.mkdir()
    (folder / "uverbs0").touch()
    return folder


@pytest.fixture
def pyverbs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyverbs", "pyverbs.device", "pyverbs.qp"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def rdma(found: Machine, dev: Path, **env: str) -> Offer:
    offers = {offer.name: offer for offer in available("cpu", machine=found, env=env, dev=dev)}
    return offers["rdma"]


def test_auto_takes_what_is_usable_in_order_and_says_why_not_the_rest() -> None:
    taken, left = select(("auto",), OFFERS)
    assert taken == ["shm", "tcp"]
    assert [(offer.name, offer.why) for offer in left] == [
        ("cuda_ipc", "the KV lies in host memory"),
        ("rdma", "no RDMA device"),
    ]
    assert [offer.name for offer in available()] == list(AUTO)


def test_a_list_is_kept_as_given_each_name_once() -> None:
    assert select(("tcp", "shm", "tcp"), OFFERS) == (["tcp", "shm"], [])
    assert select(("mem",), OFFERS) == (["mem"], [])


def test_what_is_named_and_cannot_be_used_is_an_error_with_a_remedy() -> None:
    with pytest.raises(UnusableTransport, match="rdma cannot be used here: no RDMA dev") as caught:
        select(("shm", "rdma"), OFFERS)
    assert caught.value.remedy == "Buy one."
    with pytest.raises(UnusableTransport) as caught:
        select(("cuda_ipc",), OFFERS)
    assert "auto" in caught.value.remedy


@pytest.mark.parametrize(
    ("names", "message", "remedy"),
    [
        (("rmda",), "no transport 'rmda'", "Did you mean rdma?"),
        (("shm", "auto"), "stands alone", "Name them all."),
        ((), "no transport is named", "cuda_ipc, shm, rdma, tcp"),
        (("ipc9x",), "no transport 'ipc9x'", "There are cuda_ipc, shm, rdma, tcp."),
    ],
)
def test_unknown_names(names: tuple[str, ...], message: str, remedy: str) -> None:
    with pytest.raises(UnknownTransport, match=message) as caught:
        check_names(names)
    assert remedy in caught.value.remedy
    assert isinstance(caught.value, KVUsageError)


def test_where_the_blocks_lie_decides() -> None:
    host = {offer.name: offer for offer in available("cpu")}
    assert host["shm"].usable and host["tcp"].usable
    assert host["cuda_ipc"].why == "the KV lies in host memory"
    device = {offer.name: offer for offer in available("cuda:1")}
    assert device["shm"].why == "the KV lies on cuda:1, not in host memory"
    assert device["tcp"].usable


def test_rdma_needs_a_device_a_port_its_file_and_pyverbs(
    tmp_path: Path, dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyverbs", None)
    assert rdma(machine("no_rdma", tmp_path), dev).why == "this machine has no RDMA device"
    box = sysfs_trees.build("pcie_box", tmp_path / "box")
    (box.root / "class/infiniband/mlx5_0/ports/1/state").write_text("1: DOWN\n")
    down = rdma(box.machine(), dev)
    assert down.why == "no RDMA device has an active port (mlx5_0: port 1 is DOWN)"
    up = machine("pcie_box", tmp_path)
    assert "cannot be opened" in rdma(up, tmp_path / "none").why
    without = rdma(up, dev)
    assert "pyverbs cannot be imported" in without.why
    assert "pyverbs" in without.remedy
    other = rdma(up, dev, KVCACHE_RDMA_NICS="mlx5_0:1,mlx5_4")
    assert "KVCACHE_RDMA_NICS: the NIC mlx5_4 is not there" in other.why


def test_rdma_with_everything(
    tmp_path: Path, dev: Path, pyverbs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rdma(machine("pcie_box", tmp_path), dev) == Offer(
        "rdma", True, "active: mlx5_0 100 Gb/s"
    )
    one = rdma(machine("hgx_roce_down", tmp_path), dev, KVCACHE_RDMA_NICS="mlx5_7:1")
    assert (one.usable, one.why) == (True, "active: mlx5_7 400 Gb/s")
    assert rdma(machine("rxe_vm", tmp_path), dev).usable


def end(host: str, *transports: str, device: str = "cpu", **more: str) -> End:
    return End(host=host, device=device, transports=transports, **more)


def test_the_readers_order_decides_among_what_both_have() -> None:
    verdict = meet(end("a", "shm", "tcp"), end("a", "tcp", "shm"))
    assert (verdict.transport, verdict.why) == ("tcp", "one machine")
    verdict = meet(end("a", "tcp"), end("a", "shm", "tcp"))
    assert verdict.transport == "tcp"
    assert ("shm", "a's cpu does not offer it") in verdict.passed_over


def test_between_machines_only_what_reaches_between_machines() -> None:
    ways = ("shm", "rdma", "tcp")
    verdict = meet(end("a", *ways, listen_host="10.0.0.1"), end("b", *ways))
    assert (verdict.transport, verdict.why) == ("rdma", "two machines")
    assert dict(verdict.passed_over) == {
        "cuda_ipc": "b's cpu has not opened it",
        "shm": "works within one machine",
    }
    deaf = meet(end("a", "tcp", listen_host="127.0.0.1"), end("b", "tcp"))
    assert deaf.transport == ""
    assert "a listens on 127.0.0.1" in dict(deaf.passed_over)["tcp"]


def test_gpus_of_one_machine() -> None:
    ways = ("cuda_ipc", "tcp")
    one = end("a", *ways, device="cuda:0", gpu="GPU-1")
    other = end("a", *ways, device="cuda:0", gpu="GPU-2")
    assert meet(one, one).why == "one device"
    verdict = meet(one, other, gpu_link="NVLink, 18 links")
    assert (verdict.transport, verdict.why) == ("cuda_ipc", "NVLink, 18 links")
    assert verdict.passed_over == ()


def test_nothing_in_common() -> None:
    verdict = meet(end("a", "shm"), end("a", "tcp"))
    assert verdict.transport == ""
    assert ("tcp", "a's cpu does not offer it") in verdict.passed_over


def test_transports_are_opened_by_name() -> None:
    for name in ("mem", "shm", "tcp"):
        made = open_transport(name, host="h", secret="s", listen_host="127.0.0.1")
        assert made.name == name
        made.close()
    with pytest.raises(UnknownTransport):
        open_transport("teleport", host="h", secret="s", listen_host="127.0.0.1")


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ('ID=ubuntu\nID_LIKE="debian"\n', "apt-get install python3-pyverbs"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "dnf install python3-pyverbs"),
        ("ID=arch\n", "pacman -S"),
        ("ID=else\n", "pip install pyverbs"),
    ],
)
def test_what_to_install_by_distribution(tmp_path: Path, release: str, command: str) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text(release)
    assert command in verbs.remedy(tmp_path, prefix="/opt/env")


def test_what_is_installed_for_the_system_is_linked(tmp_path: Path) -> None:
    there = tmp_path / "usr/lib/python3/dist-packages/pyverbs"
    there.mkdir(parents=True)
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    (there / f"device.{tag}-x86_64-linux-gnu.so").touch()
    assert f"ln -s {there} /opt/env/lib/python3." in verbs.remedy(tmp_path, "/opt/env")
    for built in there.iterdir():
        built.rename(there / "device.cpython-27-x86_64-linux-gnu.so")
    assert "built for CPython 27" in verbs.remedy(tmp_path, "/opt/env")


def test_the_nics_for_a_device_are_the_nearest_and_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = machine("hgx_roce_down", tmp_path)
    monkeypatch.setattr(opening, "_pci_of", lambda device: found.gpus[int(device[5:])].place.pci)
    assert near_nics("cuda:2", found) == ["mlx5_2"]
    assert near_nics("cuda:3", found) == ["mlx5_0", "mlx5_1", "mlx5_2"]  # its own is down
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 113})
    assert near_nics("cpu", found) == ["mlx5_0", "mlx5_1", "mlx5_2"]  # mlx5_3 is slower
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 56})
    assert len(near_nics("cpu", found)) == 6
    assert near_nics("cpu", machine("no_rdma", tmp_path)) == []


@pytest.mark.parametrize("trouble", [False, True])
def test_rdma_is_opened_on_them_unless_the_environment_names_some(
    monkeypatch: pytest.MonkeyPatch, trouble: bool
) -> None:
    asked: list[tuple[str, ...] | None] = []

    class Played:
        def __init__(self, secret: str, *, listen_host: str, settings: Any) -> None:
            asked.append(settings.nics)
            if trouble and settings.nics == ("near0",):
                raise UnusableTransport("near0 does not open", remedy="")

    monkeypatch.setattr(opening, "_load", lambda module, name: Played)
    monkeypatch.setattr(opening, "near_nics", lambda device: ["near0"])
    monkeypatch.delenv("KVCACHE_RDMA_NICS", raising=False)
    open_transport("rdma", host="h", secret="s", listen_host="127.0.0.1")
    assert asked == ([("near0",), None] if trouble else [("near0",)])
    monkeypatch.setenv("KVCACHE_RDMA_NICS", "mine0,mine1")
    open_transport("rdma", host="h", secret="s", listen_host="127.0.0.1")
    assert asked[-1] == ("mine0", "mine1")
