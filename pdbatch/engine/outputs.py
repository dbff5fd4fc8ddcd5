"""From sampled tokens to outputs: when a sequence ends, its text, and the request's result.

`advance` is called once for each sampled token, in order; it depends on nothing but the
request and the tokens so far, so a decode engine that replays the first tokens of a hand-off
comes to the same decision as the prefill engine that sampled them.

What ends a sequence, the first that holds:

    the model's end token, unless `ignore_eos`      stop     (no stop_reason)
    a token of `stop_token_ids`                     stop     the token id
    a stop string                                   stop     the string, cut from the text
    `max_tokens`, or the model's length             length

Nothing of the first three ends it before `min_tokens` tokens are out. Token ids include the end
token; the text does not.
"""

from __future__ import annotations

from pdbatch.engine.model_input import SampledToken
from pdbatch.engine.ports import Detokenizer, TextSource
from pdbatch.engine.sequence import ActiveRequest, Sequence
from pdbatch.engine.stop import StopChecker
from pdbatch.request import (
    CompletionOutput,
    FinishReason,
    PositionLogprobs,
    RequestError,
    RequestOutput,
    TokenLogprob,
    Usage,
)


def advance(sequence: Sequence, sampled: SampledToken, tokenizer: TextSource) -> bool:
    """Append a token; True if the sequence ended by it (`finish_reason` is set, text is final)."""
    request = sequence.request
    token_id = sampled.token_id
    sequence.output_token_ids.append(token_id)
    if request.params.logprobs is not None:
        sequence.sampled.append(sampled)
    count = len(sequence.output_token_ids)
    armed = count > request.params.min_tokens
    if armed and token_id in request.eos_token_ids:
        _end(sequence, "stop", None, tokenizer, armed)
    elif armed and token_id in request.stop_token_ids:
        _end(sequence, "stop", token_id, tokenizer, armed)
    elif request.params.stop and _stopped(sequence, tokenizer, armed):
        sequence.finish_reason = "stop"
    elif count >= request.max_tokens:
        _end(sequence, "length", None, tokenizer, armed)
    return sequence.finish_reason is not None


def result(request: ActiveRequest, tokenizer: TextSource, *, decode_worker: str) -> RequestOutput:
    """The result of a request whose sequences have all ended."""
    sequences = sorted(request.sequences, key=lambda sequence: sequence.index)
    return RequestOutput(
        key=request.key,
        outputs=[_completion(sequence, tokenizer) for sequence in sequences],
        usage=Usage(
            prompt_tokens=request.num_prompt_tokens,
            completion_tokens=sum(len(s.output_token_ids) for s in sequences),
            cached_tokens=request.num_cached_tokens,
        ),
        times=request.times,
        transfer=request.transfer,
        prefill_worker=request.prefill_worker,
        decode_worker=decode_worker,
    )


def failure(
    key: str,
    code: str,
    message: str,
    *,
    param: str | None = None,
    worker: str = "",
    status: int | None = 400,
) -> RequestOutput:
    """The result of a request that cannot run: the user's mistake, unless `status` says else."""
    error = RequestError(code=code, message=message, param=param, status=status)
    return RequestOutput(key=key, error=error, prefill_worker=worker)


def _stopped(sequence: Sequence, tokenizer: TextSource, armed: bool) -> bool:
    """Feed the newest token to the stop strings."""
    detokenizer, checker = _text_of(sequence, tokenizer)
    piece = detokenizer.push(sequence.output_token_ids[-1:])
    sequence.stop_reason = checker.push(piece, armed=armed)
    return sequence.stop_reason is not None


def _end(
    sequence: Sequence,
    reason: FinishReason,
    stop_token: int | None,
    tokenizer: TextSource,
    armed: bool,
) -> None:
    """Close the text. What the detokenizer still held may complete a stop string."""
    detokenizer, checker = _text_of(sequence, tokenizer)
    piece = ""
    if not sequence.request.params.stop:  # nothing was pushed on the way: all text at once
        ids = sequence.output_token_ids
        piece = detokenizer.push(ids if reason == "length" else ids[:-1])
    stopped = checker.push(piece + detokenizer.flush(), armed=armed)
    if stopped is not None and reason == "length":
        sequence.finish_reason, sequence.stop_reason = "stop", stopped
    else:
        sequence.finish_reason, sequence.stop_reason = reason, stop_token


def _text_of(sequence: Sequence, tokenizer: TextSource) -> tuple[Detokenizer, StopChecker]:
    if sequence.detokenizer is None or sequence.stop_checker is None:
        sequence.detokenizer = tokenizer.detokenizer(sequence.prompt_token_ids)
        sequence.stop_checker = StopChecker(sequence.request.params.stop)
    return sequence.detokenizer, sequence.stop_checker


def _completion(sequence: Sequence, tokenizer: TextSource) -> CompletionOutput:
    assert sequence.finish_reason is not None and sequence.stop_checker is not None
    logprobs = None
    if sequence.request.params.logprobs is not None:
        logprobs = [_position(sampled, tokenizer) for sampled in sequence.sampled]
    return CompletionOutput(
        index=sequence.index,
        text=sequence.stop_checker.text,
        token_ids=sequence.output_token_ids,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        logprobs=logprobs,
    )


def _position(sampled: SampledToken, tokenizer: TextSource) -> PositionLogprobs:
    def named(token_id: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token_id, tokenizer.token_text(token_id), logprob)

    chosen = named(sampled.token_id, sampled.logprob if sampled.logprob is not None else 0.0)
    return PositionLogprobs(chosen, [named(*pair) for pair in sampled.top])
