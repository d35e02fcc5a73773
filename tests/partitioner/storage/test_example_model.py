"""The embedded decoder is a checkpoint that transformers itself can load, small and trained."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_is_small(embedded_folder: Path) -> None:
    assert sum(path.stat().st_size for path in embedded_folder.iterdir()) <= 3_000_000


def test_continues_a_prompt(embedded_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    model = AutoModelForCausalLM.from_pretrained(embedded_folder).eval()
    assert model.dtype == torch.float32
    text = "Return the number of items in the list."
    tokens = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(tokens.input_ids[0]) == text
    with torch.no_grad():
        loss = model(**tokens, labels=tokens.input_ids).loss
    assert loss < 4.0  # ln(1021) = 6.9 untrained
