"""pdbatch: large batches of prompts through language models, prefill and decode apart.

The public names are those of `__all__`; each is loaded when it is first used, so that
`import pdbatch` is quick and brings neither torch nor a database.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pdbatch.client import Client
    from pdbatch.config import Settings
    from pdbatch.engine.llm import LLM
    from pdbatch.errors import (
        ConfigError,
        EngineDied,
        EngineError,
        HandoffError,
        InputError,
        ModelError,
        PdbatchError,
        QueueError,
        StoreError,
        UnknownJob,
        UsageError,
        WaitTimeout,
    )
    from pdbatch.job import Job
    from pdbatch.request import CompletionOutput, RequestError, RequestOutput, Usage
    from pdbatch.result import Result
    from pdbatch.sampling import SamplingParams
    from pdbatch.states import JobState, ResultStatus
    from pdbatch.store.rows import JobView

__version__ = "0.1.0"

_HOMES: Final = {
    "pdbatch.client": ("Client",),
    "pdbatch.config": ("Settings",),
    "pdbatch.engine.llm": ("LLM",),
    "pdbatch.errors": (
        "ConfigError",
        "EngineDied",
        "EngineError",
        "HandoffError",
        "InputError",
        "ModelError",
        "PdbatchError",
        "QueueError",
        "StoreError",
        "UnknownJob",
        "UsageError",
        "WaitTimeout",
    ),
    "pdbatch.job": ("Job",),
    "pdbatch.request": ("CompletionOutput", "RequestError", "RequestOutput", "Usage"),
    "pdbatch.result": ("Result",),
    "pdbatch.sampling": ("SamplingParams",),
    "pdbatch.states": ("JobState", "ResultStatus"),
    "pdbatch.store.rows": ("JobView",),
}
_WHERE: Final = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "Client",
    "CompletionOutput",
    "ConfigError",
    "EngineDied",
    "EngineError",
    "HandoffError",
    "InputError",
    "Job",
    "JobState",
    "JobView",
    "ModelError",
    "PdbatchError",
    "QueueError",
    "RequestError",
    "RequestOutput",
    "Result",
    "ResultStatus",
    "SamplingParams",
    "Settings",
    "StoreError",
    "UnknownJob",
    "Usage",
    "UsageError",
    "WaitTimeout",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'pdbatch' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
