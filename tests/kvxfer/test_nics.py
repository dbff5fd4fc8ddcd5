"""NICs by sysfs, on trees of several machine types (`sysfs/*.txt` says what each is).

`SCRIPT` holds what FastDeploy's `get_rdma_nics.sh` printed for these trees, its tools (lspci, ip,
ethtool, ibdev2netdev) played from the same tree: "" where its assumptions about names and PCI
domains do not hold. Where it answers, kvxfer answers the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import sysfs_trees

from kvxfer.topology import (
    Link,
    Machine,
    by_node,
    choose,
    distance,
    gpu_distance,
    left_out,
    nearest,
    nics_for,
    rdma_nics_line,
    read_machine,
    usable,
)
from kvxfer.topology import __main__ as program

TREES = sorted(path.stem for path in sysfs_trees.HERE.glob("*.txt"))
NICS, NETDEV = "KVCACHE_RDMA_NICS=", "KV_CACHE_SOCKET_IFNAME="
ALL_BONDS = NICS + ",".join(f"mlx5_bond_{n}" for n in range(8))
SCRIPT = {
    ("hgx_roce_down", "gpu"): NICS + "mlx5_0,mlx5_1,mlx5_2,mlx5_6,mlx5_7,mlx5_11",
    ("hgx_roce_down", "cpu"): NETDEV + "eth8",
    ("hgx_roce_down", "cpu_ib"): NICS + "mlx5_3",
    ("hgx_roce_bonds", "cpu"): NETDEV + "bond1",
    ("hgx_roce_bonds", "cpu_ib"): ALL_BONDS,
    ("no_rdma", "cpu"): NETDEV + "eth0",
    ("two_gpu_vm", "cpu"): NETDEV + "eth0",
}
OURS = {
    ("dgx_h100", "gpu"): NICS + "mlx5_0,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_9,mlx5_10,mlx5_11",
    ("dgx_h100", "cpu"): NETDEV + "eno3",
    ("hgx_roce_bonds", "gpu"): ALL_BONDS,
    ("cloud_vm_vfs", "gpu"): NICS + ",".join(f"mlx5_ib{n}" for n in range(8)),
    ("cloud_vm_vfs", "cpu"): NETDEV + "eth0",
    ("cloud_vm_vfs", "cpu_ib"): NICS + ",".join(f"mlx5_ib{n}" for n in range(8)) + ",mlx5_an0",
    ("pcie_box", "gpu"): NICS + "mlx5_0",
    ("pcie_box", "cpu"): NETDEV + "enp65s0f0np0",
    ("pcie_box", "cpu_ib"): NICS + "mlx5_0",
    ("rxe_vm", "cpu_ib"): NICS + "rxe0,rxe1",
    ("rxe_joined", "cpu_ib"): NICS + "rxe0",
    ("rxe_joined", "cpu"): NETDEV + "rd0",
}


def machine(name: str, tmp_path: Path) -> Machine:
    return sysfs_trees.build(name, tmp_path).machine()


def names(nics: list) -> list[str]:
    return [nic.name for nic in nics]


@pytest.mark.parametrize("kind", ["gpu", "cpu", "cpu_ib"])
@pytest.mark.parametrize("name", TREES)
def test_the_line_is_that_of_get_rdma_nics(name: str, kind: str, tmp_path: Path) -> None:
    expected = SCRIPT.get((name, kind)) or OURS.get((name, kind), "")
    assert rdma_nics_line(machine(name, tmp_path), kind) == expected


def test_dgx_h100_each_gpu_has_the_nic_behind_its_own_switches(tmp_path: Path) -> None:
    found = machine("dgx_h100", tmp_path)
    pairs = {gpu.place.pci: names(nearest(found, gpu)) for gpu in found.gpus}
    assert pairs == {  # `nvidia-smi topo -m`: PXB on the diagonal, SYS or NODE elsewhere
        "0000:1b:00.0": ["mlx5_0"],
        "0000:43:00.0": ["mlx5_3"],
        "0000:52:00.0": ["mlx5_4"],
        "0000:61:00.0": ["mlx5_5"],
        "0000:9d:00.0": ["mlx5_6"],
        "0000:c3:00.0": ["mlx5_9"],
        "0000:d1:00.0": ["mlx5_10"],
        "0000:df:00.0": ["mlx5_11"],
    }
    links = [gpu_distance(found, found.gpus[0], nic).link for nic in found.nics]
    others = [Link.NODE] * 5 + [Link.SYS] * 6
    assert links == [Link.PXB, *others]
    assert set(left_out(found)) == {"mlx5_1", "mlx5_2", "mlx5_7", "mlx5_8"}  # storage, down
    assert left_out(found)["mlx5_1"] == "port 1 is DOWN"
    assert found.nodes == {0: "0-55,112-167", 1: "56-111,168-223"}
    first = found.nic("mlx5_0")
    assert first is not None and first.netdev == "ibp24s0"
    assert (first.rate_gbps, first.link_layers, first.place.node) == (400.0, "InfiniBand", 0)


def test_two_gpus_share_two_bonds_of_their_switch(tmp_path: Path) -> None:
    found = machine("hgx_roce_bonds", tmp_path)
    assert [names(nearest(found, gpu)) for gpu in found.gpus[:4]] == [
        ["mlx5_bond_0", "mlx5_bond_1"],
        ["mlx5_bond_0", "mlx5_bond_1"],
        ["mlx5_bond_2", "mlx5_bond_3"],
        ["mlx5_bond_2", "mlx5_bond_3"],
    ]
    links = [gpu_distance(found, found.gpus[0], nic).link for nic in found.nics]
    assert links == [Link.PIX] * 2 + [Link.NODE] * 2 + [Link.SYS] * 4
    bond = found.nic("mlx5_bond_3")
    assert bond is not None and bond.netdev == "bond4"
    gid = bond.ports[0].gids[3]
    assert (gid.index, gid.kind, gid.netdev) == (3, "RoCE v2", "bond4")
    assert gid.gid.endswith("ffff:1c03:000e")  # 28.3.0.14


def test_down_ports_and_virtual_functions_beside_their_own_are_left_out(tmp_path: Path) -> None:
    found = machine("hgx_roce_down", tmp_path)
    why = left_out(found)
    assert why["mlx5_5"] == why["mlx5_8"] == why["mlx5_4"] == "port 1 is DOWN"
    assert why["mlx5_12"] == "a virtual function of mlx5_0, which is here itself"
    orphan = found.gpu("00000000:5D:00.0")  # as NVML spells it; its own NIC is down
    assert orphan is not None
    assert names(nearest(found, orphan)) == ["mlx5_0", "mlx5_1", "mlx5_2"]
    assert names(nics_for(found, orphan)) == ["mlx5_0", "mlx5_1", "mlx5_2"]
    assert names(nics_for(found, node=1)) == ["mlx5_6", "mlx5_7", "mlx5_11"]
    assert names(nics_for(found, node=7)) == names(nics_for(found))
    assert {node: names(nics) for node, nics in by_node(found).items()} == {
        0: ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"],
        1: ["mlx5_6", "mlx5_7", "mlx5_11"],
    }


def test_without_switches_in_sight_the_cpu_node_decides(tmp_path: Path) -> None:
    found = machine("cloud_vm_vfs", tmp_path)
    near = {gpu.place.pci[:4]: names(nearest(found, gpu)) for gpu in found.gpus}
    first, second = ([f"mlx5_ib{n}" for n in which] for which in (range(4), range(4, 8)))
    assert near == dict.fromkeys(("0001", "0002", "0003", "0008"), first) | dict.fromkeys(
        ("0009", "000a", "000b", "000c"), second
    )  # and not mlx5_an0, which is as near but slower
    assert all(gpu.place.root_port == gpu.place.pci for gpu in found.gpus)


def test_software_devices_serve_where_nothing_else_is(tmp_path: Path) -> None:
    found = machine("rxe_vm", tmp_path)
    rxe, other = usable(found)
    assert rxe.emulated and rxe.netdev == "rd0" and rxe.place.node == -1
    assert other.netdev == "rd1"
    assert [gid.index for gid in rxe.ports[0].gids] == [0, 1]  # the empty one is none
    beside = """
