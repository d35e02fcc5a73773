"""Mesh axes and layouts: leaf modules, which `runtime` and `passes` import too."""
