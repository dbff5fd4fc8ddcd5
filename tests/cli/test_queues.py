"""Names of queues and models, and the check of Redis."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbatch import queues
from pdbatch.errors import QueueError


def test_names() -> None:
    names = queues.queue_names("org/Some Model.v2")
    assert [name.rsplit(".", 1)[1] for name in names] == ["high", "normal", "low"]
    assert names[1].startswith("pdbatch.some-model-v2-")
    assert [queues.queue_name("org/Some Model.v2", p) for p in (-3, 0, 9)] == names


@given(st.lists(st.text(), min_size=2, max_size=20, unique=True))
def test_models_that_differ_have_slugs_that_differ(models: list[str]) -> None:
    slugs = {queues.model_slug(model) for model in models}
    assert len(slugs) == len(models)
    assert all(set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for slug in slugs)


def test_paths_become_absolute_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    queues.canonical_model.cache_clear()
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    for name in ("models/mine", "./models/mine/", f"{tmp_path}/models/../models/mine"):
        assert queues.canonical_model(name) == str(tmp_path / "models" / "mine")
    assert queues.canonical_model("file.gguf") == str(tmp_path / "file.gguf")
    assert queues.canonical_model("bare") == str(tmp_path / "bare")
    for name in ("smollm2-135m", "org/name"):
        assert queues.canonical_model(name) == name
    queues.canonical_model.cache_clear()


def test_urls_as_redis_py_spells_them() -> None:
    assert queues.client_url("redis+socket:///a/b.sock?virtual_host=2") == "unix:///a/b.sock?db=2"
    assert queues.client_url("valkey://h:1/0") == "redis://h:1/0"
    assert queues.client_url("rediss://h:1/0") == "rediss://h:1/0"


@pytest.fixture
def old_redis() -> Iterator[str]:
    """A server that answers INFO as Redis 6.0 does, and everything else with OK."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    while data := peer.recv(4096):
                        info = b"# Server\r\nredis_version:6.0.16\r\n"
                        reply = b"$%d\r\n%s\r\n" % (len(info), info)
                        numbers = data.count(b"*") - data.count(b"INFO")
                        peer.sendall(b"+OK\r\n" * numbers + reply * data.count(b"INFO"))

        threading.Thread(target=serve, daemon=True).start()
        yield f"redis://:pass@127.0.0.1:{server.getsockname()[1]}/0?protocol=2"


def test_an_old_redis_is_refused_with_a_clear_message(old_redis: str) -> None:
    with pytest.raises(QueueError, match=r"version 6\.0\.16; pdbatch needs 6\.2") as caught:
        queues.check_redis(old_redis)
    assert "Upgrade" in (caught.value.remedy or "")
    assert "pass@" not in str(caught.value)


def test_nobody_there(tmp_path: Path) -> None:
    for url in ("redis://127.0.0.1:1/0", f"redis+socket://{tmp_path}/none.sock"):
        with pytest.raises(QueueError, match="cannot be reached") as caught:
            queues.check_redis(url, timeout_s=2)
        assert "PDBATCH_BROKER_URL" in (caught.value.remedy or "")


def test_a_foreign_url_is_refused() -> None:
    with pytest.raises(QueueError, match="is no Redis URL"):
        queues.check_redis("amqp://guest:guest@127.0.0.1")
