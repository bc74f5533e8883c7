"""Cases with known answers for simulation and intruder detection: our own sentences."""

import re

from bae_lens.comsem.collect.instances import Excerpt, Instance
from bae_lens.comsem.judges.tokens import WORD


def excerpt_from_marked(marked: str) -> Excerpt:
    """The words of a sentence, with activation 1 on those between << and >> and 0 on the others.

    >>> excerpt_from_marked("A <<cat>> sat.")
    Excerpt(text='A cat sat.', tokens=[(0, 1), (2, 5), (6, 9), (9, 10)], activations=[0.0, 1.0, 0.0, 0.0])
    """
    parts = re.split("<<|>>", marked)  # what is marked is every second
    tokens, activations, start = [], [], 0
    for number, part in enumerate(parts):
        spans = [match.span() for match in WORD.finditer(part)]
        tokens += [(start + first, start + last) for first, last in spans]
        activations += [float(number % 2)] * len(spans)
        start += len(part)
    return Excerpt("".join(parts), tokens, activations)


SIMULATION_CASES = tuple(
    (explanation, tuple(map(excerpt_from_marked, texts)))
    for explanation, texts in (
        (
            "animals",
            ("The <<horse>> and the <<dog>> waited by the gate.", "Nobody had seen the <<wolf>> since the winter."),
        ),
        (
            "kinds of weather",
            (
                "First came the <<rain>>, then <<snow>> and a cold <<wind>>.",
                "She shut the window before the <<storm>>.",
            ),
        ),
        (
            "money and payments",
            ("He paid the <<debt>> with borrowed <<money>>.", "The <<tax>> on the old house was too high."),
        ),
        (
            "family members",
            ("My <<brother>> wrote to our <<mother>>.", "The letter was for her <<uncle>>."),
        ),
        ("prepositions", ("He walked <<across>> the field <<with>> a lamp.", "The key lay <<under>> the mat.")),
        ("past tense verbs", ("The old man <<laughed>> and <<closed>> the door.", "In spring the children <<left>>.")),
        ("plural nouns", ("The <<trees>> hid two <<houses>> and a well.", "He sold <<apples>> at the gate.")),
        ("commas", ("He came in<<,>> saw the mess<<,>> and left.", "Before noon<<,>> the road was clear again.")),
        ("the first word of a sentence", ("<<Nobody>> knew the way.", "<<Later>> the bell rang again.")),
        ("numbers", ("The <<two>> men waited <<seven>> hours.", "In <<1865>> the war was over.")),
        (
            "words directly after a comma",
            ("After lunch, <<he>> slept.", "Tired of walking, <<they>> sat down on the stairs."),
        ),
        ('the word "the"', ("<<The>> dog chased <<the>> cat.", "We saw <<the>> sea behind a hill.")),
    )
)
"""Explanations, each with excerpts in which all tokens that it fits are known."""

ALIKE_CASES = tuple(
    (tuple(map(Instance.from_marked, alike)), Instance.from_marked(other))
    for alike, other in (
        (
            ("The <<sheep>> were shorn.", "A <<fox>> took the hen.", "Her <<cat>> slept.", "The <<whale>> dived."),
            "The <<ladder>> was too short.",
        ),
        (
            ("The <<snow>> melted.", "A <<breeze>> came up.", "The <<fog>> lifted.", "After the <<hail>> they left."),
            "The <<lawyer>> smiled.",
        ),
        (
            ("He lost the <<coins>>.", "The <<rent>> is due.", "Her <<salary>> rose.", "The <<bank>> closed early."),
            "The <<meadow>> was wet.",
        ),
        (
            ("My <<sister>> called.", "His <<aunt>> is ill.", "Their <<father>> sang.", "Her <<cousin>> came late."),
            "The <<window>> broke.",
        ),
        (
            (
                "She lives in <<Spain>>.",
                "They left <<Norway>>.",
                "He knows <<Egypt>> well.",
                "Trade with <<Japan>> grew.",
            ),
            "The <<basket>> was empty.",
        ),
        (
            ("The <<nurse>> ran.", "A <<cough>> kept him up.", "The <<surgeon>> left.", "No <<medicine>> helped."),
            "The <<violin>> was lost.",
        ),
        (
            ("The <<troops>> withdrew.", "A <<cannon>> fired.", "The <<general>> fell.", "The <<battle>> was lost."),
            "The <<recipe>> was simple.",
        ),
        (
            ("He cut the <<bread>>.", "The <<soup>> was cold.", "She ate <<cheese>>.", "The <<apples>> were ripe."),
            "The <<treaty>> was signed.",
        ),
        (
            ("The wall was <<red>>.", "She wore a <<blue>> hat.", "A <<green>> door.", "The sky turned <<gray>>."),
            "He spoke <<slowly>> to them.",
        ),
        (
            (
                "They met on <<Monday>>.",
                "We left in <<April>>.",
                "It rained all <<August>>.",
                "Shops close on <<Sunday>>.",
            ),
            "He met a <<farmer>>.",
        ),
        (
            (
                "He sat <<beside>> me.",
                "We went <<into>> town.",
                "It fell <<from>> a roof.",
                "She swam <<under>> the bridge.",
            ),
            "They <<buried>> the gold.",
        ),
        (
            ("They <<walked>> home.", "She <<painted>> it.", "He <<jumped>> down.", "We <<counted>> again."),
            "A <<quiet>> evening came.",
        ),
        (
            ("The <<boats>> sank.", "Two <<doors>> opened.", "His <<letters>> burned.", "Old <<rules>> apply."),
            "She <<wept>> all night.",
        ),
        (
            ("It was <<colder>> there.", "A <<longer>> road.", "She is <<older>> now.", "We need a <<stronger>> rope."),
            "The <<kitchen>> was clean.",
        ),
        (
            ("He <<must>> go.", "You <<should>> rest.", "They <<could>> swim.", "It <<might>> rain."),
            "The <<harbor>> froze.",
        ),
        (
            ("In <<1812>> it burned.", "He paid <<40>> pounds.", "Page <<7>> is missing.", "Over <<300>> people came."),
            "The <<teacher>> nodded.",
        ),
        (
            ("He came in<<,>> and sat.", "At noon<<,>> we left.", "No<<,>> he said.", "Old<<,>> but strong."),
            "The <<garden>> was small.",
        ),
        (
            ("<<Every>> road was closed.", "<<Rain>> fell at last.", "<<Slowly>> it sank.", "<<Four>> men came."),
            "We could not find the <<key>> there.",
        ),
        (
            (
                "At first, <<she>> wept.",
                "In May, <<rivers>> rise.",
                "Sadly, <<nobody>> came.",
                "Then, <<quietly>>, he left.",
            ),
            "The cold <<wind>> blew.",
        ),
        (
            (
                "It was their <<darkness>>.",
                "Her <<kindness>> helped.",
                "He felt <<sadness>>.",
                "The <<illness>> passed.",
            ),
            "The <<carpet>> was new.",
        ),
    )
)
"""Four tokens that have something in common, and one that has not."""
