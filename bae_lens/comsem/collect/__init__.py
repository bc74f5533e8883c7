"""From a corpus to what is asked: tokens that activate features, and tokens that do not, in their sentences.

`collector.collect` runs the language model once over the text, cut as `corpus` says into contexts that know their
sentences. `sampling` keeps some tokens of each feature in `reservoirs` of bounded size, `background` ordinary tokens
for judges that compare. `instances` are what comes out, `dictionaries` what goes in.
"""
