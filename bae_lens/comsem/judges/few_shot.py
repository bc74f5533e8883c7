"""Questions with worked examples before them, one answer each; what they share stands first, so a server can keep it.

Those about tokens with positions are those of the authors' code: the instructions say what theirs say, and there are as
many examples, 11 of explanations and 22 of verdicts with 12 times yes; sentences and wording are our own. Those about
marked tokens take fewer, as turns of a chat, which small models follow better.
"""

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.prompts import WORDS_SHOWN, Messages, messages

TURNS_OF_EXPLAINING = 4  # worked examples before a question about marked tokens
EXPLAINER = "You help to find out what tokens have in common."
JUDGE = "You help to test descriptions of tokens."
EXPLAIN = (
    "You get some tokens, each with its position, which depends on the tokenizer, and with the sentence that it stands "
    'in. Say in a short phrase what they have in common, such as "names of months", "words that begin with un-", or '
    '"pronouns".\n'
    "Be as specific as what they share allows. Phrases that fit nearly everything, such as "
    '"words", "English tokens", "frequent words", or "parts of sentences", are of no use.\n'
    'Do not speak of the tokenizer, as in "pieces of words".\n'
    "Answer with one phrase and nothing else: no explanation and no comment."
)
TEST = (
    "You get a token, its position, the sentence that it stands in, and a description that may or may not say what the "
    "token is in that sentence. Decide whether the description is right for this token there.\n"
    'Answer with "Yes" if it is, or "No" if it is not, and with nothing else: no explanation and no comment.'
)
MARKED = (
    "You check descriptions of words and punctuation marks in sentences. Some descriptions fit, others do not. In each "
    "sentence one token stands between << and >>. Does the description fit that token as it is used there? Answer with "
    "Yes or No only."
)
EXPLAIN_MARKED = (
    "You find out what tokens have in common. In each sentence one token stands between << and >>. Say what all of "
    "them share, as narrowly as they allow. Answer with one short phrase and nothing else."
)
Shown = tuple[str, int, str]
"""A token, its position, and its sentence."""

EXPLAINED: tuple[tuple[str, tuple[Shown, ...]], ...] = (
    (
        "-ing verbs of work in a kitchen",
        (
            ("frying", 3, "He is frying onions for us."),
            ("baking", 3, "We were baking until midnight."),
            ("peeling", 4, "My uncle was peeling the potatoes."),
            ("stirring", 3, "She kept stirring the sauce."),
            ("chopping", 5, "Nobody in here likes chopping garlic."),
        ),
    ),
    (
        "expressions of future time",
        (
            ("tomorrow", 5, "The painters will come tomorrow."),
            ("next month", 4, "They leave us next month."),
            ("in 2060", 5, "The bridge will open in 2060."),
            ("soon", 5, "The tickets will arrive soon."),
        ),
    ),
    (
        "adjectives of taste",
        (
            ("sweet", 4, "These pears are sweet."),
            ("bitter", 6, "The tea was far too bitter."),
            ("salty", 4, "He likes his salty popcorn."),
        ),
    ),
    (
        "kitchen tools",
        (
            ("spoon", 2, "The spoon lay in the sink."),
            ("kettle", 2, "The kettle whistled."),
            ("whisk", 3, "Pass the whisk, please."),
            ("grater", 6, "Where did you put the grater?"),
        ),
    ),
    (
        "adverbs of frequency",
        (
            ("often", 2, "We often met at noon."),
            ("rarely", 2, "He rarely wrote to them."),
            ("always", 3, "It is always cold up there."),
            ("Sometimes", 1, "Sometimes the lift got stuck."),
        ),
    ),
    (
        "adjectives of size",
        (
            ("huge", 3, "It was huge."),
            ("tiny", 2, "A tiny boat came in."),
            ("vast", 4, "They own a vast estate."),
        ),
    ),
    (
        "fractions of a whole",
        (
            ("half", 3, "She ate half of it."),
            ("third", 2, "A third of the seats stayed empty."),
            ("quarter", 5, "He slept for a quarter of an hour."),
            ("tenth", 5, "They lost only a tenth of the grain."),
        ),
    ),
    (
        "units of length",
        (
            ("miles", 4, "We walked ten miles in the dark."),
            ("inch", 3, "Move an inch to the left."),
            ("meters", 5, "The wall is two meters high."),
        ),
    ),
    (
        "verbs of speaking",
        (
            ("whispered", 2, "She whispered his name."),
            ("announce", 4, "They will not announce it today."),
            ("telling", 3, "Keep on telling me more."),
        ),
    ),
    (
        "prepositions of time",
        (
            ("during", 3, "He snored during the film."),
            ("until", 3, "They stayed until noon."),
            ("since", 4, "Nothing has changed since March."),
        ),
    ),
    (
        "adjectives of poor quality",
        (
            ("shoddy", 2, "Such shoddy work will not do."),
            ("worthless", 4, "The stamps were worthless."),
            ("broken", 3, "Only a broken umbrella was left."),
        ),
    ),
)
JUDGED: tuple[tuple[Shown, str, bool], ...] = (
    (("frying", 3, "He is frying onions for us."), "present participle", True),
    (("spoon", 2, "The spoon lay in the sink."), "verb", False),
    (("often", 2, "We often met at noon."), "adverb of frequency", True),
    (("third", 2, "A third of the seats stayed empty."), "fraction", True),
    (("until", 3, "They stayed until noon."), "adjective of color", False),
    (("whispered", 2, "She whispered his name."), "verb of movement", False),
    (("during", 3, "He snored during the film."), "preposition of time", True),
    (("tomorrow", 5, "The painters will come tomorrow."), "expression of past time", False),
    (("sweet", 4, "These pears are sweet."), "adjective that says how something tastes", True),
    (("2060", 6, "The bridge will open in 2060."), "part of a date in the future", True),
    (("kettle", 2, "The kettle whistled."), "tool used in a kitchen", True),
    (("huge", 3, "It was huge."), "adjective of small size", False),
    (("announce", 4, "They will not announce it today."), "verb of eating", False),
    (("telling", 3, "Keep on telling me more."), "verb of speaking", True),
    (("miles", 4, "We walked ten miles in the dark."), "unit of length", True),
    (("inch", 3, "Move an inch to the left."), "name of a fruit", False),
    (("next month", 4, "They leave us next month."), "expression of past time", False),
    (("half", 3, "She ate half of it."), "part of a whole", True),
    (("shoddy", 2, "Such shoddy work will not do."), "adjective of poor quality", True),
    (("since", 4, "Nothing has changed since March."), "noun", False),
    (("whisk", 3, "Pass the whisk, please."), "name of a plant", False),
    (("peeling", 4, "My uncle was peeling the potatoes."), "verb of work in a kitchen", True),
)
MARKED_AND_JUDGED = (
    ("He is <<frying>> onions for us.", "present participle", True),
    ("He is frying <<onions>> for us.", "present participle", False),
    ("The <<kettle>> whistled.", "tool used in a kitchen", True),
    ("The kettle <<whistled>>.", "tool used in a kitchen", False),
    ("Three things are missing<<:>> salt, oil, and rice.", "punctuation that opens a list", True),
    ("Three things are missing: salt<<,>> oil, and rice.", "punctuation that opens a list", False),
    ("Her third <<idea>>: a raft.", "the word right before a colon", True),
    ("Her <<third>> idea: a raft.", "the word right before a colon", False),
    ("The second route is <<shorter>>.", "comparative form", True),
    ("The <<second>> route is shorter.", "comparative form", False),
    ("They leave us next <<month>>.", "expression of past time", False),
    ("We walked ten <<miles>> in the dark.", "unit of length", True),
    ("We walked ten miles in the <<dark>>.", "unit of length", False),
    ("She hurt <<herself>>.", "reflexive pronoun", True),
    ("<<She>> hurt herself.", "reflexive pronoun", False),
    ("Move an <<inch>> to the left.", "name of a fruit", False),
)


