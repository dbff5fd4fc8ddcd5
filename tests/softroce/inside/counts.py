"""What the kernel holds for RDMA: protection domains, queue pairs, completion queues, memory."""

from __future__ import annotations

import json
import subprocess


def resources() -> dict[str, int]:
    """By kind, over all devices and processes of this machine."""
    said = subprocess.run(
        ["rdma", "--json", "resource", "show"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, int] = {}
    for device in json.loads(said):
        for kind, count in device.items():
            if isinstance(count, int) and not kind.startswith("if"):
                found[kind] = found.get(kind, 0) + count
    return found
