"""What tokens may have in common apart from their meaning, as tests, and the phrases that name them.

A property has a phrase in which an explainer writes it, and a pattern by which other people's explanations name it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bae_lens.comsem.judges.tokens import Word

NOUNS = ("NN0", "NN1", "NN2", "NP0")
SENTENCE_ENDS = (".", "!", "?")
ARTICLES = ("a", "an", "the")
NEGATIONS = ("no", "not", "nor", "never", "none", "nothing", "nobody", "neither", "nowhere", "without", "cannot")
SHORT, LONG = 3, 9  # letters
AFFIXES = (2, 3, 4)  # letters

Test = Callable[[Word], bool]


@dataclass(frozen=True)
class Property:
    """Something that is true of a token or not."""

    phrase: str
    """What it is called; read back, it gives the same property."""
    holds: Test
    """Whether a token has it."""


def _properties(*known: tuple[str, Test, str]) -> tuple[tuple[Property, re.Pattern[str]], ...]:
    return tuple(
        (Property(phrase, holds), re.compile(rf"\b(?:{pattern})(?!\w)", re.IGNORECASE))
        for phrase, holds, pattern in known
    )


def _tagged(*tags: str) -> Test:
    return lambda word: word.tag.startswith(tags)


def _text(*texts: str) -> Test:
    return lambda word: word.text.lower() in texts


def _after(*texts: str) -> Test:
    return lambda word: word.before in texts


def _before(*texts: str) -> Test:
    return lambda word: word.after in texts


def _is_number(word: Word) -> bool:
    return word.text[:1].isdigit() or word.tag in ("CRD", "ORD")


def _ends_sentence(word: Word) -> bool:
    return bool(word.text) and word.after in ("", *SENTENCE_ENDS) and word.text not in SENTENCE_ENDS


PREPOSITIONS = frozenset(
    """
    about above across after against along among around at before behind below beneath beside between beyond by
    down during for from in inside into like near of off on onto out outside over past since through throughout
    to toward towards under until unto up upon via with within
    """.split()  # noqa: SIM905
)
# Where a token stands.
PLACES = _properties(
    ("a word directly after a comma", _after(","), r"(after|follow\w*|preceded by) (a |the )?commas?"),
    ("a word directly before a comma", _before(","), r"(before|preced\w+|followed by) (a |the )?commas?"),
    ("a word after an article", _after(*ARTICLES), r"(after|follow\w*|preceded by) (an |the )?articles?"),
    (
        "a word after a preposition",
        lambda word: word.before in PREPOSITIONS,
        r"(after|follow\w*|preceded by) (a |the )?prepositions?",
    ),
    (
        "a word inside quotation marks",
        lambda w: w.quoted,
        r"(in|inside|within|between|under) (\w+ )?quot\w+( marks?)?",
    ),
    ("a word inside brackets", lambda w: w.bracketed, r"(in|inside|within|between) (brackets|parenthes[ei]s)"),
    (
        "punctuation that ends a sentence",
        _text(*SENTENCE_ENDS),
        r"(punctuation( marks?)? (that|which|to) (end|close|finish)\w*|(final|terminal|closing|"
        r"sentence[- ]ending|end[- ]of[- ]sentence|end) punctuation)( of)?( an?| the)?( sentences?)?",
    ),
    (
        "the first word of a sentence",
        lambda word: word.is_word_or_number and word.number == 0,
        r"(first|opening|initial) (words?|tokens?)( (of|in|a|the|each|every))*( sentences?)?|"
        r"(at )?(the )?(start|beginning|head) of( an?| the| each| new)*( sentences?)|(begin|start|"
        r"open)\w*( an?| the| each| new)* sentences?",
    ),
    (
        "the last word of a sentence",
        _ends_sentence,
        r"(last|final|closing) (words?|tokens?)( (of|in|a|the|each|every))*( sentences?)?|"
        r"(at )?(the )?end of( an?| the| each)* sentences?|(end|clos|finish)\w*( an?| the|"
        r" each)* sentences?",
    ),
)
# What a token is. Of two patterns that begin at one place of an explanation, the first is meant.
KINDS = _properties(
    ("a full stop", _text("."), r"full stops?|periods?( mark| that|$)|\bdots?\b"),
    ("a question mark", _text("?"), r"question marks?"),
    ("an exclamation mark", _text("!"), r"exclamation (marks?|points?)"),
    ("a comma", _text(","), r"commas?"),
    ("a semicolon or colon", _text(";", ":"), r"(semi)?colons?( or colons?)?"),
    ("a dash or hyphen", _text("-", "\u2013", "\u2014"), r"dash(es)?( or hyphens?)?|hyphens?"),
    ("a quotation mark", _text('"', "\u201c", "\u201d"), r"quotation marks?|quote marks?"),
    ("a bracket", _text("(", ")", "[", "]"), r"brackets?|parenthes[ei]s"),
    (
        "a punctuation mark",
        lambda w: bool(w.text) and not w.text[0].isalnum(),
        r"punctuation( marks?| characters?)?",
    ),
    (
        "a year",
        lambda w: re.fullmatch(r"1[0-9]{3}|20[0-9]{2}", w.text) is not None,
        r"years?( numbers?)?( in digits)?$",
    ),
    (
        "a number written in digits",
        lambda word: word.text[:1].isdigit(),
        r"(numbers?|quantit\w+|amounts?|values?)?( that are| which are)?( written| given|"
        r" expressed)? ?(in|as|with|using) (digits|figures|numerals)|digits|numerals|"
        r"numeric(al)? (tokens?|digits|characters)",
    ),
    (
        "a number word",
        lambda word: word.is_word and word.tag in ("CRD", "ORD"),
        r"number words|numbers? (that are |which are )?(written |spelled |spelt )?(out )?(in|as) (words|"
        r"letters)|(written|spelled|spelt)[- ]out numbers?|numbers? spel\w+ out",
    ),
    ("an ordinal number", _tagged("ORD"), r"ordinals?( numbers?)?"),
    ("a number", _is_number, r"numbers?( of any kind)?|cardinals?"),
    ("a possessive pronoun", _tagged("DPS"), r"possessive (pronouns?|determiners?|adjectives?)|possessives?"),
    ("a reflexive pronoun", _tagged("PNX"), r"reflexive( pronouns?)?|reflexives?"),
    (
        "a question word",
        _tagged("DTQ", "PNQ", "AVQ"),
        r"(question|interrogative|wh-?) ?words?|interrogatives?|relative pronouns?",
    ),
    ("a pronoun", _tagged("PNP", "PNI", "PNX", "PNQ", "DPS"), r"(personal |subject |object )?pronouns?"),
    ("a form of the verb to be", _tagged("VB"), r"forms? of (the verb )?.?(to )?be\b.?"),
    ("a form of the verb to have", _tagged("VH"), r"forms? of (the verb )?.?(to )?have\b.?"),
    ("a modal verb", _tagged("VM"), r"modal( auxiliar\w+)?( verbs?)?|modals?"),
    ("an auxiliary verb", _tagged("VM", "VB", "VH", "VD"), r"auxiliar(y|ies)( verbs?)?|helping verbs?"),
    (
        "a verb that ends in -ing",
        _tagged("VVG", "VBG", "VHG", "VDG"),
        r"(present )?participles? (that end )?in.?-?ing|present participles?|gerunds?|"
        r"-?ing[- ]forms?( of verbs?)?|verbs? (that end|ending|which end) (in|with) .?-?ing.?|"
        r"progressive( verbs?)?",
    ),
    ("a past participle", _tagged("VVN", "VBN", "VHN", "VDN"), r"past participles?"),
    (
        "a past tense verb",
        _tagged("VVD", "VBD", "VHD", "VDD"),
        r"past[- ]tense( forms?)?( of)?( verbs?)?|verbs? in the (simple )?past( tense)?|simple past|"
        r"preterites?|past[- ]tense",
    ),
    (
        "an infinitive",
        _tagged("VVI", "VBI", "VHI", "VDI"),
        r"infinitives?|base forms? of (a )?verbs?|verbs? in (their|the) base forms?",
    ),
    (
        "a verb in the third person",
        _tagged("VVZ", "VBZ", "VHZ", "VDZ"),
        r"third[- ]person( singular)?( (verbs?|forms?))?( of verbs?)?",
    ),
    ("a verb", _tagged("V"), r"verbs?( of any kind)?( forms?)?"),
    ("a plural noun", _tagged("NN2"), r"plural (forms? of )?nouns?|nouns? in the plural|plurals?|plural forms?"),
    ("a singular noun", _tagged("NN1"), r"singular (forms? of )?nouns?|nouns? in the singular|singulars?"),
    ("a proper noun", _tagged("NP0"), r"proper (nouns?|names?)"),
    ("a noun", _tagged(*NOUNS), r"(common )?nouns?( of any kind)?"),
    ("a comparative", _tagged("AJC"), r"comparatives?( (forms? of )?adjectives?)?"),
    ("a superlative", _tagged("AJS"), r"superlatives?( (forms? of )?adjectives?)?"),
    ("an adjective", _tagged("AJ"), r"adjectives?"),
    ("an adverb", _tagged("AV"), r"adverbs?"),
    ("a preposition", _tagged("PRP", "PRF"), r"prepositions?"),
    ("the definite article", _text("the"), r"definite articles?"),
    ("an indefinite article", _text("a", "an"), r"indefinite articles?"),
    ("an article", _text(*ARTICLES), r"articles?"),
    ("a coordinating conjunction", _tagged("CJC"), r"coordinat\w+ conjunctions?"),
    ("a subordinating conjunction", _tagged("CJS", "CJT"), r"subordinat\w+ conjunctions?"),
    ("a conjunction", _tagged("CJ"), r"conjunctions?|connectives?"),
    ("a determiner", _tagged("AT0", "DT0", "DPS", "DTQ"), r"determiners?"),
    (
        "a negation",
        lambda w: w.tag == "XX0" or w.text.lower() in NEGATIONS,
        r"negations?|negative (words?|particles?)|words? (of|that express) negation",
    ),
    ("an interjection", _tagged("ITJ"), r"interjections?"),
    (
        "part of a longer word",
        lambda w: w.token != w.text,
        r"(parts?|pieces?|fragments?) of (a |an )?(longer |larger )?words?|(sub-?words?|"
        r"word) ?(fragments?|pieces?|parts?)|incomplete words?",
    ),
    (
        "a word in capital letters",
        lambda w: len(w.text) > 1 and w.text.isupper(),
        r"(all|only|entirely|wholly)( in)? (caps|capitals?|capital letters|upper ?case)( letters?)?|"
        r"(words? )?(written )?in (all )?(caps|capitals|capital letters|upper ?case)( letters)?",
    ),
    (
        "a capitalized word",
        lambda w: w.text[:1].isupper(),
        r"capitali[sz]ed( words?)?|(begin|start)\w* with (a |an )?(capital|upper ?case)( letters?)?|"
        r"initial capitals?( letters?)?",
    ),
    (
        "a word with a hyphen",
        lambda w: w.is_word and "-" in w.text,
        r"hyphenated( words?)?|words? with (a )?hyphens?|compound words? with hyphens?",
    ),
    (
        "a word with an apostrophe",
        lambda w: w.is_word and bool(set("'\u2019") & set(w.text)),
        r"contractions?|contracted( forms?)?|words? with (an )?apostrophes?",
    ),
    (
        "a short word",
        lambda w: w.is_word and len(w.text) <= SHORT,
        r"(very )?short words?|words? (of|with) (at most|up to|no more than) three letters",
    ),
    (
        "a long word",
        lambda w: w.is_word and len(w.text) >= LONG,
        r"(very )?long words?|words? (of|with) (many|more than eight|at least nine) letters",
    ),
    (
        "a word",
        lambda word: word.is_word,
        r"^(any |all |an? )?words?( of any kind| in an?( \w+)? sentence| in english)?$",
    ),
)
QUOTES = frozenset("\"'\u201c\u201d\u2018\u2019")
QUOTED = r"[\"'\u201c\u2018](?P<word>[^\"\u201c\u201d]+?)[\"'\u201d\u2019](?!\w)"
BY_PHRASE = {known.phrase: known for known, _ in (*PLACES, *KINDS)}
# Properties of one word or ending, which are too many to list.
NAMED: tuple[tuple[str, str, Callable[[str], Test]], ...] = (
    ('a word directly after "{}"', rf"(after|follow\w*|preceded by) (the )?(words? |tokens? )?{QUOTED}", _after),
    ('a word directly before "{}"', rf"(before|preced\w+|followed by) (the )?(words? |tokens? )?{QUOTED}", _before),
    (
        'a word that ends in "-{}"',
        r"(end\w*|suffix\w*|terminat\w*) (in|with|on)?( the)?( letters?|"
        r" suffix)? ?[\"'\u201c\u2018]?-?(?P<word>[\w'\u2019-]{1,6}?)[\"'\u201d\u2019]?$",
        lambda ending: lambda word: len(word.text) > len(ending) and word.text.lower().endswith(ending),
    ),
    (
        'a word that begins with "{}-"',
        r"(begin\w*|start\w*|prefix\w*) (with|in)?( the)?( letters?|"
        r" prefix)? ?[\"'\u201c\u2018]?(?P<word>[\w'\u2019-]{1,6}?)-?[\"'\u201d\u2019]?$",
        lambda beginning: lambda word: len(word.text) > len(beginning) and word.text.lower().startswith(beginning),
    ),
    (
        'a form of the word "{}"',
        rf"(any )?forms? of (the )?(word|verb|noun) {QUOTED}",
        lambda lemma: lambda w: w.lemma == lemma,
    ),
    ('the word "{}"', rf"^(the |only the |always the )?(exact )?(words?|tokens?) {QUOTED}$", _text),
)


def candidates(words: Sequence[Word]) -> Iterator[tuple[Property, bool]]:
    """Properties that some of the words may share, and whether they are among those too many to list."""
    for known, _ in (*PLACES, *KINDS):
        yield known, False
    seen: set[str] = set()
    for word in words:
        text = word.text.lower()
        ends = [text[-n:] for n in AFFIXES if word.is_word and len(text) > n]
        begins = [text[:n] for n in AFFIXES if word.is_word and len(text) > n]
        values = ([word.before], [word.after], ends, begins, [word.lemma], [text])
        for (phrase, _, make), own in zip(NAMED, values, strict=True):
            for value in own:
                if not set(value) <= QUOTES and (name := phrase.format(value)) not in seen:
                    seen.add(name)
                    yield Property(name, make(value)), True
