"""What a command was asked for, checked, as plain data that ranks are told. Nothing here imports torch before it works
with a model.
"""
