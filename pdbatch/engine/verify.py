"""`pdbatch verify`: prefill, hand-off and decode against transformers' `generate`, token by token.

1. Prompts of 5 to 1,500 tokens (or what the model can take), half of them with a shared prefix.
2. The reference: `generate` on the same weights, float32, greedy, one prompt at a time.
3. For each case (transport, prefix caching on or off, preemption forced) a prefill and a decode
   engine, as two processes, or as two engines in this one; descriptors are handed across directly.
4. A case holds if all tokens of all prompts are equal, the accounts of blocks add up and, where
   preemption is to be forced, it happened.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from pdbatch.engine import loader
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.messages import EngineRequest
from pdbatch.engine.tokenizer import PromptError
from pdbatch.engine.verify_pair import LocalSide, Pair, ProcessSide
from pdbatch.request import RequestOutput, RequestSpec
from pdbatch.sampling import SamplingParams

_TEXT = (
    "A river begins as a thread of water high in the hills and gathers other threads until it is "
    "wide enough to carry boats. Its people count the seasons by it: in spring 1,402 barges came "
    "down with timber, in autumn 37 went up with salt; on quiet days children asked why the sea "
    "never fills. def depth(level, rain): return max(0.0, level + rain * 0.75 - 12). Über die "
    "Brücke gehen täglich viele Menschen, und am Abend zählt der Wärter die Laternen. "
)


class Mismatch(msgspec.Struct, frozen=True, kw_only=True):
    """Where one prompt's output leaves the reference."""

    prompt: int
    num_prompt_tokens: int
    position: int
    """First output token that differs."""
    expected: list[int]
    got: list[int]
    error: str | None = None


class Case(msgspec.Struct, kw_only=True):
    """One configuration of the two engines, and what came of it."""

    name: str
    transport: str
    prefix_caching: bool
    preemption: bool
    ok: bool = False
    equal: int = 0
    """Prompts whose tokens are all equal."""
    tokens: int = 0
    """Output tokens compared."""
    cached_tokens: int = 0
    pulled_bytes: int = 0
    preemptions: int = 0
    failed_pulls: int = 0
    seconds: float = 0.0
    problem: str | None = None
    mismatches: list[Mismatch] = []


class Report(msgspec.Struct, kw_only=True):
    """All cases."""

    model: str
    num_prompts: int
    shortest: int
    longest: int
    max_tokens: int
    reference_seconds: float
    cases: list[Case] = []

    @property
    def ok(self) -> bool:
        """Whether every case holds."""
        return bool(self.cases) and all(case.ok for case in self.cases)


