"""The commands: options and help. What a command checks its arguments by, and then what does its work, is imported when
it is called.

So `--help` and an error of the arguments take a fraction of a second; torch and transformers alone take several.
"""
