"""Bundles: a partitioned model as files that run nothing when they are read.

save_ranks(parts, folder, ...)      save.py
load(folder), Bundle                bundle.py

Of the room format/:

manifest.py      what a bundle is        bundle_files.py      files, opened without following links
rank_format.py   one rank as data        graph_format.py      a graph as data, a line per node
op_names.py      what a graph may call   untrusted_json.py    data that may be hostile
"""