def run(
    model: str,
    *,
    home: str | Path | None = None,
    num_prompts: int = 64,
    max_tokens: int = 16,
    shortest: int = 5,
    longest: int = 1500,
    transports: Sequence[str] = ("shm", "tcp"),
    kv_checksum: bool = False,
    prefix_caching: Sequence[bool] = (True, False),
    preemption: bool = True,
    processes: bool = True,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Verify a model on the CPU in float32. `progress` gets a line before each part.

    Raises ModelError, ConfigError, EngineDied; a difference is no error but in the report.
    """
    say = progress or (lambda line: None)
    place = str(home or os.environ.get("PDBATCH_HOME") or Path.home() / ".pdbatch")
    say(f"loading {model}")
    loaded = loader.load(model, place, "cpu", "float32")
    longest = min(longest, loaded.max_model_len - max_tokens)
    prompts = make_prompts(loaded, num_prompts, shortest, longest, seed)
    say(f"transformers' generate: {num_prompts} prompts, {sum(map(len, prompts))} tokens")
    start = time.monotonic()
    expected = list(reference(loader.prepare(model, place), loaded, prompts, max_tokens))
    report = Report(
        model=loaded.name,
        num_prompts=num_prompts,
        shortest=min(map(len, prompts)),
        longest=max(map(len, prompts)),
        max_tokens=max_tokens,
        reference_seconds=time.monotonic() - start,
    )
    base = EngineConfig(
        model=model,
        home=place,
        device="cpu",
        dtype="float32",
        threads=threads,
        secret="verify",
        kv_checksum=kv_checksum,
    )
    for case in _cases(transports, prefix_caching, preemption):
        say(case.name)
        _run_case(case, base, None if processes else loaded, prompts, expected, max_tokens)
        report.cases.append(case)
    return report


def make_prompts(
    loaded: LoadedModel, count: int, shortest: int, longest: int, seed: int
) -> list[list[int]]:
    """Token ids, lengths evenly spread on a logarithmic scale; every second begins alike."""
    rng = random.Random(seed)
    source = _source(loaded)
    shared = _walk(rng, source, longest // 3 + 1)
    steps = max(1, count - 1)
    lengths = [round(shortest * (longest / shortest) ** (i / steps)) for i in range(count)]
    rng.shuffle(lengths)
    prompts = []
    for index, length in enumerate(lengths):
        same = shared[: length * 2 // 3] if index % 2 else []
        prompts.append(same + _walk(rng, source, length - len(same)))
    return prompts


@torch.inference_mode()
def reference(
    folder: Path, loaded: LoadedModel, prompts: Sequence[list[int]], max_tokens: int
) -> Iterator[list[int]]:
    """Output tokens of transformers' own model and `generate`, greedy, one prompt at a time."""
    import transformers

    zoo: Any = transformers
    model = zoo.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    greedy = zoo.GenerationConfig(
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(loaded.eos_token_ids) or None,
        pad_token_id=0,
    )
    model.generation_config = greedy  # the model's own may ask for penalties
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        yield out[0, len(prompt) :].tolist()


def _run_case(
    case: Case,
    base: EngineConfig,
    loaded: LoadedModel | None,
    prompts: Sequence[list[int]],
    expected: Sequence[list[int]],
    max_tokens: int,
) -> None:
    """Both engines, all prompts, the comparison; everything found out is put into the case."""
    config = replace(
        base, kv_transport=(case.transport,), enable_prefix_caching=case.prefix_caching
    )
    prefill = replace(config, role="prefill", worker="prefill")
    decode = replace(config, role="decode", worker="decode")
    if case.preemption:
        decode = replace(decode, preempt_every_steps=3)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    requests = [
        EngineRequest(
            key=f"verify:{index}",
            spec=RequestSpec(prompt_token_ids=tuple(prompt), sampling=params),
        )
        for index, prompt in enumerate(prompts)
    ]
    make = ProcessSide if loaded is None else (lambda config: LocalSide(config, loaded))
    start = time.monotonic()
    with Pair(make(prefill), make(decode)) as pair:
        outputs = pair.run(requests)
        case.seconds = time.monotonic() - start
        case.problem = pair.finish()
    case.failed_pulls = pair.failed_pulls
    if pair.decode.stats is not None and pair.prefill.stats is not None:
        case.pulled_bytes = pair.decode.stats.pulled_bytes
        case.preemptions = pair.decode.stats.preemptions
        case.cached_tokens = pair.prefill.stats.cached_tokens
    _compare(case, prompts, expected, outputs)


def _compare(
    case: Case,
    prompts: Sequence[list[int]],
    expected: Sequence[list[int]],
    outputs: dict[str, RequestOutput],
) -> None:
    for index, wanted in enumerate(expected):
        output = outputs[f"verify:{index}"]
        got = output.outputs[0].token_ids if output.outputs else []
        case.tokens += len(got)
        if got == wanted:
            case.equal += 1
            continue
        pairs = zip(got, wanted, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(wanted)))
        case.mismatches.append(
            Mismatch(
                prompt=index,
                num_prompt_tokens=len(prompts[index]),
                position=same,
                expected=wanted,
                got=got,
                error=output.error.message if output.error is not None else None,
            )
        )
    if case.preemption and not case.preemptions and case.problem is None:
        case.problem = "no sequence was preempted"
    case.ok = case.equal == len(expected) and case.problem is None


def _cases(
    transports: Sequence[str], prefix_caching: Sequence[bool], preemption: bool
) -> list[Case]:
    made = [
        Case(
            name=f"{transport}, prefix caching {'on' if caching else 'off'}",
            transport=transport,
            prefix_caching=caching,
            preemption=False,
        )
        for transport in transports
        for caching in prefix_caching
    ]
    if preemption:
        for caching in prefix_caching:
            name = (
                f"{transports[0]}, preemption forced, prefix caching {'on' if caching else 'off'}"
            )
            made.append(
                Case(name=name, transport=transports[0], prefix_caching=caching, preemption=True)
            )
    return made


def _source(loaded: LoadedModel) -> list[int]:
    """Token ids to make prompts of: those of a text, or any where the model has no tokenizer."""
    with contextlib.suppress(PromptError):
        return loaded.tokenizer.encode(RequestSpec(prompt=_TEXT))
    special = {*loaded.eos_token_ids, 0, 1, 2}
    return [token for token in range(min(loaded.vocab_size, 4096)) if token not in special]


def _walk(rng: random.Random, source: list[int], length: int) -> list[int]:
    """Pieces of the source in random order, so that prompts differ and still read like text."""
    walked: list[int] = []
    while len(walked) < length:
        start = rng.randrange(len(source))
        walked += source[start : start + rng.randrange(1, 24)]
    return walked[:length]
