from __future__ import annotations
from dataclasses import dataclass
import torch
from runtime.ops.collectives import all_gather

@dataclass(frozen=True, kw_only=True)
class Sampling:
    do_sample: bool = False

class Sampler:
    def __init__(self, sampling, program, communicator, *, logprobs=False):
        self.p = program
        self.gather = None
        if program.vocabulary is not None:
            self.gather = communicator.bind(all_gather, "tp", node="logits", options={"dim": 1, "sizes": [v.size for v in program.vocabulary]})
            self.order = torch.tensor([i for v in program.vocabulary for i in v.indices()])
    def __call__(self, logits, *, request_ids, step, texts):
        if self.gather is not None:
            logits = self.gather(logits.contiguous())
            t = self.order[logits.argmax(-1)].tolist()
        else:
            t = logits.argmax(-1).tolist()
        return t, [None] * len(t)
