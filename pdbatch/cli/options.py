"""Options that commands share. Those that are settings arrive as one `Settings` object."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from pdbatch.config import Settings

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "home": {"metavar": "DIR", "help": "Where pdbatch keeps its files (~/.pdbatch)."},
    "database_url": {"metavar": "URL", "help": "The database (SQLite under the home)."},
    "broker_url": {"metavar": "URL", "help": "Redis; without it, an embedded one."},
    "model": {"metavar": "M", "help": "Alias, folder, GGUF file or hub name."},
    "role": {
        "type": click.Choice(["prefill", "decode", "mixed"]),
        "help": "What the worker does (mixed: both).",
    },
    "device": {"metavar": "D", "help": "auto, cpu, cuda:0, … (run: several, with commas)."},
    "tensor_parallel_size": {"metavar": "N", "help": "Devices that share a worker's model (1)."},
    "dtype": {"metavar": "T", "help": "auto, float32, bfloat16, float16."},
    "quantization": {
        "type": click.Choice(["wint8", "wint4"]),
        "help": "Weights of 8 or 4 bits, rounded after loading.",
    },
    "compile": {
        "type": click.Choice(["auto", "on", "off"]),
        "help": "Compile layers that have no form of ours, on a GPU (auto: off).",
    },
    "block_size": {"metavar": "N", "help": "Tokens in a block of the KV cache (16)."},
    "gpu_memory_utilization": {"metavar": "SHARE", "help": "Of the GPU's memory (0.9)."},
    "max_num_seqs": {"metavar": "N", "help": "Most sequences running at once."},
    "max_num_batched_tokens": {"metavar": "N", "help": "Most tokens in one step."},
    "max_model_len": {"metavar": "N", "help": "Most tokens of a sequence, prompt and output."},
    "kv_transport": {
        "metavar": "NAMES",
        "help": "How KV moves: auto, or best first some of cuda_ipc,shm,rdma,tcp.",
    },
    "kv_checksum": {
        "default": None,
        "help": "Send checksums of KV blocks and verify them (prefill workers decide).",
    },
    "shard_size": {"metavar": "N", "help": "Requests in one message (64)."},
}

_SWITCHES: Final = frozenset({"kv_checksum"})
ENGINE_OPTIONS: Final = (
    "compile",
    "block_size",
    "gpu_memory_utilization",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
)
"""What an engine is told, its size with vLLM's names and meanings."""


def settings_options(*names: str) -> Callable[[F], F]:
    """Adds `--home`, `--database-url`, `--set` and these settings as options; the command is
    called with `settings`."""
    shown = (*names, "home", "database_url")

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def call(*args: Any, set_: tuple[str, ...], **options: Any) -> Any:
            flags = {name: options.pop(name) for name in shown}
            return command(*args, settings=_load(flags, set_), **options)

        for name in reversed(shown):
            call = click.option(_spelled(name), name, **_OPTIONS[name])(call)
        extra = "Any setting, by its name in the README; may be repeated."
        call = click.option("--set", "set_", metavar="KEY=VALUE", multiple=True, help=extra)(call)
        return call  # type: ignore[return-value]

    return decorate


def _spelled(name: str) -> str:
    """As it stands on the command line; one that is on or off can be turned off too."""
    flag = name.replace("_", "-")
    return f"--{flag}/--no-{flag}" if name in _SWITCHES else f"--{flag}"


def json_option(command: F) -> F:
    """Adds `--json`, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="JSON on stdout, for scripts.")(
        command
    )


def _load(flags: dict[str, Any], pairs: tuple[str, ...]) -> Settings:
    from pdbatch.config import KEYS, Settings, unknown_key
    from pdbatch.errors import ConfigError

    given: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().lower().replace("-", "_")
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE, not {pair!r}")
        if key not in KEYS:
            raise unknown_key(key, "--set")
        given[key] = value
    return Settings.load({**given, **{k: v for k, v in flags.items() if v is not None}})
