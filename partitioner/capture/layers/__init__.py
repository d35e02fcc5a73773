"""Identical layers traced once: which are alike, what stands for the others in the trace, and putting them back."""
