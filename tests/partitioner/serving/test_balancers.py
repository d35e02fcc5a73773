"""The example files of HAProxy and nginx before two servers: requests go to both, and none is lost when one ends."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from transformers import AutoTokenizer

from partitioner.serving.http.limits import Limits
from partitioner.serving.http.service import Service
from partitioner.storage.example import EXAMPLE_MODEL
from tests.partitioner.serving.scripted_model import ScriptedModel
from tests.partitioner.serving.served import ROOT, in_thread
from tests.support.processes.free_port import free_port

EXAMPLES = ROOT / "examples" / "serving"
COMMANDS = {"haproxy": ["haproxy", "-f", "haproxy.cfg"], "nginx": ["nginx", "-p", ".", "-c", "nginx.conf"]}
ASKED = {"model": "m", "prompt": "If", "max_tokens": 3}


@contextmanager
def balancer(name: str, folder: Path, servers: list[str]) -> Iterator[str]:
    """Its file, with other ports."""
    port = free_port()
    command = COMMANDS[name]
    text = (EXAMPLES / command[-1]).read_text().replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    for place, server in enumerate(servers):
        text = text.replace(f"127.0.0.1:800{place + 1}", server.removeprefix("http://"))
    (folder / command[-1]).write_text(text.replace("/tmp/partitioner-nginx.pid", str(folder / "pid")))
    process = subprocess.Popen(command, cwd=folder)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx2.TransportError:
                pass
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/v1/completions"
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_both_are_asked_and_none_that_ends(name: str, tmp_path: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    tokenizer: Any = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    models = [ScriptedModel(lambda prompt, options: [5, 6, 7]) for _ in range(2)]
    limits = Limits(max_length=100)
    services = [Service(model, tokenizer, name="m", limits=limits) for model in models]  # type: ignore[arg-type]
    with ExitStack() as stack:
        running = [stack.enter_context(in_thread(service)) for service in services]
        url = stack.enter_context(balancer(name, tmp_path, [found for found, _ in running]))
        pool = stack.enter_context(ThreadPoolExecutor(8))

        def ask(_: int) -> int:
            return httpx2.post(url, json=ASKED, timeout=20).status_code

        assert set(pool.map(ask, range(24))) == {200}
        assert all(len(model.calls) >= 6 for model in models)
        with httpx2.stream("POST", url, json={**ASKED, "stream": True}) as answer:
            assert list(answer.iter_lines())[-2] == "data: [DONE]"
        before = len(models[0].calls)
        asyncio.run_coroutine_threadsafe(services[0].drain(5), running[0][1]).result(10)
        assert set(pool.map(ask, range(24))) == {200}
        assert len(models[0].calls) == before
