"""What a person sees: the only room that plots.

`series` says what the figures of a comparison show, `figures` and `png` draw it; `page` is its report, `entropy` and
`comsem` have figures and pages of their own.
"""