def explain_messages(examples: list[Instance]) -> Messages:
    """Asks for what the examples have in common, with 11 that are worked out before."""
    worked = [
        _example(number, [*map(_shown, tokens), _common(phrase)])
        for number, (phrase, tokens) in enumerate(EXPLAINED, 1)
    ]
    asked = "\n".join([*(_shown(_of(example)) for example in examples), _common("")])
    return messages(EXPLAINER, "\n\n".join([EXPLAIN, *worked, f"Now these tokens:\n{asked}".rstrip()]))


def single_messages(description: str, instance: Instance) -> Messages:
    """Asks whether a description fits one token, with 22 that are worked out before."""
    worked = [
        _example(number, [_shown(shown), _described(description, "Yes" if fits else "No")])
        for number, (shown, description, fits) in enumerate(JUDGED, 1)
    ]
    asked = "\n".join([_shown(_of(instance)), _described(description, "")])
    return messages(JUDGE, "\n\n".join([TEST, *worked, f"Now this token:\n{asked}".rstrip()]))


def explain_marked_messages(examples: list[Instance]) -> Messages:
    """Asks for what marked tokens have in common, after `TURNS_OF_EXPLAINING` that are worked out."""
    turns = [
        turn
        for phrase, tokens in EXPLAINED[:TURNS_OF_EXPLAINING]
        for turn in _turns("\n".join(map(_marked, tokens)), phrase)
    ]
    near = [example.shortened(WORDS_SHOWN, [example.token]).marked for example in examples]
    return [{"role": "system", "content": EXPLAIN_MARKED}, *turns, _user("\n".join(near))]


def marked_messages(description: str, instance: Instance) -> Messages:
    """Asks whether a description fits one marked token, after 16 that are worked out."""
    turns = [
        turn
        for shown, worked, fits in MARKED_AND_JUDGED
        for turn in _turns(_question(shown, worked), "Yes" if fits else "No")
    ]
    near = instance.shortened(WORDS_SHOWN, [instance.token]).marked
    return [{"role": "system", "content": MARKED}, *turns, _user(_question(near, description))]


def _turns(question: str, answer: str) -> Messages:
    return [_user(question), {"role": "assistant", "content": answer}]


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _question(marked: str, description: str) -> str:
    return f"Sentence: {marked}\nDescription: {description}"


def _marked(shown: Shown) -> str:
    token, _, sentence = shown
    before, _, after = sentence.partition(token)
    return f"{before}<<{token}>>{after}"


def _example(number: int, lines: list[str]) -> str:
    return "\n".join([f"Example {number}:", *lines])


def _of(instance: Instance) -> Shown:
    before = len(instance.sentence[: instance.token[0]].split())
    return instance.text, before + 1 if instance.position is None else instance.position, instance.sentence


def _shown(shown: Shown) -> str:
    token, position, sentence = shown
    return f'Token: "{token}" at position {position} in sentence: "{sentence}"'


def _common(phrase: str) -> str:
    return f"What they have in common: {phrase}"


def _described(description: str, answer: str) -> str:
    return f'Description: "{description}"\nAnswer: {answer}'
