"""`dinogen serve` as it is typed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from dinogen.errors import UserError
from dinogen.serve.server import open_site
from launch.cli import main


@pytest.fixture
def fails(monkeypatch, capsys):
    """Runs the command line in this process, which has to fail; gives its last line."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dinogen", *map(str, arguments)])
        monkeypatch.delenv("DINOGEN_DEBUG", raising=False)
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return call


def test_it_serves_until_it_is_interrupted(runs):
    command = [sys.executable, "-m", "launch.cli", "serve", str(runs["guided"]), "--port", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as server:
        try:
            line = server.stdout.readline()
            (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", line)
            assert "guided" in httpx.get(url).text
            assert httpx.get(f"{url}image.png?seed=1").content.startswith(b"\x89PNG")
            assert httpx.get(url, headers={"x": "y" * 20_000}).status_code == 431
            server.send_signal(signal.SIGINT)
            _, err = server.communicate(timeout=120)
        finally:
            server.kill()
    assert server.returncode == 0, err
    assert "Traceback" not in err


def test_a_port_that_is_taken_is_one_line(runs, fails):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = fails("serve", runs["guided"], "--port", port)
    assert line.startswith(f"dinogen: --host 127.0.0.1 --port {port}: Address already in use")


def test_an_address_of_another_machine_is_one_line(runs):
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.1"):
        open_site(runs["guided"], "192.0.2.1", 0)


def test_no_run_is_one_line(tmp_path, fails):
    assert "no run here" in fails("serve", tmp_path, "--port", 0)


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(runs, fails, monkeypatch, missing):
    for name in list(sys.modules):
        if name.startswith(("dinogen.serve.", f"{missing}.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    line = fails("serve", runs["guided"])
    assert line == f"dinogen: serve needs {missing}: pip install 'dinogen[serve]'"


def test_only_this_machine_can_reach_it_unless_told_otherwise(runs):
    for host, private in (("127.0.0.1", True), ("0.0.0.0", False)):
        site = open_site(runs["guided"], host, 0)
        assert site.private is private
        assert site.url.startswith(f"http://{host}:")
        assert site._listener.getsockname()[0] == host
        site._listener.close()
