import math

import pytest
from transformers import GenerationConfig

from partitioner.errors import PartitionerError, SamplingError
from runtime.sampling.sampling_options import Sampling


def test_defaults_are_those_of_transformers() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    ours = Sampling()
    for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(ours, name) == defaults[name], name
    assert ours.min_p is GenerationConfig().min_p


@pytest.mark.parametrize(
    ("field", "value", "required"),
    [
        ("do_sample", 1, "True or False"),
        ("temperature", 0, "a number above 0, got 0; for greedy search set do_sample=False"),
        ("temperature", -1.0, "a number above 0, got -1.0"),
        ("temperature", math.nan, "above 0, got nan"),
        ("temperature", math.inf, "above 0, got inf"),
        ("temperature", "hot", "above 0, got 'hot'"),
        ("temperature", True, "above 0, got True"),
        ("top_k", -1, "None or a whole number, 0 for off, got -1"),
        ("top_k", 5.0, "whole number, 0 for off, got 5.0"),
        ("top_p", 1.5, "None or from 0 to 1, got 1.5"),
        ("top_p", math.nan, "from 0 to 1, got nan"),
        ("min_p", -0.1, "None or from 0 to 1, got -0.1"),
        ("repetition_penalty", 0.0, "a number above 0, got 0.0"),
        ("seed", -1, "whole number of 64 bits"),
        ("seed", 2**64, "whole number of 64 bits"),
        ("seed", 1.0, "whole number of 64 bits"),
    ],
)
def test_what_is_out_of_range_is_named(field: str, value: object, required: str) -> None:
    with pytest.raises(SamplingError, match=rf"Sampling\.{field} must be .*{required}"):
        Sampling(**{field: value})
    assert issubclass(SamplingError, PartitionerError)
    assert issubclass(SamplingError, ValueError)


def test_neutral_values_switch_filters_off() -> None:
    off = {"top_k": None, "top_p": None, "min_p": None}
    assert Sampling(top_k=0).filters == Sampling(top_k=None, top_p=None).filters == off
    assert Sampling(min_p=0.0, top_p=0).filters == {"top_k": 50, "top_p": 0, "min_p": 0.0}
