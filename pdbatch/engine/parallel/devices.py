"""Which device each rank has."""

from __future__ import annotations

from pdbatch.errors import ConfigError


def rank_devices(device: str, size: int, num_gpus: int) -> list[str]:
    """One device for each of `size` ranks; `num_gpus` are there.

    `cuda:2` means the GPUs from 2 on, `cuda:0,cuda:3` these, `auto` the first ones or the CPU,
    which any number of ranks may share. Raises ConfigError.
    """
    names = [name.strip() for name in device.split(",")]
    if names == ["auto"]:
        names = ["cuda:0" if num_gpus else "cpu"]
    if len(names) == 1 and names[0].startswith("cuda"):
        first = _index(names[0])
        names = [f"cuda:{first + rank}" for rank in range(size)]
    elif names == ["cpu"]:
        names *= size
    if len(names) != size:
        raise ConfigError(
            f"device {device} names {len(names)} devices for {size} ranks",
            remedy=f"name one, or {size} with commas between them",
        )
    gpus = [_index(name) for name in names if name != "cpu"]
    if len(set(gpus)) < len(gpus) or (gpus and len(gpus) < size):
        raise ConfigError(f"device {device}: ranks on GPUs need one each")
    if gpus and max(gpus) >= num_gpus:
        raise ConfigError(
            f"{size} ranks need the GPUs {', '.join(names)}: torch sees {num_gpus}",
            remedy="use a smaller --tensor-parallel-size, or --device cpu",
        )
    return names


def _index(name: str) -> int:
    """The number of a GPU. Raises ConfigError."""
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise ConfigError(f"device {name!r} is unknown", remedy="use cpu or cuda:0")
    return int(index or "0")
