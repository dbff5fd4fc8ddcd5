"""What CUDA says of this machine, as a program of its own: `python -m pdbatch.doctor.probe`.

Prints one JSON document. It runs apart because a driver that is out of order may hang or kill
whoever asks it; the doctor gives it so much time and no more.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any


def look() -> dict[str, Any]:
    """Loads torch and asks it; `error` says what went wrong."""
    found: dict[str, Any] = {"cuda": None, "gpus": [], "peers": [], "error": ""}
    try:
        import torch

        found["cuda"] = torch.version.cuda
        if torch.version.cuda is None:
            found["error"] = f"torch {torch.__version__} is built without CUDA"
            return found
        torch.cuda.init()  # type: ignore[no-untyped-call]
        count = torch.cuda.device_count()
        found["gpus"] = [_gpu(torch, index) for index in range(count)]
        found["peers"] = [
            [i, j, bool(torch.cuda.can_device_access_peer(i, j))]
            for i in range(count)
            for j in range(count)
            if i < j
        ]
    except Exception as error:
        found["error"] = " ".join(str(error).split())
    with contextlib.suppress(Exception):  # nvidia-ml-py is no dependency; nor does it matter
        _add_links(found)
    return found


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    seen = torch.cuda.get_device_properties(index)
    address = (getattr(seen, f"pci_{part}_id", 0) for part in ("domain", "bus", "device"))
    return {
        "name": seen.name,
        "uuid": f"GPU-{getattr(seen, 'uuid', '')}".removesuffix("GPU-"),
        "pci": "{:04x}:{:02x}:{:02x}.0".format(*address),
        "memory_bytes": seen.total_memory,
        "capability": f"{seen.major}.{seen.minor}",
    }


def _add_links(found: dict[str, Any]) -> None:
    """The number of NVLinks between each two, as a fourth entry of `peers`."""
    import pynvml as nvml

    nvml.nvmlInit()
    handles = [nvml.nvmlDeviceGetHandleByPciBusId(gpu["pci"].encode()) for gpu in found["gpus"]]
    active = [_active_links(nvml, handle) for handle in handles]
    for peer in found["peers"]:
        i, j = peer[:2]
        status = nvml.nvmlDeviceGetP2PStatus(
            handles[i], handles[j], nvml.NVML_P2P_CAPS_INDEX_NVLINK
        )
        straight = sum(pci == found["gpus"][j]["pci"] for pci in active[i])
        joined = status == nvml.NVML_P2P_STATUS_OK
        peer.append((straight or min(len(active[i]), len(active[j]))) if joined else 0)


def _active_links(nvml: Any, handle: Any) -> list[str]:
    """The PCI address at the far end of each link that is up: a GPU's or a switch's."""
    ends = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED:
                far = nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId
                text = far.decode() if isinstance(far, bytes) else str(far)
                ends.append(text.lower()[-12:])
        except nvml.NVMLError:
            break
    return ends


if __name__ == "__main__":
    print(json.dumps(look()))
