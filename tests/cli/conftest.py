"""A home of its own for every test, a worker that is played, and the program itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdbatch.client import Client
from pdbatch.config import Settings
from pdbatch.ids import JobId, request_key
from pdbatch.request import (
    CompletionOutput,
    KVTransfer,
    RequestError,
    RequestOutput,
    StageTimes,
    Usage,
)
from pdbatch.store import ResultRow, Store

Answer = Callable[[int], "str | RequestError"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", engine="null")


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as client:
        yield client


class PlayedWorker:
    """Claims shards of the default model and answers them, without engine and queue."""

    def __init__(self, settings: Settings, name: str = "played") -> None:
        self._store = Store.open(settings.database_url)
        self._model = settings.model
        self.worker = self._store.workers.register(name, "here", "mixed", self._model)

    def work(self, answer: Answer = lambda index: f"answer {index}", shards: int = 1000) -> int:
        """Answers up to so many shards; returns how many there were."""
        done = 0
        for message in self._store.shards.take_for_publish(self._model, 0, shards):
            claimed = self._store.shards.claim(
                self.worker, message.job, message.shard, message.attempt
            )
            if claimed:
                indexes = [request.index for request in claimed.requests]
                rows = [self._row(claimed.job, index, answer(index)) for index in indexes]
                self._store.results.write(self.worker, rows)
                done += 1
        return done

    def _row(self, job: JobId, index: int, answer: str | RequestError) -> ResultRow:
        key = request_key(job, index)
        if isinstance(answer, RequestError):
            return ResultRow.from_output(RequestOutput(key=key, error=answer))
        output = CompletionOutput(index=0, text=answer, token_ids=[1, 2], finish_reason="stop")
        return ResultRow.from_output(
            RequestOutput(
                key=key,
                outputs=[output],
                usage=Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=1),
                times=StageTimes(prefill_s=0.25, transfer_s=0.01, decode_s=0.5, engine_s=0.5),
                transfer=KVTransfer(transport="shm", num_bytes=30_000_000),
            )
        )

    def close(self) -> None:
        self._store.close()


@pytest.fixture
def worker(settings: Settings, client: Client) -> Iterator[PlayedWorker]:
    played = PlayedWorker(settings)
    yield played
    played.close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Ten lines: the fourth is no JSON, the others are prompts."""
    lines = [json.dumps({"id": f"r{n}", "prompt": f"prompt {n}"}) for n in range(10)]
    lines[3] = "{no json"
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def pdbatch(settings: Settings, tmp_path: Path) -> Program:
    """Runs the program in a process of its own, in `tmp_path`."""

    def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pdbatch.cli", *map(str, arguments)],
            env={**os.environ, **settings.to_env(), **env},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run
