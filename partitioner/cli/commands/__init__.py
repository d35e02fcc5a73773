"""The commands: options and help. Each imports what does its work when it is called, and checks plain arguments before.

So `--help` and an error of the arguments take a fraction of a second; torch and transformers alone take several.
"""
