"""Rounds of workloads through `LLM`, with figures for each.

1. The model is loaded and warm; the device's rates are measured before, while memory is free.
2. For each workload a small round is run that counts for nothing, then the rounds.
3. With a trace, one more round of each, up to `TRACED` prompts: what tracing costs is in no figure.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pdbatch.bench.floor import Rates, floor_s, measure_rates, settle
from pdbatch.bench.kernels import KernelTracer
from pdbatch.bench.plan import Plan
from pdbatch.bench.stages import Stages
from pdbatch.bench.subject import Subject, find, start
from pdbatch.bench.workloads import CPU_SCALE, Asked, Workload
from pdbatch.engine.llm import LLM
from pdbatch.engine.probe import watch
from pdbatch.engine.quantization.convert import Quantization
from pdbatch.engine.trace import Tracer
from pdbatch.errors import ConfigError, EngineError
from pdbatch.sampling import SamplingParams

TRACED = 512
"""Most prompts in a traced round."""
_WARM = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One workload, once."""

    workload: str
    seed: int
    num_prompts: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    floor_s: float
    lasting_floor_s: float | None
    """At the lasting rate of products; None where that was not measured."""
    steps: int
    stages_s: dict[str, float]
    """Host's seconds; `rest` is what no stage accounts for."""

    @property
    def in_tok_s(self) -> float:
        """Prompt tokens for each second."""
        return self.prompt_tokens / self.seconds

    @property
    def out_tok_s(self) -> float:
        """Output tokens for each second."""
        return self.output_tokens / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All rounds, and on what they ran."""

    model: str
    device: str
    dtype: str
    quantization: Quantization | None = None
    tensor_parallel_size: int
    rates: Rates
    """Of the first device; floors are those of all together."""
    start_s: float
    """Until the engine was ready."""
    scale: int
    """Lengths of the workloads are divided by this."""
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int
    rounds: list[Round]
    trace: str | None

    def medians(self) -> dict[str, float]:
        """Seconds by workload."""
        names = dict.fromkeys(one.workload for one in self.rounds)
        of = {name: [r.seconds for r in self.rounds if r.workload == name] for name in names}
        return {name: median(seconds) for name, seconds in of.items()}


def run(
    plan: Plan,
    on_ready: Callable[[Report], None] = lambda report: None,
    on_round: Callable[[Round], None] = lambda round_: None,
) -> Report:
    """Measure. `on_ready` is given a report without rounds, `on_round` each round as it ends.

    Raises ConfigError if a workload is too long for the model, EngineError if it cannot be run.
    """
    start_s = time.perf_counter()
    subject = find(plan)
    scale = 1 if subject.gpu else CPU_SCALE
    workloads = [workload.scaled(scale) for workload in plan.workloads]
    engine = _engine(plan, subject, workloads)
    rates = measure_rates(subject.device, subject.dtype)
    llm = start(subject, plan, engine)
    gc.collect()
    gc.freeze()  # as an engine's own process does, so that rounds differ by no search for garbage
    try:
        report = _report(plan, subject, llm, rates, scale, time.perf_counter() - start_s)
        on_ready(report)
        _measure(plan, subject, llm, workloads, report, on_round)
        return report
    finally:
        gc.unfreeze()
        llm.close()


def _report(
    plan: Plan, subject: Subject, llm: LLM, rates: Rates, scale: int, start_s: float
) -> Report:
    """Without rounds."""
    scheduler = llm.engine.scheduler
    return Report(
        model=subject.name,
        device=subject.where,
        dtype=str(subject.dtype).removeprefix("torch."),
        quantization=plan.quantization,
        tensor_parallel_size=subject.num_ranks,
        rates=rates,
        start_s=start_s,
        scale=scale,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        num_blocks=llm.engine.info.num_blocks,
        block_size=llm.engine.info.block_size,
        rounds=[],
        trace=str(plan.trace) if plan.trace else None,
    )


def _measure(
    plan: Plan,
    subject: Subject,
    llm: LLM,
    workloads: list[Workload],
    report: Report,
    on_round: Callable[[Round], None],
) -> None:
    """All rounds into the report, then those that are traced."""
    bench = _Bench(llm, subject, subject.all_rates(report.rates), plan.waits)
    count = plan.num_prompts or (1000 if subject.gpu else 16)
    for workload in workloads:
        bench.warm(workload, min(count, _WARM))
        for number in range(plan.num_rounds or (3 if subject.gpu else 1)):
            report.rounds.append(bench.round(workload, count, plan.seed + number))
            on_round(report.rounds[-1])
    if plan.trace:
        bench.trace(workloads, min(count, TRACED), plan.trace)


class _Bench:
    """An engine with its stages watched."""

    def __init__(self, llm: LLM, subject: Subject, rates: Rates, waits: bool) -> None:
        """`rates` are those of all devices together."""
        self._llm, self._subject, self._cost, self._rates = llm, subject, subject.cost, rates
        self._stages = Stages()
        device = subject.device
        watch(llm.engine, self._stages, (lambda: settle(device)) if waits else None)

    def warm(self, workload: Workload, count: int) -> None:
        """A round that counts for nothing."""
        self._generate(workload.ask(count, self._subject.vocab_size, -1))

    def round(self, workload: Workload, count: int, seed: int) -> Round:
        """A round that counts."""
        asked = workload.ask(count, self._subject.vocab_size, seed)
        self._stages.clear()
        seconds = self._generate(asked)
        stages_s = {name: round(spent, 4) for name, spent in sorted(self._stages.seconds.items())}
        lasting = self._rates.lasting
        stages_s["rest"] = round(seconds - sum(self._stages.seconds.values()), 4)
        return Round(
            workload=workload.name,
            seed=seed,
            num_prompts=count,
            seconds=seconds,
            prompt_tokens=sum(len(one.prompt) for one in asked),
            output_tokens=sum(one.num_output_tokens for one in asked),
            floor_s=self._floor_s(asked, workload, self._rates),
            lasting_floor_s=self._floor_s(asked, workload, lasting) if lasting else None,
            steps=self._stages.num_steps,
            stages_s=stages_s,
        )

    def _floor_s(self, asked: list[Asked], workload: Workload, rates: Rates) -> float:
        places = self._llm.engine.scheduler.max_num_seqs
        return floor_s(asked, workload.shared_tokens, places, self._cost, rates)

    def trace(self, workloads: list[Workload], count: int, path: Path) -> None:
        """One more round of each, traced."""
        tracer = Tracer(path, f"pdbatch bench {self._subject.name}")
        watcher = KernelTracer(tracer, self._subject.device)
        watch(self._llm.engine, watcher)
        try:
            for workload in workloads:
                asked = workload.ask(count, self._subject.vocab_size, -2)
                watcher.begin()
                start_s = time.perf_counter()
                self._generate(asked)
                tracer.span(f"workload {workload.name}", start_s, time.perf_counter())
                watcher.finish()
        finally:
            tracer.close()

    def _generate(self, asked: list[Asked]) -> float:
        """Seconds. Raises EngineError if an output is not as long as it was asked for."""
        params = [
            SamplingParams(temperature=0, max_tokens=one.num_output_tokens, ignore_eos=True)
            for one in asked
        ]
        settle(self._subject.device)
        start_s = time.perf_counter()
        outputs = self._llm.generate([one.prompt for one in asked], params)
        seconds = time.perf_counter() - start_s
        for one, output in zip(asked, outputs, strict=True):
            if output.error is not None:
                raise EngineError(f"a prompt was refused: {output.error.message}")
            if len(output.outputs[0].token_ids) != one.num_output_tokens:
                got = len(output.outputs[0].token_ids)
                raise EngineError(f"{got} tokens came out instead of {one.num_output_tokens}")
        return seconds


def _engine(plan: Plan, subject: Subject, workloads: list[Workload]) -> dict[str, Any]:
    """Keywords of `LLM`: as given, and no longer sequences than the workloads have."""
    longest = max(workload.most_tokens for workload in workloads)
    given = {name: value for name, value in plan.engine.items() if value is not None}
    limit = min(given.get("max_model_len", longest), subject.max_model_len)
    if limit < longest:
        raise ConfigError(
            f"the workloads have sequences of {longest} tokens, {subject.name} takes {limit}",
            remedy="Choose other workloads, or another model or max_model_len.",
        )
    return {**given, "max_model_len": limit}
