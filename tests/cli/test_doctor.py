"""The doctor: with nothing here, with things in disorder, and on machines that are played."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdbatch.config import Settings
from pdbatch.doctor import examine, gpus
from pdbatch.doctor.report import Report
from pdbatch.doctor.services import ALIAS_PACKAGES, without_password
from pdbatch.doctor.text import print_report
from pdbatch.engine.gguf import ALIASES
from pdbatch.store import Store, upgrade
from tests.kvxfer import sysfs_trees

from .conftest import Program


def texts(report: Report, level: str) -> str:
    found = [f"{f.area}: {f.text} | {f.remedy}" for f in report.findings if f.level == level]
    return "\n".join(found)


def no_cuda(limit_s: float) -> dict[str, Any]:
    pytest.fail("CUDA was asked although there is nothing to ask")


def played(count: int, pci: list[str], nvlinks: int | None = 18) -> Callable[[float], Any]:
    """CUDA's answer for so many GPUs of one machine."""

    def probe(limit_s: float) -> dict[str, Any]:
        found = [
            {
                "name": "NVIDIA H100",
                "uuid": f"GPU-{index:04}",
                "pci": pci[index],
                "memory_bytes": 80 << 30,
                "capability": "9.0",
            }
            for index in range(count)
        ]
        more = [] if nvlinks is None else [nvlinks]
        peers = [[i, j, nvlinks != 0, *more] for i in range(count) for j in range(i + 1, count)]
        return {"cuda": "13.0", "gpus": found, "peers": peers, "error": ""}

    return probe


@pytest.fixture
def nothing(tmp_path: Path) -> Any:
    return sysfs_trees.build("no_rdma", tmp_path / "sys").machine()


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """All packages are installed."""
    monkeypatch.setattr("kvxfer.offers.find_spec", lambda name: object())


def test_a_machine_with_nothing_is_in_order(pdbatch: Program, settings: Settings) -> None:
    done = pdbatch("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "embedded" in done.stdout and "made or upgraded" in done.stdout
    assert "cpu → cpu" in done.stdout and "shm" in done.stdout
    document = json.loads(pdbatch("doctor", "--json").stdout)
    assert document["ok"] is True and document["versions"]["pdbatch"]
    assert {offer["name"] for offer in document["transports"]} >= {"shm", "rdma", "tcp"}
    assert not settings.home.exists(), "the doctor makes nothing"


def test_it_imports_no_torch_for_a_machine_without_gpu(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from pdbatch.config import Settings\nfrom pdbatch.doctor import examine\n"
        "from kvxfer.topology import read_machine\n"
        f"settings = Settings(home=Path({str(tmp_path)!r}))\n"
        "gpus = __import__('pdbatch.doctor.gpus', fromlist=['x'])\n"
        "gpus._device_files = lambda: False\n"
        "report = examine(settings, machine=read_machine('/nonexistent'))\n"
        "print(report.ok, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_disorder_is_told_with_remedies_and_exit_code_1(
    pdbatch: Program, settings: Settings
) -> None:
    settings.home.mkdir()
    (settings.home / "secret").write_text("x" * 64)
    (settings.home / "secret").chmod(0o644)
    done = pdbatch(
        "doctor",
        *("--broker-url", "redis://:hunter2@127.0.0.1:1/0"),
        *("--database-url", "sqlite:///none.db"),
        *("--kv-transport", "cuda_ipc,tcp", "--model", "/no/such/model"),
    )
    assert done.returncode == 1 and done.stderr == ""
    said = " ".join(done.stdout.split())
    assert f"chmod 600 {settings.home}/secret" in said
    assert "redis://***@127.0.0.1:1/0 cannot be reached" in said and "hunter2" not in said
    assert "pdbatch db upgrade" in said
    assert "kv_transport names cuda_ipc, of no use for KV on cpu" in said
    assert "/no/such/model does not exist" in said
    assert said.count("BROKEN") == 5


def test_no_password_is_shown(settings: Settings, nothing: Any) -> None:
    assert without_password("redis://u:p@h/0") == "redis://***@h/0"
    url = "postgresql://user:hunter3@127.0.0.1:1/pdbatch?connect_timeout=2"
    report = examine(Settings(home=settings.home, database_url=url), machine=nothing, probe=no_cuda)
    assert not report.ok and "database: " in texts(report, "broken")
    assert "hunter3" not in repr(report)


def test_a_gpu_that_was_asked_for_and_is_not_there(settings: Settings, nothing: Any) -> None:
    def broken(limit_s: float) -> dict[str, Any]:
        return {"cuda": None, "gpus": [], "peers": [], "error": "no answer within 90 s"}

    report = examine(Settings(home=settings.home, device="cuda:1"), machine=nothing, probe=broken)
    assert "CUDA cannot be used: no answer within 90 s | See that" in texts(report, "broken")
    one = examine(
        Settings(home=settings.home, device="cuda:1"),
        machine=nothing,
        probe=played(1, ["0000:01:00.0"]),
    )
    assert "there is no device cuda:1 | Use one of cuda:0" in texts(one, "broken")
    assert [gpu.pci for gpu in one.gpus] == ["0000:01:00.0"], "sysfs does not show it; CUDA does"


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import time; time.sleep(600)", "no answer within 1 s"),
        ("import os; os.abort()", "ended with -6"),
        ("raise SystemExit('no libcuda')", "ended with 1: no libcuda"),
    ],
)
def test_a_driver_that_hangs_or_dies_takes_nobody_along(
    monkeypatch: pytest.MonkeyPatch, program: str, error: str
) -> None:
    monkeypatch.setattr(gpus, "PROBE_COMMAND", (sys.executable, "-S", "-c", program))
    answer = gpus.ask_cuda(1.0 if "sleep" in program else 60.0)
    assert answer["gpus"] == [] and answer["error"].startswith(error)


