"""The engine with no queue at all: `LLM(model).generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.messages import EngineRequest, Finished
from pdbatch.errors import UsageError
from pdbatch.request import RequestOutput, RequestSpec
from pdbatch.sampling import SamplingParams

if TYPE_CHECKING:
    from pdbatch.engine.loader import LoadedModel

_TAKEN_AT_ONCE = 256
_TAKEN_FIRST = 64
"""While the device has nothing to do yet."""
Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""Text, token ids, or the messages of a chat."""


class LLM:
    """One model in this process, for many prompts at a time. Not safe for several threads.

    `model` is an alias, a folder, a GGUF file or a hub name; or a `LoadedModel`. The keywords are
    those of `EngineConfig`. Raises ModelError, ConfigError.
    """

    def __init__(
        self,
        model: str | LoadedModel = "smollm2-135m",
        *,
        home: str | Path | None = None,
        device: str = "auto",
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: Literal["wint8", "wint4"] | None = None,
        compile: Literal["auto", "on", "off"] = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        cuda_graphs: bool = True,
        run_ahead: bool | None = None,
        threads: int | None = None,
    ) -> None:
        from pdbatch.engine.build import build_engine

        config = EngineConfig(
            model=model if isinstance(model, str) else model.name,
            home=str(home or os.environ.get("PDBATCH_HOME") or Path.home() / ".pdbatch"),
            device=device,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            quantization=quantization,
            compile=compile,
            block_size=block_size,
            num_blocks=num_blocks,
            kv_cache_bytes=kv_cache_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            cuda_graphs=cuda_graphs,
            run_ahead=run_ahead,
            threads=threads,
            worker="llm",
        )
        loaded = None if isinstance(model, str) else model
        self.engine = build_engine(config, loaded, keep_prompts=True)
        self._count = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[RequestOutput]:
        """Outputs in the order of the prompts; one that cannot run has `error` instead.

        `sampling` is for all prompts, or one for each. `progress` is called with (done, total).
        Raises UsageError if prompts and sampling do not go together.
        """
        asked = _prompts(prompts)
        if sampling is None or isinstance(sampling, SamplingParams):
            chosen = [sampling or SamplingParams()] * len(asked)
        else:
            chosen = list(sampling)
        if len(chosen) != len(asked):
            raise UsageError(f"{len(asked)} prompts, but {len(chosen)} sampling parameters")
        first, self._count = self._count, self._count + len(asked)
        keys = {f"llm:{first + at}": at for at in range(len(asked))}
        requests = (
            EngineRequest(key=key, spec=with_sampling(_spec(asked[at]), chosen[at]))
            for key, at in keys.items()
        )
        try:
            return self._run(requests, keys, progress)
        except BaseException:
            for key in keys:
                self.engine.abort(key)
            raise

    def close(self) -> None:
        """End the processes of a model on several devices; otherwise nothing needs it."""
        self.engine.close()

    def _run(
        self,
        requests: Iterator[EngineRequest],
        keys: dict[str, int],
        progress: Callable[[int, int], None] | None,
    ) -> list[RequestOutput]:
        """Each round takes some of the requests in, beside the device once that works."""
        outputs: list[RequestOutput | None] = [None] * len(keys)
        done, count = 0, _TAKEN_FIRST
        while done < len(keys):
            for request in islice(requests, count):
                self.engine.add(request)
            count = _TAKEN_AT_ONCE
            for event in self.engine.step():
                if isinstance(event, Finished):
                    for output in event.outputs:
                        outputs[keys[output.key]] = output
                    done += len(event.outputs)
                    if progress is not None:
                        progress(done, len(keys))
        return [output for output in outputs if output is not None]


def with_sampling(spec: RequestSpec, sampling: SamplingParams) -> RequestSpec:
    """The same request with another sampling."""
    import msgspec

    return msgspec.structs.replace(spec, sampling=sampling)


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Of one prompt or of many; each is copied when its turn comes. Raises UsageError."""
    is_one = isinstance(prompts, str) or (prompts and isinstance(prompts[0], (int, dict)))
    found: list[Any] = [prompts] if is_one else list(prompts)
    for prompt in found:
        first = prompt[0] if prompt and not isinstance(prompt, str) else 0
        if not isinstance(first, (int, dict)):
            raise UsageError(
                f"a prompt is text, token ids or messages, not a list of {type(first)}"
            )
    return found


def _spec(prompt: Prompt) -> RequestSpec:
    if isinstance(prompt, str):
        return RequestSpec(prompt=prompt)
    if prompt and isinstance(prompt[0], dict):
        messages: list[Any] = list(prompt)
        return RequestSpec(endpoint="/v1/chat/completions", messages=messages)
    return RequestSpec(prompt_token_ids=tuple(prompt))  # type: ignore[arg-type]
