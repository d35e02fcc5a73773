"""The ops that stand in graphs; none communicates by itself."""