def test_a_dgx_has_its_matrix_its_nics_and_its_pairs(
    settings: Settings, tmp_path: Path, everything: None, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = sysfs_trees.build("dgx_h100", tmp_path / "sys").machine()
    probe = played(8, [gpu.place.pci for gpu in machine.gpus])
    report = examine(settings, machine=machine, probe=probe)
    assert [gpu.nics for gpu in report.gpus[:2]] == [["mlx5_0"], ["mlx5_3"]]
    assert [gpu.nic_link for gpu in report.gpus] == ["PXB"] * 8
    assert report.nic_lines["gpu"].startswith("KVCACHE_RDMA_NICS=mlx5_0,mlx5_3")
    assert len(report.gpu_pairs) == 28 and report.gpu_pairs[0].link == "NV18"
    pairs = {(pair.source, pair.reader): (pair.transport, pair.why) for pair in report.pairs}
    assert pairs["cuda:3", "cuda:3"] == ("cuda_ipc", "one device")
    assert pairs["cuda:0", "cuda:7"] == ("cuda_ipc", "peer access, 18 NVLinks")
    assert pairs["cpu", "cpu"] == ("shm", "one machine")
    assert len(pairs) == 1 + 8 + 28
    assert "rdma: " in texts(report, "warning"), "NICs are up, and pyverbs is not here"
    print_report(report)
    shown = " ".join(capsys.readouterr().out.split())
    assert "and 24 more" in shown and "NV18" in shown and "port 1 is DOWN" in shown


def test_without_nvml_the_way_over_pcie_is_told(
    settings: Settings, tmp_path: Path, everything: None
) -> None:
    machine = sysfs_trees.build("pcie_box", tmp_path / "sys").machine()
    pci = [gpu.place.pci for gpu in machine.gpus]
    report = examine(settings, machine=machine, probe=played(2, pci, nvlinks=None))
    (pair,) = report.gpu_pairs
    assert (pair.link, pair.words) == ("NODE", "peer access, PCIe NODE")
    report = examine(settings, machine=machine, probe=played(2, pci, nvlinks=0))
    assert report.gpu_pairs[0].words == "no peer access (PCIe NODE)"
    assert "no peer access between cuda:0 and cuda:1" in texts(report, "note")


def register(store: Store, name: str, host: str, role: str, **info: Any) -> None:
    values = {"layout": "abc", "transports": ["shm", "tcp"], "listen_host": "0.0.0.0"}
    device = info.pop("device", "cpu")
    store.workers.register(name, host, role, "m", device, values | info)


def test_pairs_of_live_workers(settings: Settings, nothing: Any) -> None:
    upgrade(settings.database_url)
    with Store.open(settings.database_url) as store:
        register(store, "p", "a", "prefill")
        register(store, "d-near", "a", "decode")
        register(store, "d-far", "b", "decode", listen_host="127.0.0.1")
        register(store, "d-other", "a", "decode", layout="xyz")
        register(store, "d-deaf", "b", "decode", transports=["shm"])
    report = examine(settings, machine=nothing, probe=no_cuda)
    pairs = {pair.reader: (pair.transport, pair.why) for pair in report.pairs}
    assert report.live_workers == 5
    assert pairs["d-near@a"] == ("shm", "one machine")
    assert pairs["d-far@b"] == ("tcp", "two machines")
    assert pairs["d-other@a"] == ("", "they keep KV in different shapes (abc and xyz)")
    assert pairs["d-deaf@b"][0] == ""
    assert report.pairs[1].not_taken == {} or "shm" in report.pairs[0].not_taken
    assert not report.ok and "KV cannot move from p@a to d-deaf@b" in texts(report, "broken")


def test_a_prefill_worker_without_readers(settings: Settings, nothing: Any) -> None:
    upgrade(settings.database_url)
    with Store.open(settings.database_url) as store:
        register(store, "p", "a", "prefill")
    report = examine(settings, machine=nothing, probe=no_cuda)
    assert report.ok and "no decode worker for m, which p prefills" in texts(report, "warning")


def test_the_doctor_knows_the_aliases() -> None:
    assert {alias: package for alias, (package, _) in ALIASES.items()} == ALIAS_PACKAGES


def test_what_cannot_be_examined_keeps_nothing_else_from_it(
    settings: Settings, nothing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("a surprise")

    monkeypatch.setattr("pdbatch.doctor.nics.look", fail)
    report = examine(settings, machine=nothing, probe=no_cuda)
    assert "nics: cannot be examined: RuntimeError: a surprise" in texts(report, "broken")
    assert "memory: " in texts(report, "ok") and "redis: " in texts(report, "ok")
