"""What a person sees: the only room that plots.

`series` says what the figures of a comparison show, `figures` and `png` draw it, `html` makes pages. `page` is a
comparison's report, `answer` and `explanations` are its words, `card` stands beside each dictionary. `entropy`,
`dynamics` and `demonstrations` show entropies, `comsem` the scores of features.
"""
