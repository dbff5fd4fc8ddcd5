"""What is measured: a model on one device, or shared among several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pdbatch.bench.floor import Cost, Rates, cost_of
from pdbatch.bench.plan import Plan
from pdbatch.engine import loader
from pdbatch.engine.llm import LLM
from pdbatch.engine.quantization.convert import Quantization

if TYPE_CHECKING:
    from pdbatch.engine.loader import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model and its devices, before the engine is made."""

    name: str
    config: Any
    """transformers' configuration of the whole model (its text part)."""
    dtype: torch.dtype
    quantization: Quantization | None = None
    device: torch.device
    """The first one's; rates are measured there."""
    num_ranks: int
    max_model_len: int
    vocab_size: int
    loaded: LoadedModel | None
    """None: each rank loads its part."""

    @property
    def gpu(self) -> bool:
        """Whether lengths are those of the workloads."""
        return self.device.type == "cuda"

    @property
    def cost(self) -> Cost:
        """Of the whole model."""
        return cost_of(self.config, self.dtype, self.quantization)

    def all_rates(self, one: Rates) -> Rates:
        """Of all devices together, if `one` is the first's; ranks on a CPU share it."""
        count = self.num_ranks if self.gpu else 1
        lasting = one.lasting_flop_s
        return Rates(
            flop_s=one.flop_s * count,
            bytes_s=one.bytes_s * count,
            lasting_flop_s=None if lasting is None else lasting * count,
        )

    @property
    def where(self) -> str:
        """The device, and how many."""
        if not self.gpu:
            return str(self.device)
        kind = torch.cuda.get_device_name(self.device)
        if self.num_ranks == 1:
            return f"{self.device} ({kind})"
        return f"{self.num_ranks} GPUs from {self.device} ({kind})"


def find(plan: Plan) -> Subject:
    """Load a model, or look at one that ranks are to load. Raises ModelError, ConfigError."""
    size = plan.tensor_parallel_size
    if size == 1:
        loaded = loader.load(
            plan.model, plan.home, plan.device, plan.dtype, quantization=plan.quantization
        )
        return Subject(
            name=loaded.name,
            config=loaded.config,
            dtype=loaded.dtype,
            quantization=plan.quantization,
            device=loaded.device,
            num_ranks=1,
            max_model_len=loaded.max_model_len,
            vocab_size=loaded.vocab_size,
            loaded=loaded,
        )
    from pdbatch.engine.parallel.devices import rank_devices

    device = torch.device(rank_devices(plan.device, size, torch.cuda.device_count())[0])
    config = loader.config_of(plan.model, plan.home)
    return Subject(
        name=loader.model_name(plan.model),
        config=config,
        dtype=loader.pick_dtype(plan.dtype, device, config),
        quantization=plan.quantization,
        device=device,
        num_ranks=size,
        max_model_len=loader.max_model_len_of(config),
        vocab_size=int(config.vocab_size),
        loaded=None,
    )


def start(subject: Subject, plan: Plan, engine: dict[str, Any]) -> LLM:
    """The engine over it; `engine` are further keywords of `LLM`."""
    if subject.loaded is not None:
        return LLM(subject.loaded, home=plan.home, **engine)
    return LLM(
        plan.model,
        home=plan.home,
        device=plan.device,
        dtype=plan.dtype,
        quantization=plan.quantization,
        tensor_parallel_size=subject.num_ranks,
        **engine,
    )
