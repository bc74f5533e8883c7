"""Scores beside ComSem's own, each a module, asked of the same instances.

`detection` and `fuzzing` are about sentences, `simulation` about every token of them, `intruder` needs no explanation.
`catalog` names them all, `outcome` is what each gives. `score_test` asks a judge `known_cases` for those that the
judge's self-test says nothing of.
"""
