"""Bundles: a partitioned model as files that run nothing when they are read.

save_ranks(parts, folder, ...)      save.py
load(folder), Bundle                bundle.py

manifest.py  what a bundle is          folder.py   files, opened without following links
ranks.py     one rank as data          graphs.py   a graph as data, a line per node
ops.py       what a graph may call     reading.py  data that may be hostile
"""
