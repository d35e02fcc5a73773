"""The model that comes with the package: a small trained decoder, so that examples run on a laptop with no network.

EXAMPLE_MODEL   its checkpoint folder, as `AutoModelForCausalLM.from_pretrained` takes it; see the README.md inside
"""

from pathlib import Path

__all__ = ["EXAMPLE_MODEL"]

EXAMPLE_MODEL = Path(__file__).resolve().with_name("example_model")