devices/pci0000:40/0000:40:01.1/0000:41:00.0 | class=0x020000; vendor=0x15b3; numa_node=0
  infiniband/mlx5_0 | node_type=1: CA
    ports/1 | state=4: ACTIVE; rate=100 Gb/sec; link_layer=Ethernet
devices/virtual/infiniband/rxe0 | node_type=1: CA; parent=eth0
  ports/1 | state=4: ACTIVE; rate=2.5 Gb/sec; link_layer=Ethernet
devices/virtual/infiniband/siw0 | node_type=4: RNIC
  ports/1 | state=4: ACTIVE; rate=2.5 Gb/sec; link_layer=Ethernet
"""
    both = sysfs_trees.build_text(beside, tmp_path / "both").machine()
    assert names(usable(both)) == ["mlx5_0"]
    assert left_out(both) == {
        "rxe0": "software, and mlx5_0 is not",
        "siw0": "RNIC: has no plain reliable connections",
    }


def test_a_machine_without_anything(tmp_path: Path) -> None:
    found = read_machine(tmp_path / "nothing")
    assert (found.gpus, found.nics, found.netdevs, found.nodes) == ((), (), (), {})
    assert [rdma_nics_line(found, kind) for kind in ("gpu", "cpu", "cpu_ib")] == [""] * 3


def test_files_that_cannot_be_read_are_empty(tmp_path: Path) -> None:
    tree = sysfs_trees.build("pcie_box", tmp_path)
    port = tree.root / "class/infiniband/mlx5_0/ports/1"
    (port / "state").unlink()
    (port / "rate").write_text("nonsense")
    (port / "gids" / "1").unlink()
    (port / "gids" / "1").mkdir()  # reading fails with an errno, as a driver does
    nic = tree.machine().nic("mlx5_0")
    assert nic is not None and nic.ports[0].state == "unknown" and nic.ports[0].rate_gbps == 0
    assert [gid.index for gid in nic.ports[0].gids] == [0, 2, 3]
    assert usable(tree.machine()) == []


def test_a_list_that_somebody_gave_is_checked(tmp_path: Path) -> None:
    found = machine("hgx_roce_down", tmp_path)
    assert names(choose(found, ["mlx5_7", "mlx5_0"])) == ["mlx5_7", "mlx5_0"]
    with pytest.raises(ValueError, match="mlx5_5 has no active port"):
        choose(found, ["mlx5_5"])
    with pytest.raises(ValueError, match="mlx9 is not there"):
        choose(found, ["mlx9"])


def test_distances_need_no_order_and_one_node_is_near(tmp_path: Path) -> None:
    found = machine("pcie_box", tmp_path)
    one, other = (gpu.place for gpu in found.gpus)
    nic = found.nics[0].place
    assert distance(one, nic) == distance(nic, one)
    assert distance(one, other).link == Link.NODE
    assert distance(one, one).hops == 0
    lost = one.__class__("0001:00:00.0", ("pci0001:00", "0001:00:00.0"), -1)
    assert distance(lost, nic).link == Link.SYS
    assert distance(lost, nic, num_nodes=1).link == Link.NODE


def test_the_machine_at_hand_is_read_and_recorded(tmp_path: Path) -> None:
    here = read_machine()
    text = sysfs_trees.record(Path("/sys"))
    again = sysfs_trees.build_text(text, tmp_path).machine()
    assert [gpu.place for gpu in again.gpus] == [gpu.place for gpu in here.gpus]
    assert names(usable(again)) == names(usable(here))
    assert {n.name for n in again.netdevs} == {n.name for n in here.netdevs}
    assert again.nodes == here.nodes


def test_the_line_can_be_exported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = machine("hgx_roce_down", tmp_path)
    monkeypatch.setattr(program, "read_machine", lambda: found)
    assert program.main(["gpu"]) == 0
    assert capsys.readouterr().out == SCRIPT["hgx_roce_down", "gpu"] + "\n"
    assert program.main(["npu"]) == 2 and program.main([]) == 2
    monkeypatch.setattr(program, "read_machine", lambda: read_machine(tmp_path / "nothing"))
    assert program.main(["gpu"]) == 1
    assert "no RDMA device" in capsys.readouterr().err
