"""The commands of `bae-lens`: dataclasses whose fields are their flags, and which return what is to be printed.

Each stands in a module of its name, which `main` imports when the command is asked for.
"""
