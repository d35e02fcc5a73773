"""`python -m partitioner` is the command line."""

from partitioner.cli.app import main

main()
