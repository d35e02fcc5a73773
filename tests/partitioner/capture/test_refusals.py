"""What cannot be captured is refused by what is required; what only looks so is captured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import CausalLMOutput

from partitioner import CaptureError, InputError, Plan, load, partition

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


def llama(kind: type[PreTrainedModel] = LlamaForCausalLM, **fields: Any) -> PreTrainedModel:
    return kind(LlamaConfig(**SIZES, **fields)).eval()


def returning(change: Callable[[Any], Any]) -> PreTrainedModel:
    class Changed(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
            return change(super().forward(input_ids, **given).logits)

    return llama(Changed)


def packed() -> PreTrainedModel:
    model = llama()
    model.lm_head = torch.ao.nn.quantized.dynamic.Linear(32, 64)
    return model


def of_pictures() -> PreTrainedModel:
    """Its embedding is of patches, and no table."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes)).eval()


class Bare(PreTrainedModel):
    """Its configuration has none of the usual fields."""

    config_class = type("BareConfig", (PreTrainedConfig,), {"model_type": "bare"})

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.table(input_ids)))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: returning(lambda logits: (logits,)), r"its forward returns a tuple; required is an output"),
        (lambda: returning(lambda logits: logits), r"its forward returns a \w*Tensor; required is an output"),
        (lambda: returning(lambda logits: None), r"its forward returns a NoneType; required is"),
        (lambda: returning(lambda logits: {"out": logits}), r"neither logits nor last_hidden_state; it has out"),
        (packed, r"lm_head is a torch.ao.*Linear, whose weights are packed.*before it was quantised"),
        (lambda: nn.DataParallel(llama()), r"cannot capture a DataParallel.*give that, its \.module"),
        (lambda: llama(LlamaForSequenceClassification), r"set model.config.pad_token_id, or pad_token_id in config"),
        (of_pictures, r"its forward takes no input_ids; it takes self, pixel_values"),
    ],
    ids=["tuple", "tensor", "nothing", "other names", "packed", "wrapped", "no padding token", "no tokens"],
)
def test_a_refusal_says_what_is_required(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        partition(make(), Plan(tp=2))


def encoder_of(kind: str) -> PreTrainedModel:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = BartModel(BartConfig(vocab_size=64, max_position_embeddings=64, **sizes, **heads)).eval()
    part: PreTrainedModel = model.get_submodule(kind)
    return part


def short() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=16)).eval()


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(encoder_of, "encoder"),
        functools.partial(encoder_of, "decoder"),
        short,
        lambda: Bare(Bare.config_class()).eval(),
        lambda: llama(LlamaForSequenceClassification, pad_token_id=0),
    ],
    ids=["an encoder", "a decoder", "few positions", "a bare configuration", "padding"],
)
def test_what_only_looks_so_is_captured(make: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = make()
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=ids)[0]
    torch.testing.assert_close(partition(model, Plan(tp=2)).simulate(input_ids=ids), expected, rtol=1e-4, atol=1e-5)


class Typed(Bare):
    """Types of tokens change what it says. by_itself: where none are given it takes zeros."""

    by_itself = False

    def forward(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None = None) -> CausalLMOutput:
        if token_type_ids is None and self.by_itself:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.table(input_ids)
        return CausalLMOutput(logits=self.head(x if token_type_ids is None else x + self.table(token_type_ids)))


class TypedByItself(Typed):
    by_itself = True


@pytest.mark.parametrize("kind", [Typed, TypedByItself])
def test_types_of_tokens_are_zeros_only_where_the_model_takes_none_for_zeros(kind: type[Typed]) -> None:
    torch.manual_seed(0)
    model = kind(kind.config_class()).eval()
    parts, ids = partition(model, Plan(tp=2)), torch.randint(3, 64, (2, 9))
    torch.testing.assert_close(parts.simulate(input_ids=ids), model(input_ids=ids).logits)
    types = ids % 2
    if kind.by_itself:
        found = parts.simulate(input_ids=ids, token_type_ids=types)
        torch.testing.assert_close(found, model(input_ids=ids, token_type_ids=types).logits)
    else:
        with pytest.raises(InputError, match="unknown input 'token_type_ids'; the inputs are input_ids"):
            parts.simulate(input_ids=ids, token_type_ids=types)


