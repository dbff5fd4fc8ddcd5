"""How a job looks: as a document for scripts, as lines for people."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pdbatch.store import JobView

STAGES: Final = ("queued", "prefill", "handoff", "transfer", "decode")


def job_document(view: JobView) -> dict[str, Any]:
    """The job as `--json` prints it; times in seconds since the epoch, stages as sums."""
    return {
        "id": view.id,
        "state": view.state.value,
        "model": view.model,
        "input": view.input_name,
        "priority": view.priority,
        "weight": view.weight,
        "error": view.error,
        "metadata": dict(view.metadata),
        "created_at": view.created_at,
        "started_at": view.started_at,
        "finished_at": view.finished_at,
        "deadline_at": view.deadline_at,
        "counts": {
            "total": view.counts.total,
            "succeeded": view.counts.succeeded,
            "rejected": view.counts.rejected,
            "failed": view.counts.failed,
            "done": view.counts.done,
        },
        "tokens": {
            "prompt": view.tokens.prompt,
            "cached": view.tokens.cached,
            "output": view.tokens.output,
        },
        "elapsed_s": elapsed_s(view),
        "stages_s": {stage: getattr(view.times, f"{stage}_s") for stage in STAGES},
        "engine_s": view.times.engine_s,
        "transfer": {
            "bytes": view.transfer_bytes,
            "bytes_per_s": ratio(view.transfer_bytes, view.times.transfer_s),
            "share_of_engine_time": ratio(view.times.transfer_s, view.times.engine_s),
        },
    }


def elapsed_s(view: JobView) -> float:
    """Seconds from the start (the last line taken in) to the end, or until now."""
    if view.started_at is None:
        return 0.0
    return max(0.0, (view.finished_at or time.time()) - view.started_at)


def ratio(number: float, of: float) -> float | None:
    """None where there is nothing to compare with."""
    return number / of if of > 0 else None


def rate(number: float, seconds: float) -> str:
    """`12.3`, for so many in so many seconds."""
    return f"{number / seconds:,.1f}" if seconds > 0 else "-"


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `3:07`, `1:02:45`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def summary_rows(view: JobView, start_s: float = 0.0) -> Iterator[tuple[str, str]]:
    """What there is to know about a job, as (name, value).

    `start_s` of its time went into starting workers; the speeds leave it out.
    """
    counts, tokens, seconds = view.counts, view.tokens, elapsed_s(view)
    busy_s = max(seconds - start_s, 0.0)
    yield "job", view.id
    yield "state", view.state.value + (f": {view.error}" if view.error else "")
    if view.input_name:
        yield "input", view.input_name
    if view.model:
        yield "model", view.model
    yield "requests", f"{counts.total:,}"
    yield "  succeeded", f"{counts.succeeded:,}"
    yield "  rejected", f"{counts.rejected:,}"
    yield "  failed", f"{counts.failed:,}"
    if counts.done < counts.total:
        yield "  not done", f"{counts.total - counts.done:,}"
    yield "prompt tokens", f"{tokens.prompt:,} ({tokens.cached:,} cached)"
    yield "output tokens", f"{tokens.output:,}"
    starting = f", {duration(start_s)} of it starting workers" if start_s else ""
    yield "time", duration(seconds) + starting
    yield "requests/s", f"{rate(counts.done, busy_s)}"
    yield "tokens/s", f"{rate(tokens.prompt, busy_s)} in, {rate(tokens.output, busy_s)} out"
    if counts.succeeded:
        for stage in STAGES:
            mean_s = getattr(view.times, f"{stage}_s") / counts.succeeded
            yield f"  {stage}", f"{mean_s:.3f} s a request"
    if view.transfer_bytes:
        yield "KV moved", transfer_text(view)


def transfer_text(view: JobView) -> str:
    """`1.25 GB at 210 GB/s, 0.4% of the engines' time`."""
    text = f"{view.transfer_bytes / 1e9:,.2f} GB"
    speed = ratio(view.transfer_bytes, view.times.transfer_s)
    if speed is not None:
        text += f" at {speed / 1e9:,.1f} GB/s"
    share = ratio(view.times.transfer_s, view.times.engine_s)
    return text if share is None else f"{text}, {share:.1%} of the engines' time"


def job_lines(view: JobView) -> list[str]:
    """The summary as plain lines."""
    return [f"{name:<16}{value}" for name, value in summary_rows(view)]


def jobs_lines(views: Sequence[JobView]) -> list[str]:
    """One line for each job."""
    if not views:
        return ["no jobs"]
    lines = [f"{'job':<30}{'state':<13}{'done':>10}{'of':>10}{'errors':>8}  input"]
    for view in views:
        counts = view.counts
        numbers = f"{counts.done:>10}{counts.total:>10}{counts.rejected + counts.failed:>8}"
        lines.append(f"{view.id:<30}{view.state.value:<13}{numbers}  {view.input_name}")
    return lines
