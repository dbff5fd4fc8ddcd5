"""What a machine has for moving KV, and what lies near what; read from sysfs, no driver called."""

from __future__ import annotations

from kvxfer.topology.machine import Gid, Gpu, Machine, Netdev, Nic, Place, Port, read_machine
from kvxfer.topology.nearest import (
    Distance,
    Link,
    by_node,
    distance,
    gpu_distance,
    left_out,
    nearest,
    own_node,
    usable,
)
from kvxfer.topology.rdma_nics import (
    choose,
    cpu_nics,
    gpu_nics,
    nics_for,
    rdma_nics_line,
    socket_netdev,
)

__all__ = [
    "Distance",
    "Gid",
    "Gpu",
    "Link",
    "Machine",
    "Netdev",
    "Nic",
    "Place",
    "Port",
    "by_node",
    "choose",
    "cpu_nics",
    "distance",
    "gpu_distance",
    "gpu_nics",
    "left_out",
    "nearest",
    "nics_for",
    "own_node",
    "rdma_nics_line",
    "read_machine",
    "socket_netdev",
    "usable",
]
