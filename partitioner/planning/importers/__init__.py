"""Clusters from files of other tools: NCCL's topology, Slurm's, AIConfigurator's systems."""
