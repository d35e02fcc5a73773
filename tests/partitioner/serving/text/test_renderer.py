"""One process renders many chats; one that hangs, or ends, is made anew for the next."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from partitioner.serving.text.chat_template import Renderer, TemplateFailed
from partitioner.storage.example import EXAMPLE_MODEL

TEMPLATE = """
{%- if messages[0].content == "hang" -%}
{%- for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor -%}
{%- endif -%}
{%- if messages[0].content == "refuse" %}{{ raise_exception("not that") }}{% endif -%}
{{ messages[0].content }}!"""


@pytest.fixture
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    found.chat_template = TEMPLATE
    return found


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_one_process_for_many_texts(tokenizer: Any) -> None:
    with Renderer(tokenizer, timeout_s=1) as renderer:
        assert renderer.render(said("a\u00e9" * 50_000)) == "a\u00e9" * 50_000 + "!"
        (child, _) = renderer._process.child or (0, None)
        for text in ("b", "c"):
            assert renderer.render(said(text)) == f"{text}!"
        with pytest.raises(TemplateFailed, match="not that"):
            renderer.render(said("refuse"))
        assert renderer._process.child is not None
        assert renderer._process.child[0] == child
        with pytest.raises(TemplateFailed, match="did not end within 1 s"):
            renderer.render(said("hang"))
        assert not Path(f"/proc/{child}").exists()
        assert renderer.render(said("after")) == "after!"
        (child, _) = renderer._process.child or (0, None)
        os.kill(child, 9)
        with pytest.raises(TemplateFailed):
            renderer.render(said("lost"))
        assert renderer.render(said("again")) == "again!"
        (child, _) = renderer._process.child or (0, None)
    assert not Path(f"/proc/{child}").exists()


def test_threads_take_turns(tokenizer: Any) -> None:
    found: dict[int, str] = {}
    with Renderer(tokenizer) as renderer:

        def ask(number: int) -> None:
            found[number] = renderer.render(said(str(number) * 1000))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert found == {number: str(number) * 1000 + "!" for number in range(6)}
