"""The settings: one frozen object, built once for each process.

    flags  over  PDBATCH_* variables  over  ./pdbatch.toml  over  HOME/pdbatch.toml  over defaults

Every field of `Settings` is a key of `pdbatch.toml` and, in capitals after `PDBATCH_`, a
variable. A key that no field has is an error that names the nearest one. Text from
variables is read by the field's type (`pdbatch.settings_text`): sizes take units (`256MiB`),
lists take commas, an empty text means "not set".
"""

from __future__ import annotations

import difflib
import os
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pdbatch.errors import ConfigError
from pdbatch.settings_text import read_value, write_value

PREFIX = "PDBATCH_"
FILE_NAME = "pdbatch.toml"
TRANSPORTS = ("cuda_ipc", "shm", "rdma", "tcp")
"""What `kv_transport` may name; `auto` tries all, in this order."""
OTHER_VARIABLES = frozenset({"PDBATCH_DEBUG"})
"""Variables of ours that are no settings."""

Role = Literal["prefill", "decode", "mixed"]
Quantization = Literal["wint8", "wint4"]
Compile = Literal["auto", "on", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of a process, checked when built. Raises ConfigError."""

    home: Path = Path("~/.pdbatch")
    """Where the database, converted models, logs and the secret are kept."""
    database_url: str = ""
    """SQLAlchemy URL, SQLite or PostgreSQL; empty: `sqlite:///<home>/pdbatch.db`."""
    broker_url: str | None = None
    """Redis (6.2 or newer) or Valkey; empty: an embedded one on this machine."""
    result_backend: str | None = None
    """Where Celery keeps the results of `generate`; empty: the broker."""
    model: str = "smollm2-135m"
    """Alias, folder, GGUF file, hub name or `random:SHAPE`; of workers, and of jobs whose
    lines name none."""
    device: str = "auto"
    """`auto` (the first GPU, else the CPU), `cpu`, `cuda:0`, …"""
    tensor_parallel_size: int = 1
    """Devices that share a worker's model, from its `device` on or those with commas there."""
    dtype: str = "auto"
    """`auto` (float32 on the CPU, the model's own on a GPU), `float32`, `bfloat16`, `float16`."""
    quantization: Quantization | None = None
    """`wint8` or `wint4`: weights rounded to so many bits after loading; empty: not."""
    compile: Compile = "auto"
    """`on`, `off`: compile layers that have no form of ours, on a GPU with Triton; `auto`: off."""
    role: Role = "mixed"
    """What a worker does: `prefill` hands over after the first token, `decode` takes over."""
    block_size: int = 16
    """Tokens in a block of the KV cache; a power of two."""
    num_gpu_blocks: int | None = None
    """Blocks in the pool; empty: sized from `kv_cache_bytes` or from what is free."""
    kv_cache_bytes: int | None = None
    """Bytes of the KV cache; empty: what the GPU has left, 1 GiB on the CPU."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that a worker may use."""
    max_num_seqs: int | None = None
    """Most sequences that run at once; empty: 512 on a GPU, 64 on the CPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step; empty: 16384 on a GPU, 2048 on the CPU."""
    max_model_len: int | None = None
    """Most tokens of a sequence, prompt and output; empty: the model's own."""
    enable_prefix_caching: bool = True
    """Find the KV of equal leading blocks instead of computing it again."""
    pinned_share: float = 0.5
    """Prefill starts no sequence while more of its blocks than this wait for decode workers."""
    shard_size: int = 64
    """Requests in one message."""
    queue_low: int = 16
    """The feeder fills a queue again when it holds fewer messages than this …"""
    queue_high: int = 64
    """… up to this many."""
    worker_shards: int | None = None
    """Shards that a worker works on at once; empty: so many that twice the sequences that can run
    are here, at least 8."""
    heartbeat_s: float = 2.0
    """Seconds between two signs of life of a worker."""
    worker_ttl_s: float = 8.0
    """A worker without a sign of life for so long is declared dead."""
    requeue_after_s: float = 5.0
    """A published shard that nobody claimed is published again when its queue is empty so long."""
    reconcile_every_s: float = 0.5
    """Seconds between two rounds of the reconciler."""
    kv_lease_s: float = 30.0
    """Prefilled blocks wait so long for a decode worker before their lease must be renewed."""
    claim_lease_s: float = 10.0
    """A decode worker's claim on a hand-off ends after so long without renewal."""
    kv_transport: tuple[str, ...] = ("auto",)
    """`auto`, or ways for KV to move, best first: some of `cuda_ipc,shm,rdma,tcp`."""
    kv_checksum: bool = False
    """Prefill workers send checksums of their KV blocks, and decode workers verify them."""
    max_attempts: int = 10
    """A request that was lost so often with its worker ends in an error row."""
    result_group_size: int = 512
    """Most rows in one write of results …"""
    result_group_ms: int = 200
    """… and the longest that a finished request waits for the others of its write."""
    claim_bytes: int = 256 * 2**20
    """Most bytes of KV that a decode worker claims at a time."""
    log_dir: Path | None = None
    """Logs of the processes that `run` and `up` start; empty: `<home>/logs`."""
    trace: Path | None = None
    """A folder: each worker's engine writes a trace there, for Perfetto; empty: none does."""
    log_level: LogLevel = "info"
    """`debug`, `info`, `warning` or `error`."""
    secret: str | None = None
    """What workers prove to each other before KV moves; empty: made once, in `<home>/secret`."""
    listen_host: str = "127.0.0.1"
    """The address on which a worker serves its KV; other machines reach no loopback."""
    flower_port: int = 5555
    """Flower's port on the loopback."""
    max_line_bytes: int = 16 * 2**20
    """Longest line of an input; longer ones end in the error file."""
    engine: Literal["auto", "null"] = "auto"
    """`null` runs no model: constant tokens at once, for measuring everything else."""
    worker_name: str | None = None
    """Name of a worker, unique in the cluster; empty: role and process id."""
    worker_threads: int | None = None
    """torch's threads in a worker on the CPU; empty: torch's default."""

    def __post_init__(self) -> None:
        put = object.__setattr__  # the way of frozen dataclasses to complete themselves
        put(self, "home", Path(self.home).expanduser().absolute())
        if not self.database_url:
            put(self, "database_url", f"sqlite:///{self.home / 'pdbatch.db'}")
        if self.log_dir is None:
            put(self, "log_dir", self.home / "logs")
        _check(self)

    @classmethod
    def load(
        cls,
        flags: Mapping[str, object] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
    ) -> Settings:
        """The settings of this process.

        `flags` holds values by field name; those that are None were not given. `env`
        defaults to the process's environment, `cwd` to its directory. Raises ConfigError.
        """
        env = os.environ if env is None else env
        values = _from_file(Path(cwd or Path.cwd()) / FILE_NAME)
        values |= _from_env(env)
        values |= {key: value for key, value in (flags or {}).items() if value is not None}
        home = Path(str(values.get("home") or "~/.pdbatch")).expanduser()
        below = _from_file(home / FILE_NAME)
        if "home" in below:
            raise ConfigError(f"{home / FILE_NAME}: `home` cannot be set in a file inside of it")
        return cls(**_typed(below | values))

    def to_env(self) -> dict[str, str]:
        """These settings as variables for a child process, complete and exact."""
        return {
            PREFIX + field.name.upper(): write_value(getattr(self, field.name))
            for field in fields(self)
        }

    @property
    def logs(self) -> Path:
        """The folder of logs, whether set or by default."""
        return self.log_dir or self.home / "logs"

    @property
    def embedded_broker_url(self) -> str:
        """Where the embedded Redis of `pdbatch up` listens: a socket in `<home>/run`."""
        return f"redis+socket://{self.home / 'run' / 'redis.sock'}"

    def cluster_secret(self) -> str:
        """`secret`, or the one in `<home>/secret`, made there (mode 0600) if there is none."""
        return self.secret or _kept_secret(self.home / "secret")


KEYS = tuple(field.name for field in fields(Settings))
"""The settings' names, in the order of the documentation."""


def unknown_key(key: str, where: str) -> ConfigError:
    """The error for a key that no field has."""
    near = difflib.get_close_matches(key.lower().removeprefix("pdbatch_"), KEYS, n=1)
    shown = key if not key.startswith(PREFIX) or not near else None
    best = f"did you mean `{near[0] if shown else PREFIX + near[0].upper()}`?" if near else None
    return ConfigError(
        f"{where}: unknown setting `{key}`",
        remedy=best or "The README lists all settings.",
    )


def _from_file(path: Path) -> dict[str, object]:
    try:
        values: dict[str, object] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    for key in values:
        if key not in KEYS:
            raise unknown_key(key, str(path))
    if isinstance(home := values.get("home"), str):
        values["home"] = path.parent / Path(home).expanduser()
    return values


def _from_env(env: Mapping[str, str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, text in env.items():
        if not name.startswith(PREFIX) or name in OTHER_VARIABLES:
            continue
        key = name.removeprefix(PREFIX).lower()
        if key not in KEYS or name != name.upper():
            raise unknown_key(name, "environment")
        values[key] = text
    return values


def _typed(values: Mapping[str, object]) -> dict[str, Any]:
    """Values by their fields' types; an empty text becomes None, or is left out."""
    typed: dict[str, Any] = {}
    for field in fields(Settings):
        if field.name not in values:
            continue
        value = read_value(field.name, str(field.type), values[field.name])
        if value is not None or "None" in str(field.type):
            typed[field.name] = value
    return typed


def _check(settings: Settings) -> None:
    for field in fields(settings):
        value = getattr(settings, field.name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not value > 0:
            raise ConfigError(f"{field.name} must be above 0, not {value}")
    for name in ("gpu_memory_utilization", "pinned_share"):
        if getattr(settings, name) > 1:
            raise ConfigError(f"{name} must be at most 1, not {getattr(settings, name)}")
    for low, high in (("queue_low", "queue_high"), ("heartbeat_s", "worker_ttl_s")):
        if getattr(settings, low) > getattr(settings, high):
            raise ConfigError(f"{low} must not be above {high}")
    if settings.block_size & (settings.block_size - 1):
        raise ConfigError(f"block_size must be a power of two, not {settings.block_size}")
    _check_transports(settings.kv_transport)
    if settings.flower_port > 65535:
        raise ConfigError(f"flower_port must be a port, not {settings.flower_port}")


def _check_transports(names: tuple[str, ...]) -> None:
    if names == ("auto",):
        return
    for name in names:
        if name not in TRANSPORTS:
            near = difflib.get_close_matches(name, TRANSPORTS, n=1)
            known = f"`auto`, or a list of {', '.join(TRANSPORTS)}"
            raise ConfigError(
                f"kv_transport names {name!r}",
                remedy=f"Did you mean {near[0]}?" if near else f"It takes {known}.",
            )
    if not names:
        raise ConfigError("kv_transport must name at least one transport, or `auto`")


def _kept_secret(path: Path) -> str:
    """Made under another name and then linked, so that of two makers one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        fresh = path.with_name(f".secret-{os.getpid()}-{secrets.token_hex(4)}")
        fresh.touch(mode=0o600, exist_ok=False)
        fresh.write_text(secrets.token_hex(32), encoding="ascii")
        try:
            os.link(fresh, path)
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    text = path.read_text(encoding="ascii").strip()
    if not text:
        raise ConfigError(f"{path} is empty", remedy="Remove it; a new secret is made.")
    return text
