"""Cases with known answers for testing a judge: our own sentences, tokens between << and >>."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CaseGroup:
    """One explanation with tokens that it fits and tokens that it does not."""

    kind: str
    """What the explanation is about: semantic, syntactic, positional or vague."""
    explanation: str
    fits: tuple[str, ...]
    does_not: tuple[str, ...]
    """Sentences with a marked token that it does not fit."""


CASES = (
    CaseGroup(
        "semantic",
        "animals",
        ("The <<horse>> waited at the gate.", "They saw a <<whale>> near the coast."),
        ("The <<contract>> was signed in May.", "She painted the <<door>> green."),
    ),
    CaseGroup(
        "semantic",
        "money and payments",
        ("He paid the <<debt>> in gold.", "The <<tax>> on sugar was raised again."),
        ("The <<river>> froze before Christmas.", "A child <<laughed>> in the next room."),
    ),
    CaseGroup(
        "semantic",
        "war and the military",
        ("The <<army>> crossed the border at dawn.", "Two <<soldiers>> guarded the bridge."),
        ("Her <<grandmother>> baked bread.", "The <<piano>> was out of tune."),
    ),
    CaseGroup(
        "semantic",
        "illness and medicine",
        ("The <<doctor>> came twice a day.", "A <<fever>> kept him in bed."),
        ("The train left the <<station>> late.", "We bought <<paint>> for the fence."),
    ),
    CaseGroup(
        "semantic",
        "countries and nationalities",
        ("The treaty with <<France>> was renewed.", "A <<Mexican>> ship lay in the harbour."),
        ("The <<butter>> melted in the sun.", "Nobody <<answered>> the telephone."),
    ),
    CaseGroup(
        "semantic",
        "family members",
        ("My <<brother>> lives abroad.", "Her <<daughter>> learned to swim."),
        ("The <<engine>> stopped on the hill.", "Prices <<rose>> in autumn."),
    ),
    CaseGroup(
        "semantic",
        "kinds of weather",
        ("The <<storm>> tore off the roof.", "After the <<rain>> the paths were soft."),
        ("The <<judge>> asked for silence.", "He wrote a long <<letter>>."),
    ),
    CaseGroup(
        "syntactic",
        "past tense verbs",
        ("She <<walked>> home alone.", "The men <<sang>> until midnight."),
        ("The <<walk>> home was long.", "They will <<sing>> tomorrow."),
    ),
    CaseGroup(
        "syntactic",
        "plural nouns",
        ("The <<windows>> were open.", "Three <<geese>> crossed the road."),
        ("The <<window>> was open.", "She <<runs>> every morning."),
    ),
    CaseGroup(
        "syntactic",
        "prepositions",
        ("The cup is <<under>> the table.", "He walked <<towards>> the sea."),
        ("The <<cup>> is under the table.", "He <<walked>> towards the sea."),
    ),
    CaseGroup(
        "syntactic",
        "adjectives that explain a following noun",
        ("A <<narrow>> street led uphill.", "They lived in a <<wooden>> house."),
        ("The street was made <<narrow>>ly wider.", "They <<lived>> in a wooden house."),
    ),
    CaseGroup(
        "syntactic",
        "the definite article",
        ("In <<the>> morning it was cold.", "<<The>> lamp went out."),
        ("In <<a>> moment it was over.", "In the <<morning>> it was cold."),
    ),
    CaseGroup(
        "syntactic",
        "numbers written in digits",
        ("The house was built in <<1872>>.", "Only <<45>> members voted."),
        ("Only <<forty>> members voted.", "The <<house>> was built in 1872."),
    ),
    CaseGroup(
        "positional",
        "the first word of a sentence",
        ("<<Rivers>> cut through the valley.", "<<Yesterday>> the shop was closed."),
        ("Deep <<rivers>> cut through the valley.", "The shop was closed <<yesterday>>."),
    ),
    CaseGroup(
        "positional",
        "punctuation that ends a sentence",
        ("The lamp went out<<.>>", "Where are you<<?>>"),
        ("Slowly<<,>> the lamp went out.", "The <<lamp>> went out."),
    ),
    CaseGroup(
        "positional",
        "a word directly after a comma",
        ("At last, <<winter>> came.", "Tired, <<they>> went home."),
        ("At <<last>>, winter came.", "Tired, they went <<home>>."),
    ),
    CaseGroup(
        "positional",
        "a word inside quotation marks",
        ('She shouted "<<stop>>" and ran.', 'The sign said "no <<entry>>" in red.'),
        ('She <<shouted>> "stop" and ran.', 'The sign said "no entry" in <<red>>.'),
    ),
    CaseGroup(
        "vague",
        "a word in an English sentence",
        ("The <<horse>> waited at the gate.", "Nobody <<answered>> the telephone."),
        ("Slowly<<,>> the lamp went out.", "It cost <<45>> crowns."),
    ),
    CaseGroup(
        "vague",
        "something that can be touched",
        ("She painted the <<door>> green.", "He dropped the <<cup>>."),
        ("The <<idea>> came too late.", "They had <<patience>>."),
    ),
    CaseGroup(
        "vague",
        "a noun of any kind",
        ("The <<idea>> came too late.", "The <<lamp>> went out."),
        ("He walked <<towards>> the sea.", "They <<sang>> until midnight."),
    ),
)
