"""Two replicas of the model that comes along, on Ray Serve. From a clone:

serve run examples.serving.ray_replicas:app        http://127.0.0.1:8000/v1, as `partitioner serve` answers there
"""

from pathlib import Path

from partitioner import Plan
from partitioner.serving.on_ray import application
from partitioner.storage.example import EXAMPLE_MODEL

app = application(
    EXAMPLE_MODEL, Plan(tp=2), replicas=2, chat_template=Path(__file__).with_name("plain_chat.jinja"), max_batch=8
)
