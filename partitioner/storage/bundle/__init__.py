"""Bundles: a partitioned model as files; loading them executes no code from them.

save_ranks(parts, folder, ...)      save.py
load(folder), Bundle                bundle.py
the files' schema                   format/
resharding to another plan          reshard_model.py, reshard_origins.py; held_slices.py, held_weight.py (quantised)
a bundle as text                    describe.py
"""
