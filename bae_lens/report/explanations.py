"""What the columns of a comparison's table mean."""

from bae_lens.evaluation.metrics import DENSE_RATE
from bae_lens.evaluation.value_bits import QUANTIZATION_LOSS
from bae_lens.functional.strength import INSTANCES_TO_COUNT

EXPLANATIONS = {
    "dictionary": "Its name; the dot is its color in the figures.",
    "writes": "Where in the model its output belongs. An SAE writes where it reads; a transcoder reads elsewhere.",
    "explained variance": (
        "Share of the variance of the activations that the output explains: 1 is perfect, 0 no better than always "
        "answering with their mean. It cannot be compared between dictionaries that write at different hooks, because "
        "some activations are easier than others."
    ),
    "CE recovered": (
        "Share of the model's cross entropy that survives when the output stands in for the activations: 1 is as "
        "good as the model itself, 0 as bad as zeros in their place. Like explained variance, to be compared at one "
        "hook only."
    ),
    "KL recovered": "The same for the divergence from what the model itself predicts.",
    "L0": "Features that fire per token, in the mean.",
    "informative L0": (
        "Features per token that differ from what they do most of the time; less than L0 if some are nearly always on."
    ),
    "support bits": (
        "Bits per token, at most, to say which features fire, every feature coded by itself. All there is to a binary "
        "code."
    ),
    "value bits": (
        "Bits per token to say how strongly they fire, rounded as coarsely as costs no more than "
        f"{QUANTIZATION_LOSS} of explained variance. They come on top of support bits; a binary code has none."
    ),
    "dead": "Features that fire on no held-out token.",
    "always on": "Features that fire on all of them.",
    "dense": f"Features on for over {100 * DENSE_RATE:.0f} % of the tokens, and off for over {100 * DENSE_RATE:.0f} %.",
    "Feature Activated": f"Features among the 10 strongest of at least {INSTANCES_TO_COUNT} tokens.",
    "training": "How long it took to train once, with the settings that were chosen; or that it was trained elsewhere.",
    "memory": "Largest memory while it trained: of the whole process, or on a GPU what was allocated there.",
}
"""By heading, in plain words."""


def in_units(text: str, unit: str) -> str:
    """A text about tokens as one about what activations belong to: tokens, or vectors without a model."""
    return text.replace("token", unit)
