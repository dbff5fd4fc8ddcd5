"""What weights of 8 and 4 bits cost in perplexity and bring in speed.

    python benchmarks/quantization.py perplexity [--model smollm2-135m] [--dtype float32]
    python benchmarks/quantization.py speed [--model random:llama-3-8b] [--batches 1,16]

The text is benchmarks/perplexity.txt: this project's own documentation as it stood once, so that
no model has seen it. Speed is that of decode steps by the clock (the slope between two lengths),
through `LLM`, and of one large prefill.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from pathlib import Path
from typing import Any

import torch

from pdbatch.engine import loader
from pdbatch.engine.attention import paged
from pdbatch.engine.kvcache import PagedKVCache
from pdbatch.engine.llm import LLM
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.model_input import ModelInput
from pdbatch.engine.quantization.convert import Quantization
from pdbatch.engine.quantization.linear import QuantizedLinear
from pdbatch.engine.runner import kv_shape
from pdbatch.request import RequestSpec
from pdbatch.sampling import SamplingParams

KINDS: tuple[Quantization | None, ...] = (None, "wint8", "wint4")
TEXT = Path(__file__).with_name("perplexity.txt")
_WINDOW = 512
_BLOCK = 16
_SHORT, _LONG = 16, 144


@torch.inference_mode()
def mean_loss(loaded: LoadedModel, ids: list[int]) -> float:
    """Nats for each token of `ids`, in windows of 512 that begin anew."""
    shape = kv_shape(loaded, _BLOCK)
    cache = PagedKVCache(shape, _WINDOW // _BLOCK, loaded.device)
    workspace, model = paged.Workspace(), loaded.model
    total, count = 0.0, 0
    for begin in range(0, len(ids) - 1, _WINDOW):
        window = ids[begin : begin + _WINDOW]
        batch = _prompt(window)
        step = paged.PagedStep(cache, batch, workspace)
        logits = _logits(model, batch, step, loaded.device)
        wanted = torch.tensor(window[1:], device=loaded.device)
        total += float(torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="sum"))
        count += len(wanted)
    return total / count


def _prompt(ids: list[int]) -> ModelInput:
    where = torch.arange(len(ids))
    return ModelInput(
        input_ids_T=torch.tensor(ids),
        positions_T=where,
        slot_mapping_T=where,
        cu_seqlens_q=[0, len(ids)],
        context_lens=[len(ids)],
        block_tables_SM=torch.arange(-(-len(ids) // _BLOCK), dtype=torch.int32).unsqueeze(0),
        logits_indices=[0],
        num_decodes=0,
    )


def _logits(model: Any, batch: ModelInput, step: Any, device: torch.device) -> torch.Tensor:
    """Of every token, [T, V] in float32."""
    output = model(
        input_ids=batch.input_ids_T.to(device).unsqueeze(0),
        position_ids=batch.positions_T.to(device).unsqueeze(0),
        use_cache=False,
        pdbatch_step=step,
    )
    logits: torch.Tensor = output.logits[0].float()
    return logits


def perplexity(model: str, home: str, device: str, dtype: str, tokens: int) -> None:
    """Print the perplexity of each kind of weights."""
    base = 0.0
    for kind in KINDS:
        loaded = loader.load(model, home, device, dtype, quantization=kind)
        text = RequestSpec(prompt=TEXT.read_text(encoding="utf-8"))
        ids = loaded.tokenizer.encode(text)[:tokens]
        start_s = time.perf_counter()
        loss = mean_loss(loaded, ids)
        base = base or loss
        network: Any = loaded.model
        layers = network.base_model.layers
        size = sum(_weight_bytes(module, loaded.dtype.itemsize) for module in layers.modules())
        name = kind or str(loaded.dtype).removeprefix("torch.")
        print(
            f"{name:9s} perplexity {math.exp(loss):7.3f} ({math.exp(loss - base) - 1:+.2%}),"
            f" {loss:.4f} nats a token over {len(ids):,}; layers {size / 1e6:,.0f} MB;"
            f" {time.perf_counter() - start_s:.0f} s",
            flush=True,
        )


def _weight_bytes(module: Any, itemsize: int) -> int:
    """Of a linear layer, whichever form it has."""
    if isinstance(module, QuantizedLinear):
        return module.q.nbytes + module.scales.nbytes
    return int(getattr(module, "in_features", 0) * getattr(module, "out_features", 0) * itemsize)


def speed(model: str, home: str, device: str, batches: list[int]) -> None:
    """Print milliseconds of decode steps, and tokens a second of a prefill, for each kind."""
    base: dict[int, float] = {}
    for kind in KINDS:
        start_s = time.perf_counter()
        llm = LLM(
            model,
            home=home,
            device=device,
            quantization=kind,
            kv_cache_bytes=6 << 30,
            max_num_seqs=max(batches),
            max_num_batched_tokens=8192,
            max_model_len=2048,
            enable_prefix_caching=False,
        )
        words = [f"{kind or 'plain':6s} ready in {time.perf_counter() - start_s:.1f} s;"]
        for batch in batches:
            _seconds(llm, batch, 64, _LONG)  # compiles what is not yet
            step_ms = min(_step_ms(llm, batch) for _ in range(2))
            base.setdefault(batch, step_ms)
            words.append(
                f"batch {batch}: {step_ms:.2f} ms, {batch / step_ms * 1e3:,.0f} tok/s"
                f" ({base[batch] / step_ms:.2f}x);"
            )
        _seconds(llm, 8, 1024, 1)
        prefill_s = _seconds(llm, 8, 1024, 1)
        print(*words, f"prefill {8 * 1024 / prefill_s:,.0f} tok/s", flush=True)
        llm.close()
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _step_ms(llm: LLM, batch: int) -> float:
    short_s, long_s = (_seconds(llm, batch, 64, count) for count in (_SHORT, _LONG))
    return (long_s - short_s) * 1e3 / (_LONG - _SHORT)


def _seconds(llm: LLM, batch: int, prompt: int, tokens: int) -> float:
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    asked = [[(7 * at + 31 * one) % 400 + 3 for at in range(prompt)] for one in range(batch)]
    start_s = time.perf_counter()
    llm.generate(asked, sampling)
    return time.perf_counter() - start_s


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["perplexity", "speed"])
    parser.add_argument("--model")
    parser.add_argument("--home", default=str(Path.home() / ".pdbatch"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=8192, help="Of the text (8,192).")
    parser.add_argument("--batches", default="1,16")
    asked = parser.parse_args()
    if asked.what == "perplexity":
        model = asked.model or "smollm2-135m"
        perplexity(model, asked.home, asked.device, asked.dtype, asked.tokens)
    else:
        batches = [int(one) for one in asked.batches.split(",")]
        speed(asked.model or "random:llama-3-8b", asked.home, asked.device, batches)


if __name__ == "__main__":
    main()
