"""Steps of many requests over pipeline stages: slots that all stages share, and groups whose devices choose tokens."""
