"""Settings: where they come from, what goes over what, what is refused."""

from __future__ import annotations

import stat
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbatch.config import KEYS, Settings
from pdbatch.errors import ConfigError


def load(tmp_path: Path, env: dict[str, str] | None = None, **flags: object) -> Settings:
    return Settings.load(flags, env={"PDBATCH_HOME": str(tmp_path), **(env or {})}, cwd=tmp_path)


def test_defaults_follow_the_home(tmp_path: Path) -> None:
    settings = load(tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path}/pdbatch.db"
    assert settings.logs == tmp_path / "logs"
    assert settings.embedded_broker_url == f"redis+socket://{tmp_path}/run/redis.sock"
    assert settings.broker_url is None


def test_flags_over_environment_over_here_over_home_over_defaults(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    (home / "pdbatch.toml").write_text("shard_size = 1\nqueue_high = 91\nmax_attempts = 3\n")
    (here / "pdbatch.toml").write_text("shard_size = 2\nqueue_high = 92\n")
    env = {"PDBATCH_HOME": str(home), "PDBATCH_SHARD_SIZE": "3"}
    settings = Settings.load({"block_size": 32}, env=env, cwd=here)
    assert (settings.max_attempts, settings.queue_high, settings.shard_size) == (3, 92, 3)
    assert settings.block_size == 32
    assert Settings.load({"shard_size": 4}, env=env, cwd=here).shard_size == 4
    assert Settings.load({"shard_size": None}, env=env, cwd=here).shard_size == 3


def test_home_in_a_file_is_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "pdbatch.toml").write_text('home = "data"\n')
    assert Settings.load(env={}, cwd=tmp_path).home == tmp_path / "data"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pdbatch.toml").write_text('home = "elsewhere"\n')
    with pytest.raises(ConfigError, match="inside of it"):
        Settings.load(env={}, cwd=tmp_path)


def test_an_unknown_key_names_itself_its_place_and_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PDBATCH_BROKER_ULR") as caught:
        load(tmp_path, {"PDBATCH_BROKER_ULR": "redis://x"})
    assert caught.value.remedy == "did you mean `PDBATCH_BROKER_URL`?"
    (tmp_path / "pdbatch.toml").write_text("blok_size = 16\n")
    with pytest.raises(ConfigError, match=r"pdbatch\.toml: unknown setting `blok_size`") as caught:
        load(tmp_path)
    assert caught.value.remedy == "did you mean `block_size`?"


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "pdbatch.toml").write_text("shard_size = \n")
    with pytest.raises(ConfigError, match=r"pdbatch\.toml"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("enable_prefix_caching", "no", False),
        ("enable_prefix_caching", "TRUE", True),
        ("kv_cache_bytes", "256MiB", 256 * 2**20),
        ("kv_cache_bytes", "1.5 GB", 1_500_000_000),
        ("claim_bytes", "1048576", 2**20),
        ("kv_transport", "tcp, shm", ("tcp", "shm")),
        ("kv_transport", "auto", ("auto",)),
        ("worker_ttl_s", "3.5", 3.5),
        ("log_level", "WARNING", "warning"),
        ("role", " Prefill", "prefill"),
        ("max_num_seqs", "", None),
        ("model", "", "smollm2-135m"),
    ],
)
def test_text_is_read_by_the_fields_type(
    tmp_path: Path, name: str, text: str, value: object
) -> None:
    assert getattr(load(tmp_path, {f"PDBATCH_{name.upper()}": text}), name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("shard_size", "many"),
        ("shard_size", "0"),
        ("shard_size", "1.5"),
        ("worker_ttl_s", "nan"),
        ("worker_ttl_s", "1"),  # below the heartbeat
        ("kv_cache_bytes", "12 parsecs"),
        ("enable_prefix_caching", "maybe"),
        ("role", "boss"),
        ("log_level", "loud"),
        ("block_size", "24"),
        ("pinned_share", "1.5"),
        ("kv_transport", ","),
        ("kv_transport", "rmda"),
        ("kv_transport", "shm,auto"),
        ("kv_transport", "mem"),
        ("queue_low", "65"),
        ("flower_port", "70000"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load(tmp_path, {f"PDBATCH_{name.upper()}": text})


def test_a_child_gets_exactly_these_settings(tmp_path: Path) -> None:
    (tmp_path / "pdbatch.toml").write_text('broker_url = "redis://elsewhere"\nmax_num_seqs = 7\n')
    settings = load(tmp_path, {"PDBATCH_BROKER_URL": "", "PDBATCH_KV_TRANSPORT": "tcp"})
    assert settings.broker_url is None
    child = Settings.load(env=settings.to_env(), cwd=tmp_path)
    assert child == settings
    assert child.max_num_seqs == 7


@given(st.data())
def test_every_setting_survives_the_way_through_the_environment(data: Any) -> None:
    texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
    sizes = st.integers(1, 2**40)
    values = {
        "model": data.draw(texts),
        "secret": data.draw(st.none() | texts),
        "claim_bytes": data.draw(sizes),
        "num_gpu_blocks": data.draw(st.none() | sizes),
        "kv_lease_s": data.draw(st.floats(0.001, 1e9)),
        "enable_prefix_caching": data.draw(st.booleans()),
    }
    settings = Settings(home=Path("/somewhere"), **values)
    assert Settings.load(env=settings.to_env(), cwd="/") == settings


def test_every_setting_is_a_variable() -> None:
    assert {f"PDBATCH_{key.upper()}" for key in KEYS} == set(Settings().to_env())
    assert [field.name for field in fields(Settings)] == list(KEYS)


def test_the_secret_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    settings = load(tmp_path / "new")
    secret = settings.cluster_secret()
    assert len(secret) == 64
    assert settings.cluster_secret() == secret
    assert stat.S_IMODE((tmp_path / "new" / "secret").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["secret"]
    assert load(tmp_path, {"PDBATCH_SECRET": "mine"}).cluster_secret() == "mine"
    (tmp_path / "new" / "secret").write_text("")
    with pytest.raises(ConfigError, match="empty"):
        settings.cluster_secret()


def test_settings_cannot_be_changed_and_are_named(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        load(tmp_path).model = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Settings("positional")  # type: ignore[misc]
