"""Layers through a compiler: one graph each, equal answers, one program for equal layers."""

from __future__ import annotations

import copy
import gc
import random
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, Loop, loaded, make
from torch._dynamo.testing import CompileCounterWithBackend

from pdbatch.engine import compiled
from pdbatch.engine.attention import hook, operator

UNMERGED = {"cohere": {}, "olmo": {}, "starcoder2": {"sliding_window": 24}}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _tokens(loop: Loop, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(count)] for count in (19, 7, 30, 1)]
    return loop.generate(prompts, out=6, chunk=8)


@pytest.mark.parametrize("family", ["llama", "gemma2", *UNMERGED])
def test_one_graph_for_equal_layers_and_equal_answers(family: str) -> None:
    model = make(family, **UNMERGED.get(family, {}))
    plain = _tokens(Loop(loaded(copy.deepcopy(model))), 1)
    counter: Any = CompileCounterWithBackend("aot_eager")
    loop = Loop(loaded(model))
    assert compiled.compile_layers(model, backend=counter) == 3  # fullgraph: a break raises
    assert _tokens(loop, 1) == plain
    kinds = 2 if family == "gemma2" else 1  # with a window and without
    programs = [sum(_is_attention(node) for node in graph.graph.nodes) for graph in counter.graphs]
    assert set(programs) <= {0, 1}  # graphs of nothing are the backend's own
    assert kinds <= sum(programs) <= 2 * kinds  # a step of one token is another program


def _is_attention(node: torch.fx.Node) -> bool:
    return str(node.target).startswith("pdbatch.paged_attention")


def test_inductor_answers_as_eager() -> None:
    model = make("cohere")
    plain = _tokens(Loop(loaded(copy.deepcopy(model))), 2)
    loop = Loop(loaded(model))
    assert compiled.compile_layers(model) == 3
    assert _tokens(loop, 2) == plain


def test_merged_layers_are_left_alone() -> None:
    from pdbatch.engine import merged

    engine = loaded(make("llama"))
    assert merged.merge(engine.model) == 3
    assert compiled.compile_layers(engine.model) == 0


def test_what_cannot_be_compiled_runs_as_it_did(caplog: pytest.LogCaptureFixture) -> None:
    engine = loaded(make("cohere"))
    forward = engine.model.model.layers[0].mlp.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(x)

    plain = _tokens(Loop(engine), 3)
    engine.model.model.layers[0].mlp.forward = broken
    layers = compiled.Compiled(engine.model, backend="eager")
    assert not layers.tried(lambda: _tokens(Loop(engine), 3) and None)
    assert "without being compiled" in caplog.text
    assert _tokens(Loop(engine), 3) == plain


def test_after_the_rehearsal_nothing_is_compiled() -> None:
    engine = loaded(make("cohere"))
    counter: Any = CompileCounterWithBackend("eager")
    layers = compiled.Compiled(engine.model, backend=counter)
    body = engine.model.base_model

    def run(ids: list[int]) -> torch.Tensor:
        tokens = torch.tensor([ids])
        positions = torch.arange(len(ids)).unsqueeze(0)
        place, step = operator.Place(), _Noted()
        inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
        inputs[hook.KEYWORD] = place.hold(step)
        with torch.inference_mode():
            return layers.run(body, inputs).last_hidden_state

    assert layers.tried(lambda: run([5, 6, 7]) is None)
    before = counter.frame_count
    assert before > 0
    one, two = run([5]), run([5, 6, 8, 9])  # one token would be another program
    assert counter.frame_count == before
    torch.testing.assert_close(one[0, 0], two[0, 0])  # _Noted attends to nothing


class _Noted:
    """A step that gives queries back."""

    place = -1

    def attend(self, layer: int, q_HTD, k_HTD, v_HTD, *, scaling, window, softcap):
        self.seen = (layer, scaling, window, softcap)
        return q_HTD.transpose(0, 1).clone()


def test_the_operator_finds_the_step_of_its_place() -> None:
    places = [operator.Place(), operator.Place()]
    steps = [_Noted(), _Noted()]
    for place, step in zip(places, steps, strict=True):
        assert place.hold(step) is step
    q, k = torch.randn(4, 5, 8), torch.randn(2, 5, 8)
    for layer, (place, step) in enumerate(zip(places, steps, strict=True)):
        args = (q, k, k, torch.tensor(layer), place.number, 0.5, None, 3.0)
        torch.testing.assert_close(operator.paged_attention(*args), q.transpose(0, 1))
        assert step.seen == (layer, 0.5, None, 3.0)
        torch.library.opcheck(
            operator.paged_attention, args, test_utils=("test_schema", "test_faketensor")
        )
    del step, steps
    gc.collect()
    assert not {place.number for place in places} & set(operator._steps)


def test_without_a_compiler_the_step_is_called_itself() -> None:
    step = _Noted()  # in no place
    module = torch.nn.Module()
    module.layer_idx = 2
    q = torch.randn(1, 4, 5, 8)
    hook.paged_attention(module, q, q, q, None, **{hook.KEYWORD: step})
    assert step.seen[0] == 2
