"""Activations as entropy-coded bits in a file, and back (section 5).

In reading order: `codec` (`compress`, `decompress`, `read_code`), `code_file` and `code_writer` (the `.bae` file),
`coder`, `pair_coder` and `geometry_coder` (bits to words).
"""
