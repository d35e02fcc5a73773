"""The passes of a plan: by name, in order, run, and looked over."""
