"""What the largest step takes of a GPU's memory, found by running it.

It has as many tokens and as many rows of logits as a step may have, each row drawn with truncation,
and runs twice, since the choice of one step is alive while the next one runs. What it computes is
of no use, and of the one block of its cache nothing is written.
"""

from __future__ import annotations

from pdbatch.engine import rehearsal
from pdbatch.engine.kvcache import KVShape, PagedKVCache
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.memory import is_shortage, release_unused, taken_by
from pdbatch.engine.model_input import SamplingState
from pdbatch.engine.ports import Runner
from pdbatch.engine.sampler import Sampler
from pdbatch.engine.sizing import Sizes
from pdbatch.sampling import SamplingParams

_PARAMS = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01)


def measured(loaded: LoadedModel, shape: KVShape, sizes: Sizes) -> int | None:
    """Bytes beside weights and pool; None if there was not enough memory.

    Ranks of a group call this together; there a shortage is raised, since the others wait.
    """
    from pdbatch.engine.gpu_runner import GpuRunner

    cache = PagedKVCache(shape, 1, loaded.device)
    runner = GpuRunner(
        loaded,
        cache,
        max_num_seqs=sizes.max_num_seqs,
        max_model_len=sizes.max_model_len,
        cuda_graphs=False,
    )
    sampler = Sampler(loaded.vocab_size, loaded.device)
    try:
        return taken_by(lambda: run(runner, sampler, sizes, shape.block_size), loaded.device)
    except RuntimeError as error:
        if loaded.shard is not None or not is_shortage(error):
            raise
    release_unused()
    return None


def run(runner: Runner, sampler: Sampler, sizes: Sizes, block_size: int) -> None:
    """The largest step, twice."""
    batch = rehearsal.largest(
        sizes.max_num_seqs, sizes.max_num_batched_tokens, sizes.max_model_len, block_size
    )
    states = [
        SamplingState(
            params=_PARAMS, seed=row, output_index=0, prompt_token_ids=[0], output_token_ids=[]
        )
        for row in range(len(batch.logits_indices))
    ]
    before = None
    for _ in range(2):
        choice = sampler.choose(runner.execute(batch), states)
        if before is not None:
            before.fetch()
        before = choice
