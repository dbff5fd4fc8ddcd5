"""Tiny random models of many families, and a loop that drives a runner without a scheduler."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pdbatch.engine import runner
from pdbatch.engine.attention import hook
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.kvcache import PagedKVCache
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.model_input import ModelInput
from pdbatch.engine.tokenizer import Tokenizer

VOCAB = 199
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma": {},
    "gemma2": {
        "sliding_window": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 20,
    },
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 20},
    "ernie4_5": {},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 1,
    },
    "qwen3_moe": _MOE,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"sliding_window": 40},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.7},
    "olmo2": {},
}


def make(family: str, seed: int = 7, **more: Any) -> Any:
    """A random float32 model whose greedy answers wander."""
    config = CONFIG_MAPPING[family](**{**_BASE, **FAMILIES.get(family, {}), **more})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.15 if "embed" not in name else 0.6)
    return model.eval()


def loaded(model: Any, device: str = "cpu") -> LoadedModel:
    """The same weights as the engine runs them."""
    hook.register()
    model.set_attn_implementation(hook.IMPLEMENTATION)
    return LoadedModel(
        model=model.to(device),
        config=model.config,
        tokenizer=Tokenizer(None, VOCAB),
        dtype=torch.float32,
        device=torch.device(device),
        max_model_len=512,
        eos_token_ids=(2,),
        name="tiny",
        vocab_size=VOCAB,
    )


class Loop:
    """Runs prompts in chunks and decodes them greedily, over blocks in random order."""

    def __init__(self, model: LoadedModel, *, num_blocks: int = 96, block_size: int = 8) -> None:
        shape = runner.kv_shape(model, block_size)
        self.cache = PagedKVCache(shape, num_blocks, model.device)
        self.cache.pool.fill_(float("nan"))  # what was never written must never be seen
        config = EngineConfig(model="tiny", home="unused", block_size=block_size)
        self.runner = runner.ModelRunner(model, self.cache, config)
        self.free = list(range(num_blocks))
        random.Random(num_blocks).shuffle(self.free)
        self.tables: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}

    def step(self, work: list[tuple[int, list[int]]], wanted: list[int]) -> torch.Tensor:
        """Run the next tokens of some sequences; logits of those named in `wanted`."""
        work.sort(key=lambda item: not (len(item[1]) == 1 and self.done.get(item[0], 0) > 0))
        decodes = sum(len(ids) == 1 and self.done.get(seq, 0) > 0 for seq, ids in work)
        size = self.cache.shape.block_size
        ids, positions, slots, offsets, lens = [], [], [], [0], []
        for seq, tokens in work:
            begin, table = self.done.get(seq, 0), self.tables.setdefault(seq, [])
            end = begin + len(tokens)
            while len(table) * size < end:
                table.append(self.free.pop())
            ids += tokens
            positions += range(begin, end)
            slots += [table[p // size] * size + p % size for p in range(begin, end)]
            offsets.append(len(ids))
            lens.append(end)
            self.done[seq] = end
        longest = max(len(self.tables[seq]) for seq, _ in work)
        tables = [self.tables[seq] + [0] * (longest - len(self.tables[seq])) for seq, _ in work]
        order = [seq for seq, _ in work]
        batch = ModelInput(
            input_ids_T=torch.tensor(ids),
            positions_T=torch.tensor(positions),
            slot_mapping_T=torch.tensor(slots),
            cu_seqlens_q=offsets,
            context_lens=lens,
            block_tables_SM=torch.tensor(tables, dtype=torch.int32),
            logits_indices=[order.index(seq) for seq in wanted],
            num_decodes=decodes,
        )
        return self.runner.execute(batch)

    def generate(self, prompts: list[list[int]], out: int, chunk: int) -> list[list[int]]:
        """Greedy tokens; sequence s starts s steps late, so that chunks and decodes mix."""
        outputs: list[list[int]] = [[] for _ in prompts]
        step = 0
        while any(len(tokens) < out for tokens in outputs):
            work, wanted = [], []
            for seq, prompt in enumerate(prompts):
                begin = self.done.get(seq, 0)
                if step < seq or len(outputs[seq]) >= out:
                    continue
                known = prompt + outputs[seq]
                piece = known[begin : begin + chunk] if begin < len(prompt) else known[begin:]
                work.append((seq, piece))
                if begin + len(piece) == len(known):
                    wanted.append(seq)
            logits = self.step(work, wanted)
            for row, seq in enumerate(wanted):
                outputs[seq].append(int(logits[row].argmax()))
            step += 1
        return outputs
