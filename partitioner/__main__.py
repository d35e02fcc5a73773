"""`python -m partitioner` is the command line."""

from partitioner.cli import main

main()
