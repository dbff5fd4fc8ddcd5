"""A step that finds no memory on the device: taken back, made smaller, tried again.

    at its launch       nothing of it counts: who began in it waits again, the others keep their
                        blocks, names of blocks that it was to write are forgotten
    at its retirement   (a choice is made again, log-probabilities are reported) it is tried once
                        more; then all that runs is computed anew

Either way what is cached but unused goes back to the device and steps get half as many tokens, a
decode counting as one, so that many decodes become several steps. After some steps that went well
they grow again. A sequence that finds no memory even for one token alone is tried again for some
seconds, since others may have taken what it lacks for a moment, and then its request ends with an
error of its own.

Nothing of this where the model is shared among ranks: one that ran out of memory is at another
place than the others, and the engine ends (`parallel`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from pdbatch.engine.model_input import SampledToken
from pdbatch.engine.scheduler import Scheduler, SchedulerOutput
from pdbatch.engine.sequence import ActiveRequest, Sequence
from pdbatch.engine.stepper import Stepper

logger = logging.getLogger(__name__)

_MESSAGE = "the device had no memory for it, even alone; lower gpu_memory_utilization"
_WAITS_S = (0.1, 0.5, 2.0)
"""Before each further try of a sequence alone."""
_CALM_STEPS, _MOST_CALM_STEPS = 32, 512
"""Steps that go well before steps grow again; twice as many each time that they had grown too
large, up to the second number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedies:
    """What can be done for memory, and for a request that gets none."""

    is_shortage: Callable[[BaseException], bool]
    """Whether an error says that memory ran out and the device goes on."""
    release: Callable[[], None]
    """Give what is cached but unused back to the device."""
    start_over: Callable[[], None]
    """Forget all steps in flight; what runs waits to be computed anew."""
    fail: Callable[[ActiveRequest, str, str], None]
    """End a request with an error: code, message."""
    wait: Callable[[float], None] = time.sleep
    """For so many seconds."""


class Shortage:
    """Launches and retires steps through a stepper that may run out of memory."""

    def __init__(self, scheduler: Scheduler, stepper: Stepper, remedies: Remedies | None) -> None:
        """Without remedies every error is the caller's."""
        self._scheduler = scheduler
        self._stepper = stepper
        self._remedies = remedies
        self._most_tokens = scheduler.max_num_batched_tokens
        self._calm_steps = 0
        self._patience = _CALM_STEPS
        self._grown = False
        """Whether steps have grown since they were made smaller last."""
        self._tries = 0
        """How often a sequence was tried alone since a step went well."""

    def launch(self, plan: SchedulerOutput) -> bool:
        """Launch the plan; False: it was taken back, and the next one is smaller."""
        try:
            self._stepper.launch(plan)
        except Exception as error:
            remedies = self._remedies_for(error)
        else:
            return True
        # Here the error is gone, and with it the frames that held the step's tensors.
        self._scheduler.take_back(plan)
        self._shrink(plan.sequences, plan.num_tokens, remedies)
        return False

    def retire(self) -> list[tuple[Sequence, SampledToken]]:
        """The oldest step's tokens; none if all that runs had to be started over."""
        for _ in range(2):
            try:
                chosen = self._stepper.retire()
            except Exception as error:
                remedies = self._remedies_for(error)
            else:
                self._went_well()
                return chosen
            remedies.release()
        oldest = self._stepper.flights[0]
        sequences, num_tokens = oldest.sequences, sum(oldest.counts)
        del oldest
        remedies.start_over()
        self._shrink(sequences, num_tokens, remedies)
        return []

    def _remedies_for(self, error: Exception) -> Remedies:
        """Raises the error if it is no shortage, or if there are none."""
        if self._remedies is None or not self._remedies.is_shortage(error):
            raise error
        return self._remedies

    def _shrink(self, sequences: list[Sequence], num_tokens: int, remedies: Remedies) -> None:
        remedies.release()
        if num_tokens == 1:
            self._alone(sequences[0].request, remedies)
            return
        if self._grown:
            self._patience = min(2 * self._patience, _MOST_CALM_STEPS)
        self._calm_steps, self._grown = 0, False
        self._scheduler.max_num_batched_tokens = max(1, num_tokens // 2)
        logger.warning(
            "no memory for a step of %d tokens of %d sequences: steps have at most %d for a while",
            num_tokens,
            len(sequences),
            self._scheduler.max_num_batched_tokens,
        )

    def _alone(self, request: ActiveRequest, remedies: Remedies) -> None:
        """Nothing can be made smaller: try again, in the end without this one."""
        if self._tries < len(_WAITS_S):
            logger.warning("no memory for %s even alone: it is tried again", request.key)
            remedies.wait(_WAITS_S[self._tries])
            self._tries += 1
            return
        self._tries = 0
        logger.warning("no memory for %s even alone: it ends with an error", request.key)
        remedies.fail(request, "out_of_memory", _MESSAGE)

    def _went_well(self) -> None:
        """Steps grow again after enough of these."""
        self._tries = 0
        now = self._scheduler.max_num_batched_tokens
        if now >= self._most_tokens:
            return
        self._calm_steps += 1
        if self._calm_steps >= self._patience:
            self._calm_steps, self._grown = 0, True
            self._scheduler.max_num_batched_tokens = min(2 * now, self._most_tokens)
