"""Activations as entropy-coded bits in a file, and back (section 5).

In reading order: `codec` (`compress`, `decompress`, `read_code`), `coder` (bits to words), `code_file` and
`code_writer` (the `.bae` file), `vector_files` (vectors in files larger than memory).
"""
