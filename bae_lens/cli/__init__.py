"""The subcommands of `bae-lens`: dataclasses whose fields are their flags, and which return what is to be printed."""
