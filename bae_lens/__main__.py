"""`python -m bae_lens` is `bae-lens`."""

from bae_lens.cli.main import main

main()
