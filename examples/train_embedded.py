"""Train the small decoder that comes with the package, from nothing, on one CPU core in about 25 minutes.

    python examples/train_embedded.py OUT_FOLDER [TEXT_FILE ...]

Without text files it learns from the documentation that every Python carries: the docstrings of the standard library
and pydoc's chapters of the language reference. The same Python, torch and seed give the same weights.

    tokenizer   byte-level BPE, 1021 tokens       a prime: no number of ranks divides the vocabulary
    attention   6 query heads over 2 kv heads     at 4 ranks both heads and kv heads are shared unevenly
    MLP         350 wide                          divisible by 2, not by 4
    weights     1.4 M, embedding tied to the head; stored in bfloat16, loaded in float32
"""

from __future__ import annotations

import argparse
import ast
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F  # noqa: N812 - its usual name
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
NOT_DOCUMENTATION = {"__pycache__", "site-packages", "test", "tests", "idle_test", "lib2to3"}


def standard_library() -> Iterator[str]:
    """Every docstring of the standard library, and pydoc's topics, in an order that does not depend on the disk."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if NOT_DOCUMENTATION.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 60:
                    yield text
    for name in sorted(topics.topics):
        yield topics.topics[name].strip()


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1021, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=1021,
        hidden_size=192,
        intermediate_size=350,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm_up = min(100, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, *, steps: int, batch: int, length: int) -> None:
    held_out, tokens = tokens[: len(tokens) // 50], tokens[len(tokens) // 50 :]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))

    def loss_on(source: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        rows = torch.stack([source[start : start + length + 1] for start in starts.tolist()])
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    begun = time.monotonic()
    for step in range(steps):
        loss = loss_on(tokens, torch.randint(len(tokens) - length - 1, (batch,)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            with torch.no_grad():
                starts = torch.arange(0, len(held_out) - length - 1, length)
                checked = loss_on(held_out, starts)
            taken_s = time.monotonic() - begun
            print(f"step {step:5d}  loss {loss.item():.3f}  held out {checked.item():.3f}  {taken_s:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--steps", type=int, default=1350)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    texts = [path.read_text(encoding="utf-8") for path in options.texts] or list(standard_library())
    texts = [texts[i] for i in torch.randperm(len(texts)).tolist()]
    tokenizer = train_tokenizer(texts)
    end = tokenizer.token_to_id(END)
    tokens = torch.tensor([token for text in tokenizer.encode_batch(texts) for token in [*text.ids, end]])
    num_bytes = sum(len(text.encode()) for text in texts)
    model = new_model()
    print(
        f"{len(texts)} texts, {num_bytes} bytes, {len(tokens)} tokens; {model.num_parameters()} parameters", flush=True
    )

    train(model, tokens, steps=options.steps, batch=options.batch, length=options.length)

    model.to(torch.bfloat16).save_pretrained(options.out)
    # loaded in float32 unless asked otherwise: what this model is for is comparing
    model.config.dtype = torch.float32
    model.config.save_pretrained(options.out)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=512
    )
    wrapped.save_pretrained(options.out)

    prompt = wrapped("Return a list of", return_tensors="pt")
    written = model.float().eval().generate(**prompt, max_new_tokens=40, do_sample=False)
    print(wrapped.decode(written[0]))


if __name__ == "__main__":
    main()
