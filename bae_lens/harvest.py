"""Hidden states of a language model on disk: one pass over chosen contexts, then as many trainings as wanted."""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import einops
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name, get_special_token_ids
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.array_files import checksum, load_array, open_array, save_array
from bae_lens.contexts import PADDING, Contexts
from bae_lens.parallel import any_process, is_first, n_processes, own_rows, process_index, wait_for_all
from bae_lens.sources import resolve_hook
from bae_lens.standardisation import MASSIVE_NORM, Standardisation

CHECKSUMS = "checksums.npy"  # of each context, 0 where it is missing


class HiddenStates:
    """The hidden states of `Contexts` at one hook, on disk, and which of them are content.

    Rows are tokens in order. BOS and other special tokens, padding, and tokens whose norm is over `MASSIVE_NORM` times
    the median of the rest are not content. The norm is that at the first of the hooks harvested together, whatever this
    one is, so that all of them have the same rows.
    """

    def __init__(self, folder: Path, hook_name: str) -> None:
        """Opens what `harvest` wrote. Raises FileNotFoundError if it is missing or not complete."""
        if not (folder / "complete.json").exists():
            raise FileNotFoundError(f"no complete harvest at {folder}")
        self.folder, self.hook_name = folder, hook_name
        info = read_json(folder / "complete.json")
        self.special_tokens: list[int] = info["special_tokens"]
        self.states = load_array(folder / hook_name / "states.npy", mmap_mode="r")
        self.norms = torch.from_numpy(load_array(folder / "norms.npy")).flatten()
        self.contexts = Contexts(
            *(torch.from_numpy(load_array(folder / f"{part}.npy")) for part in ("tokens", "document"))
        )

    @property
    def d_in(self) -> int:
        """Width of the hidden states; at hook_z that of all heads together."""
        return self.states.shape[-1]

    @property
    def widths(self) -> dict[str, int]:
        """The hook and its width."""
        return {self.hook_name: self.d_in}

    @cached_property
    def special(self) -> Bool[Tensor, " n_tokens"]:
        """Which rows are special tokens or padding."""
        tokens = self.contexts.tokens.flatten()
        return torch.isin(tokens, torch.tensor([PADDING, *self.special_tokens]))

    @cached_property
    def relative_norms(self) -> Float[Tensor, " n_tokens"]:
        """Each row's norm in units of the median of those that are not special."""
        return self.norms / self.norms[~self.special].median()

    @cached_property
    def massive(self) -> Bool[Tensor, " n_tokens"]:
        """Which rows are tokens of massive norm."""
        return ~self.special & (self.relative_norms > MASSIVE_NORM)

    @cached_property
    def content(self) -> Int[Tensor, " n_content"]:
        """Indices of the rows that are content."""
        return (~self.special & ~self.massive).nonzero().flatten()

    def rows(self, indices: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        """Raw hidden states of the given rows, in float32."""
        return torch.from_numpy(self.states.reshape(-1, self.d_in)[indices.numpy()])

    def batches(self, batch_size: int) -> Iterator[Float[Tensor, "n d_in"]]:
        """The raw hidden states of all content, in order."""
        for indices in self.content.split(batch_size):
            yield self.rows(indices)

    @cached_property
    def standardisation(self) -> Standardisation:
        """Mean and scale of the content, accumulated in float64. Raises ValueError for content without variance."""
        if len(self.content) < 2:
            raise ValueError(f"{len(self.content)} tokens of content are too few to standardise; harvest more")
        total, squares = torch.zeros(self.d_in, dtype=torch.float64), 0.0
        for batch in self.batches(8192):
            total += batch.double().sum(0)
            squares += batch.double().square().sum().item()
        mean = total / len(self.content)
        mean_square = squares / len(self.content) - mean.square().sum().item()
        if not mean_square > 0:
            raise ValueError("the hidden states are all the same, so there is nothing to learn from them")
        return Standardisation(mean.float(), (self.d_in / mean_square) ** 0.5)

    def shuffled(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Endless standardised batches, every epoch in a new order that depends on the seed alone; batches are full.

        Begins at `start_step`, so that a resumed run goes on where it stopped. Of several processes, each gets its own
        rows of these batches.
        Raises ValueError if there is less content than a batch.
        """
        per_epoch = len(self.content) // batch_size
        if per_epoch == 0:
            raise ValueError(
                f"a batch of {batch_size} needs as many tokens, but only {len(self.content)} were harvested"
            )
        step = start_step
        while True:
            epoch, first = divmod(step, per_epoch)
            epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
            order = torch.randperm(len(self.content), generator=torch.Generator().manual_seed(epoch_seed))
            for batch in order[: per_epoch * batch_size].view(per_epoch, batch_size)[first:]:
                yield self.standardisation(self.rows(self.content[own_rows(batch)]))
            step = (epoch + 1) * per_epoch


@torch.no_grad()
def hook_widths(model: Any, hook_names: Sequence[str]) -> dict[str, int]:
    """Widths of the hidden states at some hooks, in the order in which a pass reaches them; heads are concatenated."""
    resolved = {hook_name: resolve_hook(model, hook_name) for hook_name in hook_names}
    states = _hidden_states(model, torch.zeros(1, 1, dtype=torch.long), list(dict.fromkeys(resolved.values())))
    reached = sorted(resolved, key=lambda hook_name: list(states).index(resolved[hook_name]))
    return {hook_name: states[resolved[hook_name]].shape[-1] for hook_name in reached}


@torch.no_grad()
def harvest(
    model: Any, contexts: Contexts, hook_names: Sequence[str], folder: Path, batch_size: int = 16
) -> dict[str, HiddenStates]:
    """Runs the model over the contexts once, up to the deepest hook's layer, and keeps the hidden states at all hooks.

    They lie in `folder` in float32, and are returned under the names that were asked for. By the norms at the first
    hook it is decided which tokens are massive. An interrupted harvest goes on with the batches that are missing; one
    that is complete is opened as it is, but for contexts that are no longer what was written, of which a warning gives
    the number, and which are computed again. Several processes share the batches, and write into the same folder.
    Raises ValueError for an unknown hook, one that is not one vector a token, hidden states that are not finite
    (naming the batch), and a folder that holds hidden states of other hooks, another model or other contexts.
    """
    resolved = {hook_name: resolve_hook(model, hook_name) for hook_name in hook_names}
    folder.mkdir(parents=True, exist_ok=True)
    source = {
        "model": model.cfg.model_name,
        "hook_names": list(dict.fromkeys(resolved.values())),
        "special_tokens": sorted(get_special_token_ids(model.tokenizer)),
    }
    _claim(folder, source, contexts)
    (complete,) = any_process((folder / "complete.json").exists())
    if complete:
        _forget_damaged(folder, source["hook_names"])
    if not (folder / "complete.json").exists():
        _harvest_missing(model, contexts, source["hook_names"], folder, batch_size)
        wait_for_all()
        if is_first():
            if not load_array(folder / CHECKSUMS).all():
                raise ValueError(f"not all contexts arrived in {folder}; the processes must share it")
            write_text(folder / "complete.json", json.dumps(source))
        wait_for_all()
    return {hook_name: HiddenStates(folder, name) for hook_name, name in resolved.items()}


def _claim(folder: Path, source: dict[str, Any], contexts: Contexts) -> None:
    """Writes down what the folder is for, or compares it with what it is for already."""
    path = folder / "source.json"
    if is_first() and not path.exists():
        save_array(folder / "tokens.npy", contexts.tokens)
        save_array(folder / "document.npy", contexts.document)
        write_text(path, json.dumps(source))
    wait_for_all()
    same_contexts = np.array_equal(load_array(folder / "tokens.npy"), contexts.tokens.numpy())
    if read_json(path) != source or not same_contexts:
        raise ValueError(f"{folder} holds hidden states of another model, other hooks or text; choose another folder")


def _harvest_missing(model: Any, contexts: Contexts, hook_names: list[str], folder: Path, batch_size: int) -> None:
    n, context_size = contexts.tokens.shape
    norms = open_array(folder / "norms.npy", (n, context_size))
    sums = open_array(folder / CHECKSUMS, (n,), np.int64)
    missing = [start for start in range(0, n, batch_size) if not sums[start : start + batch_size].all()]
    wait_for_all()  # before one of them is done
    states: dict[str, np.memmap] = {}
    description = f"hidden states at {', '.join(hook_names)}"
    with tqdm(
        total=n, initial=int((sums != 0).sum()), desc=description, unit="context", disable=not is_first()
    ) as progress:
        for start in missing[process_index() :: n_processes()]:
            tokens = contexts.tokens[start : start + batch_size].clamp(min=0)
            rows = slice(start, start + len(tokens))
            batches = _hidden_states(model, tokens, hook_names)
            for hook_name, batch in batches.items():
                if not torch.isfinite(batch).all():
                    raise ValueError(
                        f"the model's hidden states in batch {start // batch_size} at {hook_name} are not finite"
                    )
                if hook_name not in states:
                    (folder / hook_name).mkdir(exist_ok=True)
                    shape = (n, context_size, batch.shape[-1])
                    states[hook_name] = open_array(folder / hook_name / "states.npy", shape)
                states[hook_name][rows] = batch.numpy()
                states[hook_name].flush()
            norms[rows] = batches[hook_names[0]].norm(dim=-1).numpy()
            norms.flush()
            parts = [norms[rows], *(batches[name].numpy() for name in sorted(batches))]
            sums[rows] = [checksum(context) for context in zip(*parts, strict=True)]
            sums.flush()
            progress.update(int((sums != 0).sum()) - progress.n)


def _forget_damaged(folder: Path, hook_names: list[str]) -> None:
    """Contexts whose hidden states do not have the checksum that they were written with count as missing.

    Everything is read for it, at the speed of the disk.
    """
    files = ["norms.npy", *(f"{hook_name}/states.npy" for hook_name in sorted(hook_names))]
    parts = [load_array(folder / file, mmap_mode="r") for file in files]
    sums = open_array(folder / CHECKSUMS, (len(parts[0]),), np.int64)
    contexts = tqdm(range(process_index(), len(sums), n_processes()), desc="checking what is on disk", unit="context")
    damaged = [context for context in contexts if sums[context] != checksum(part[context] for part in parts)]
    if damaged:
        warnings.warn(
            f"{len(damaged)} of {len(sums)} contexts in {folder} are damaged and computed again", stacklevel=3
        )
        sums[damaged] = 0
        sums.flush()
        (folder / "complete.json").unlink(missing_ok=True)
    wait_for_all()


def _hidden_states(
    model: Any, tokens: Int[Tensor, "n context_size"], hook_names: Sequence[str]
) -> dict[str, Float[Tensor, "n context_size _"]]:
    """In the order in which the pass reached them."""
    _, cache = model.run_with_cache(
        tokens.to(model.cfg.device),
        names_filter=list(hook_names),
        stop_at_layer=stop_layer(hook_names),
        prepend_bos=False,
    )
    for hook_name in hook_names:
        if hook_name not in cache:
            raise ValueError(f"the model has a hook {hook_name!r}, but did not reach it; choose another one")
    states = {}
    for hook_name in sorted(hook_names, key=list(cache.keys()).index):
        states[hook_name] = cache[hook_name].float().cpu()
        if states[hook_name].ndim == 4:
            states[hook_name] = einops.rearrange(
                states[hook_name], "n position head d_head -> n position (head d_head)"
            )
        shape = tuple(states[hook_name].shape)
        if len(shape) != 3 or shape[:2] != tokens.shape:
            raise ValueError(f"{hook_name} must give one vector a token, got shape {shape}; choose another hook")
    return states


def stop_layer(hook_names: Sequence[str]) -> int | None:
    """The layer before which a pass that reaches all these hooks may stop; None if one lies outside the layers."""
    layers = [extract_stop_at_layer_from_tlens_hook_name(hook_name) for hook_name in hook_names]
    return None if None in layers else max(layer for layer in layers if layer is not None)


def write_text(path: Path, text: str) -> None:
    """Writes a file that is at any moment either there whole or as it was before."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """What `write_text` wrote as JSON. Raises ValueError if the file was damaged since."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); remove its folder to start over") from error
