"""Greedy choice by kernels: the most likely token of each row, inside captured steps."""
