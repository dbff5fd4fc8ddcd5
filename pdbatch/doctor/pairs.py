"""Which transport each prefill worker and each decode worker would take, and why."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import TYPE_CHECKING

from kvxfer.choice import LOOPBACK, End, meet
from pdbatch.config import Settings
from pdbatch.doctor.nics import kind_of, opened
from pdbatch.doctor.report import Pair, Report
from pdbatch.errors import PdbatchError

if TYPE_CHECKING:
    from pdbatch.store import WorkerView


def look(report: Report, settings: Settings) -> None:
    """Fills in the pairs: of the live workers in the store, else of this machine's devices."""
    workers = _live_workers(report, settings)
    report.live_workers = len(workers)
    sources = [worker for worker in workers if worker.role == "prefill"]
    readers = [worker for worker in workers if worker.role == "decode"]
    for source, reader in product(sources, readers):
        if source.model == reader.model:
            report.pairs.append(_of_workers(report, source, reader))
    for source in sources:
        if not any(source.model == reader.model for reader in readers):
            text = f"no decode worker for {source.model}, which {source.name} prefills"
            report.add("workers", "warning", text, "Start one: `pdbatch worker --role decode`.")
    for pair in report.pairs:
        if not pair.transport:
            text = f"KV cannot move from {pair.source} to {pair.reader}: {pair.why}"
            remedy = "Give both a common transport; for two machines set listen_host on the first."
            report.add("workers", "broken", text, remedy)
    if not report.pairs:
        report.pairs = list(_of_devices(report, settings))


def _live_workers(report: Report, settings: Settings) -> list[WorkerView]:
    from pdbatch.store import Store

    try:
        with Store.open(settings.database_url, retry_s=0.0) as store:
            workers = store.workers.list()
    except (PdbatchError, ImportError):
        return []  # said already
    if workers:
        names = ", ".join(f"{worker.name} ({worker.role})" for worker in workers)
        report.add("workers", "ok", f"{len(workers)} live: {names}")
    else:
        report.add("workers", "note", "none is live; pairs are those of this machine's devices")
    return workers


def _of_workers(report: Report, source: WorkerView, reader: WorkerView) -> Pair:
    names = f"{source.name}@{source.host}", f"{reader.name}@{reader.host}"
    layouts = source.info.get("layout"), reader.info.get("layout")
    if layouts[0] != layouts[1]:
        why = f"they keep KV in different shapes ({layouts[0]} and {layouts[1]})"
        return Pair(source=names[0], reader=names[1], transport="", why=why, not_taken={})
    return _pair(report, names[0], names[1], _end(source), _end(reader))


def _of_devices(report: Report, settings: Settings) -> Iterable[Pair]:
    """On this machine, every device to every device of its kind."""
    host = report.host
    gpus = [gpu for gpu in report.gpus if gpu.device]
    ends = [
        End(
            host=host,
            device=gpu.device,
            gpu=gpu.uuid,
            transports=opened(report, settings, gpu.device),
            listen_host=settings.listen_host,
        )
        for gpu in gpus
    ]
    cpu = End(host=host, device="cpu", transports=opened(report, settings, "cpu"))
    for end in (cpu, *ends):
        if end.transports:
            yield _pair(report, end.device, end.device, end, end)
    for number, one in enumerate(ends):
        for other in ends[number + 1 :]:
            if one.transports:
                yield _pair(report, one.device, other.device, one, other)
    if not settings.listen_host.startswith(LOOPBACK) and cpu.transports:
        far = End(host="another machine", device="cpu", transports=cpu.transports)
        yield _pair(report, "cpu", "another machine", cpu, far)


def _end(worker: WorkerView) -> End:
    return End(
        host=worker.host,
        device=worker.device,
        transports=tuple(worker.info.get("transports") or ()),
        gpu=str(worker.info.get("gpu") or ""),
        listen_host=str(worker.info.get("listen_host") or ""),
    )


def _pair(report: Report, source: str, reader: str, one: End, other: End) -> Pair:
    link = _link(report, one, other)
    verdict = meet(one, other, gpu_link=link, closed=_closed(report, other))
    return Pair(
        source=source,
        reader=reader,
        transport=verdict.transport,
        why=verdict.why,
        not_taken=dict(verdict.passed_over),
    )


def _closed(report: Report, end: End) -> dict[str, str]:
    """Why an end of this machine has not opened some transports."""
    if end.host != report.host:
        return {}
    offers = [offer for offer in report.transports if offer.device == kind_of(end.device)]
    return {o.name: "not in its kv_transport" if o.usable else o.why for o in offers}


def _link(report: Report, one: End, other: End) -> str:
    """How two GPUs of this machine reach each other; "" where that is not known."""
    devices = {gpu.uuid: gpu.device for gpu in report.gpus if gpu.uuid}
    here = {devices.get(end.gpu, "") for end in (one, other)}
    found = (pair.words for pair in report.gpu_pairs if {pair.one, pair.other} == here)
    return next(found, "")
