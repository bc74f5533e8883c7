"""The subcommands of `bae-lens`, one a module."""
