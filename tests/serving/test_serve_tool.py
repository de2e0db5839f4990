"""tools/serve.py as a process, and what it says where it cannot work."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import megakda
from megakda.errors import RuntimeMismatch
from megakda.serving import PACKAGES, require_packages
from tests import jobs

TOOL = Path(megakda.__file__).resolve().parents[1] / "tools" / "serve.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("serve_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_from_a_run_to_a_server_and_back(ranks, corpus, tmp_path):
    """The command from its help, the curl line that it prints, and SIGTERM amid an answer."""
    run = tmp_path / "run"
    ranks.run(1, jobs.fit, ["train.steps=1", "train.save_every=1"], corpus, str(run))
    command = [sys.executable, str(TOOL), str(run), "--port", "0", "--max-context", "512"]
    environment = {**os.environ, "MEGAKDA_API_KEY": "secret"}
    log = tmp_path / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            lines = [process.stdout.readline() for _ in range(4)]
            assert re.search(
                r"serving .*step_00000001 as 'run' at http://127.0.0.1:\d+/v1", lines[0]
            )
            curl = shlex.split(lines[3])
            assert curl[0] == "curl" and "Authorization: Bearer $MEGAKDA_API_KEY" in curl
            body = json.loads(curl[curl.index("-d") + 1])
            key = {"Authorization": "Bearer secret"}
            with httpx.Client(trust_env=False, timeout=60, headers=key) as client:
                found = client.post(curl[1], json=body)
                assert found.status_code == 200 and found.json()["model"] == "run"
                body |= {"max_tokens": 200, "stream": True, "ignore_eos": True}
                with client.stream("POST", curl[1], json=body) as answer:
                    events = answer.iter_lines()
                    next(events)
                    process.send_signal(signal.SIGTERM)
                    *_, last = (event for event in events if event)
                assert last == "data: [DONE]"  # it was given the time to end
            assert process.wait(30) == 0
            assert "stopping; 1 requests have 20 s" in process.stdout.read()
        finally:
            process.kill()
    # A CUDA build of torch says that there is no GPU.
    assert [line for line in log.read_text().splitlines() if "CUDA_HOME" not in line] == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--port", "70000"], 2, "--port 70000 must be in 0..65535"),
        (["--host", "192.0.2.1"], 2, "this machine does not have that address"),
        (["--api-key", "two words"], 2, "set another --api-key or MEGAKDA_API_KEY"),
        (["--max-sequences", "0"], 2, "max_sequences=0 must be at least 1"),
        (["--max-queue", "-1"], 2, "--max-queue -1 must be at least 0"),
        (["--request-timeout", "0"], 2, "--request-timeout 0 must be above 0"),
        (["--chat-template", "nothing.jinja"], 2, "--chat-template nothing.jinja cannot be read"),
        (["--port", "0"], 4, "name a run's folder"),
    ],
)
def test_what_cannot_work(tool, arguments, code, message, tmp_path, capsys):
    assert tool.main([str(tmp_path / "none"), *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_port_in_use(tool, tmp_path, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert tool.main([str(tmp_path), "--port", str(port)]) == 2
    assert f"--port {port}: another program listens there" in capsys.readouterr().err


def test_sizes_are_read_from_the_command_line(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["run", "--max-body", "1 lot"])
    assert "'1 lot' is no size" in capsys.readouterr().err
    with pytest.raises(SystemExit) as info:
        tool.main(["--help"])
    assert info.value.code == 0 and "docs/serving.md" in capsys.readouterr().out


@pytest.mark.parametrize("package", PACKAGES)
def test_missing_packages(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeMismatch, match=r"pip install 'megakda\[serve\]'"):
        require_packages()
