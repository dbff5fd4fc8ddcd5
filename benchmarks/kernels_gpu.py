"""What each kernel of the GPU engine reaches alone, in Llama-3-8B's shape, bf16.

    python benchmarks/kernels_gpu.py [decode chunk products passes] [--quick]

decode    bytes of KV read a second by the paged decode kernel, over tile, warps and stages
chunk     TFLOP/s of causal prefill: the paged kernel, varlen_attn, and cuDNN's
products  TFLOP/s of a layer's products, over tokens of a step
passes    bytes moved a second by what stands between products

Times are medians of runs of one captured graph, so that nothing of the host is in them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pdbatch.engine.attention import work
from pdbatch.engine.kernels import activation, chunk, decode, merge, norm, rotary, shared
from pdbatch.engine.kvcache import KVShape, PagedKVCache

LAYERS, HEADS, GROUP, D = 4, 8, 4, 128
DEVICE = "cuda"


def seconds(launch: Callable[[], object], repeat: int = 8) -> float:
    """Seconds of one launch."""
    for _ in range(2):
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            launch()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / repeat)
    return float(statistics.median(times))


def ints(values: object) -> torch.Tensor:
    return torch.tensor(np.asarray(values, dtype=np.int32), device=DEVICE)


def make_cache(tokens: int, block: int) -> PagedKVCache:
    shape = KVShape(
        num_layers=LAYERS, num_kv_heads=HEADS, head_dim=D, dtype=torch.bfloat16, block_size=block
    )
    cache = PagedKVCache(shape, tokens // block, DEVICE)
    cache.pool.normal_()
    return cache


def decodes(quick: bool) -> None:
    """Rows of equal length over blocks in random order; every layer in turn, so L2 holds none."""
    for rows, length in ((512, 640), (256, 1024), (64, 640), (16, 2048), (1, 4096)):
        for block in (16,) if quick else (16, 32, 64):
            each = -(-length // block)
            cache = make_cache(rows * each * block, block)
            tables = torch.randperm(rows * each, dtype=torch.int32, device=DEVICE)
            at, lens = ints(np.arange(rows) * each), ints(np.full(rows, length))
            q = torch.randn(rows, HEADS * GROUP, D, device=DEVICE, dtype=torch.bfloat16)
            found = []
            options = itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 4), (66, 132))
            for tile, warps, stages, aim in options:
                if quick and (tile, warps, stages) not in _QUICK:
                    continue
                items = work.decode_items(
                    np.full(rows, length, np.int32), np.zeros(rows, np.int32), aim
                )
                launch = _decode(cache, q, tables, at, lens, items, tile, warps, stages)
                try:
                    taken = seconds(launch, 2) / LAYERS
                except Exception as error:
                    print("decode", tile, warps, stages, str(error).splitlines()[0][:80])
                    continue
                found.append((taken, tile, warps, stages, aim))
            found.sort()
            read = rows * length * HEADS * D * 4
            best = [f"{read / t / 1e12:.2f} ({a},{b},{c},{d})" for t, a, b, c, d in found[:4]]
            usual = [f"{read / t / 1e12:.2f}" for t, *rest in found if rest == [64, 4, 3, 132]]
            print(f"decode {rows}x{length} b{block}: TB/s {best}; default {usual}", flush=True)
            del cache


_QUICK = [(64, 4, 3), (64, 4, 2), (32, 4, 3), (128, 4, 3), (64, 8, 3), (64, 2, 3), (32, 2, 4)]
_QUICK += [(128, 8, 2), (64, 4, 4), (32, 4, 4)]


def _decode(cache, q, tables, at, lens, items, tile, warps, stages) -> Callable[[], object]:
    places = int(items.row_parts[-1])
    part = torch.empty(max(1, places), HEADS * GROUP, D, device=DEVICE)
    lse = torch.empty(max(1, places), HEADS * GROUP, device=DEVICE)
    out, items_I4, row_parts = torch.empty_like(q), ints(items.items_I4), ints(items.row_parts)

    def launch() -> None:
        for layer in range(LAYERS):
            decode.decode(
                q,
                out,
                cache,
                layer,
                tables=tables,
                tables_at=at,
                lens=lens,
                items_I4=items_I4,
                part_out=part,
                part_lse=lse,
                scaling=D**-0.5,
                window=None,
                softcap=None,
                tile=tile,
                num_warps=warps,
                num_stages=stages,
            )
            if places:
                merge.merge(
                    out,
                    part,
                    lse,
                    row_parts=row_parts,
                    shared_at=row_parts,
                    rows=q.shape[0],
                    num_kv_heads=HEADS,
                    splits=0,
                )

    return launch


def shared_prefix() -> None:
    """512 decodes over 2,048 keys in common."""
    rows, keys, block = 512, 2048, 16
    cache = make_cache(keys, block)
    tables = torch.randperm(keys // block, dtype=torch.int32, device=DEVICE)
    _rows, places = shared.rows_of_tile(GROUP)
    tiles, members = ints([(0, keys)] * (rows // places)), ints(np.arange(rows))
    q = torch.randn(rows, HEADS * GROUP, D, device=DEVICE, dtype=torch.bfloat16)
    for splits, tile, warps, stages in itertools.product((1, 2, 4), (64, 128), (4, 8), (2, 3)):
        part = torch.empty(rows * splits, HEADS * GROUP, D, device=DEVICE)
        lse = torch.empty(rows * splits, HEADS * GROUP, device=DEVICE)

        def launch(splits=splits, tile=tile, warps=warps, stages=stages, part=part, lse=lse):
            shared.shared(
                q,
                cache,
                0,
                tables=tables,
                tiles_F2=tiles,
                members=members,
                part_out=part,
                part_lse=lse,
                first_part=0,
                splits=splits,
                scaling=D**-0.5,
                softcap=None,
                tile=tile,
                num_warps=warps,
                num_stages=stages,
            )

        try:
            taken = seconds(launch)
        except Exception as error:
            print("shared", splits, tile, warps, stages, str(error).splitlines()[0][:80])
            continue
        flops = 4 * rows * HEADS * GROUP * D * keys
        print(
            f"shared splits {splits} tile {tile} warps {warps} stages {stages}: "
            f"{taken * 1e6:.0f} us, {flops / taken / 1e12:.0f} TFLOP/s",
            flush=True,
        )


def chunks(quick: bool) -> None:
    """16,384 tokens in sequences of one length, with and without a prefix."""
    block = 16
    for length, before in ((512, 0), (1024, 0), (2048, 0), (8192, 0), (64, 2048)):
        count = 16384 // length
        total = length + before
        cache = make_cache(count * total, block)
        each = total // block
        tables = torch.randperm(count * each, dtype=torch.int32, device=DEVICE)
        starts = np.arange(count + 1, dtype=np.int32) * length
        lens = np.full(count, total, np.int32)
        rows, tokens = chunk.rows_of_tile(GROUP, cache.shape, length)
        tiles = ints(work.chunk_tiles(starts, lens, np.arange(count, dtype=np.int32), tokens))
        qkv = torch.randn(16384, 48, D, device=DEVICE, dtype=torch.bfloat16)
        q, k, v = qkv.split([32, 8, 8], 1)
        out = torch.empty(16384, 32, D, device=DEVICE, dtype=torch.bfloat16)
        flops = 4 * 16384 * 32 * D * (before + length / 2)
        given: dict[str, Any] = {
            "tables": tables,
            "tables_at": ints(np.arange(count) * each),
            "lens": ints(lens),
        }
        given |= {"starts": ints(starts), "tiles_X2": tiles, "rows": rows, "scaling": D**-0.5}
        for tile, warps, stages in itertools.product((64, 128), (4, 8), (2, 3, 4)):
            if quick and (tile, warps, stages) not in [(64, 8, 3), (64, 4, 3), (128, 8, 2)]:
                continue

            def paged(more=(tile, warps, stages), given=given, q=q, out=out, cache=cache):
                more = dict(zip(("tile", "num_warps", "num_stages"), more, strict=True))
                chunk.chunk(q, out, cache, 0, window=None, softcap=None, **given, **more)

            _say(f"chunk {length}+{before} paged ({tile},{warps},{stages})", paged, flops)
        if before == 0:
            cu = ints(starts)
            _say(f"chunk {length} varlen", lambda: _varlen(q, k, v, cu, length), flops)  # noqa: B023
            _say(f"chunk {length} cudnn varlen", lambda: _cudnn(q, k, v, cu, length), flops)  # noqa: B023
            _say(f"chunk {length} cudnn batch", lambda: _batched(q, k, v, length), flops)  # noqa: B023
        del cache


def _varlen(q, k, v, cu, length):
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    more: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        more["enable_gqa"] = True
    return varlen_attn(q, k, v, cu, cu, length, length, window_size=(-1, 0), **more)


def _cudnn(q, k, v, cu, length):
    return torch.ops.aten._cudnn_attention_forward(
        q, k, v, None, cu, cu, length, length, False, 0.0, True, False, scale=D**-0.5
    )


def _batched(q, k, v, length):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )


def _say(name: str, launch: Callable[[], object], flops: float) -> None:
    try:
        taken = seconds(launch, 4)
    except Exception as error:
        print(f"{name}: {type(error).__name__} {str(error).splitlines()[0][:90]}", flush=True)
        return
    print(f"{name}: {taken * 1e6:.0f} us, {flops / taken / 1e12:.0f} TFLOP/s", flush=True)


def products(quick: bool) -> None:
    """The four products of a layer; those after attention and gate also added in place."""
    kind: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    shapes = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672)}
    shapes |= {"down": (14336, 4096), "head": (4096, 128256)}
    for name, (inner, outer) in shapes.items():
        weight = torch.randn(outer, inner, **kind) * 0.02
        found = []
        for tokens in (64, 256, 512, 1024, 4096, 8192, 16384):
            if name == "head" and tokens > 1024:
                continue
            x = torch.randn(tokens, inner, **kind)
            flops = 2 * tokens * inner * outer
            taken = seconds(lambda x=x, w=weight: torch.nn.functional.linear(x, w), 4)
            text = f"{tokens}: {flops / taken / 1e12:.0f}"
            if name in ("o", "down"):
                out = torch.zeros(tokens, outer, **kind)
                taken = seconds(lambda o=out, x=x, w=weight: o.addmm_(x, w.t()), 4)
                text += f" (added {flops / taken / 1e12:.0f})"
            found.append(text)
        print(f"product {name}: TFLOP/s {', '.join(found)}", flush=True)


def passes(quick: bool) -> None:
    """Norm, gated activation, turning and writing."""
    kind: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    for tokens in (512, 16384):
        x, weight = torch.randn(tokens, 4096, **kind), torch.randn(4096, **kind)
        taken = seconds(lambda x=x, w=weight: norm.norm(x, w, 1e-5, 0))
        print(f"norm {tokens}: {taken * 1e6:.0f} us, {x.nbytes * 2 / taken / 1e12:.2f} TB/s")
        x = torch.randn(tokens, 28672, **kind)
        taken = seconds(lambda x=x: activation.gated(x, "silu"))
        print(f"gated {tokens}: {taken * 1e6:.0f} us, {x.nbytes * 1.5 / taken / 1e12:.2f} TB/s")
        cache = make_cache(tokens, 16)
        qkv = torch.randn(tokens, 48 * D, **kind)
        turns = torch.randn(tokens, D, **kind)
        slots = torch.randperm(tokens, device=DEVICE).int()
        how = rotary.Turning(num_q_heads=32, num_turning=D, pairs=False)
        moved = qkv.nbytes * 2
        for each in (4, 8, 16, 32):

            def turn(each=each, qkv=qkv, turns=turns, slots=slots, cache=cache, how=how):
                rotary.rotary(qkv, turns, turns, how, cache, 0, slots, keep_k=True, tokens=each)

            taken = seconds(turn)
            print(f"rotary {tokens} by {each}: {taken * 1e6:.0f} us, {moved / taken / 1e12:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    every = {
        "decode": lambda: decodes(args.quick),
        "shared": shared_prefix,
        "chunk": lambda: chunks(args.quick),
        "products": lambda: products(args.quick),
        "passes": lambda: passes(args.quick),
    }
    with torch.inference_mode():
        for part in args.parts or every:
            every[part]()


if __name__ == "__main__":
    main()