class Padded(Bare):
    """Hides tokens that a mask names. by_itself: where none is given it hides padding."""

    by_itself = False

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> CausalLMOutput:
        if attention_mask is None:
            hides = self.by_itself
            attention_mask = (input_ids != self.config.pad_token_id).long() if hides else torch.ones_like(input_ids)
        return CausalLMOutput(logits=self.head(self.table(input_ids) * attention_mask[..., None]))


class PaddedByItself(Padded):
    by_itself = True


@pytest.mark.parametrize("kind", [Padded, PaddedByItself])
def test_padding_wants_a_mask_only_where_the_model_hides_it_by_itself(kind: type[Padded], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind(kind.config_class(pad_token_id=1)).eval()
    compiled = partition(model, Plan(tp=2))
    compiled.save(tmp_path / "saved")
    ids = torch.randint(3, 64, (2, 9))
    for parts in (compiled, load(tmp_path / "saved")):
        torch.testing.assert_close(parts.simulate(input_ids=ids), model(input_ids=ids).logits)
        padded = torch.cat([ids, torch.ones(2, 3, dtype=torch.int64)], 1)
        for mask in ((padded != 1).long(), torch.ones_like(padded)):
            found = parts.simulate(input_ids=padded, attention_mask=mask)
            torch.testing.assert_close(found, model(input_ids=padded, attention_mask=mask).logits)
        if kind.by_itself:
            with pytest.raises(InputError, match=r"holds the padding token 1, .*: give attention_mask="):
                parts.simulate(input_ids=padded)
        else:
            torch.testing.assert_close(parts.simulate(input_ids=padded), model(input_ids=padded).logits)


class OfChoices(Bare):
    """Takes several texts for each row, and tells one number for each."""

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        said = self.head(self.table(input_ids.view(-1, input_ids.shape[-1])))[:, 0, :1]
        return CausalLMOutput(logits=said.view(-1, input_ids.shape[1]))


def test_what_is_not_about_lengths_is_said_not_to_be() -> None:
    with pytest.raises(CaptureError, match="the error is not about lengths"):
        partition(OfChoices(OfChoices.config_class()).eval(), Plan(tp=2))


class Drawing(Bare):
    """Noise on what it says, or only what is random in training."""

    in_evaluation = True

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        x = nn.functional.dropout(self.table(input_ids), 0.5, self.training)
        x = nn.functional.alpha_dropout(x, 0.5, self.training)
        unread = torch.rand([])
        if self.in_evaluation or (self.training and unread < 0.5):
            x = x + torch.randn_like(x)
        return CausalLMOutput(logits=self.head(x))


class DrawingInTraining(Drawing):
    in_evaluation = False


def test_what_is_drawn_is_refused_and_what_only_training_draws_is_not() -> None:
    with pytest.raises(CaptureError, match=r"aten.randn_like.*: it draws random numbers, of which each rank would"):
        partition(Drawing(Drawing.config_class()).eval(), Plan(tp=2))
    torch.manual_seed(0)
    model, ids = DrawingInTraining(Drawing.config_class()).eval(), torch.randint(3, 64, (2, 9))
    found = partition(model, Plan(tp=2)).simulate(input_ids=ids)
    torch.testing.assert_close(found, model(input_ids=ids).logits)


class FewRows(Bare):
    """Fails for more tokens than it has rows."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.rows = nn.Parameter(torch.ones(16, 32))

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.table(input_ids) + self.rows[: input_ids.shape[1]]))


def test_a_length_that_is_too_long_is_said_to_be() -> None:
    model = FewRows(FewRows.config_class()).eval()
    with pytest.raises(CaptureError, match=r"with texts of 37 tokens, which is more than it takes: .*smaller N"):
        partition(model, Plan(tp=2))
    assert (
        partition(model, Plan(tp=2), fixed_length=9).simulate(input_ids=torch.ones(1, 9, dtype=torch.int64)).shape[1]
        == 9
    )
