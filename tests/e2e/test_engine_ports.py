"""An engine before its process listens: its ports are held, and whoever waits for it says so."""

import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from command import POLICY, toy_engine

from searche1.rollout import engine


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The ports of HTTP and of the ranks' meeting that an engine, which never starts, is given; they are held."""
    commands: list[list[str]] = []
    monkeypatch.setattr(engine, "start_process", lambda command, **_: commands.append(command))
    started = toy_engine(POLICY, tmp_path / "engine.log")
    (command,) = commands
    yield tuple(int(command[command.index(option) + 1]) for option in ("--port", "--nccl-port"))
    started.stop()


def test_nobody_else_gets_a_port_before_the_engine_listens(ports: tuple[int, int]) -> None:
    for port in ports:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))


def test_the_engine_listens_at_its_ports_and_again_after_a_restart(ports: tuple[int, int]) -> None:
    http, meeting = ports
    for _ in range(2):
        with socket.create_server(("127.0.0.1", http)) as server, socket.create_connection(("127.0.0.1", http)):
            server.accept()[0].close()
        store = dist.TCPStore("127.0.0.1", meeting, is_master=True, timeout=timedelta(seconds=10))
        del store


def test_waiting_for_an_engine_is_told(
    ports: tuple[int, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "PROGRESS_EVERY_S", 0.2)
    silent = engine.Engine(url=f"http://127.0.0.1:{ports[0]}")  # held, and nobody listens
    with pytest.raises(engine.EngineError, match=r"not ready within 1 s"):
        silent.wait_until_ready(timeout_s=1)
    assert capsys.readouterr().err.count(f"waiting for the engine at http://127.0.0.1:{ports[0]}, 0 s") > 1
