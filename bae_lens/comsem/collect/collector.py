"""Instances of the features of several dictionaries from one pass over a corpus, in memory that does not grow."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise, repeat
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.activations.forward import run_at_hooks
from bae_lens.activations.models import resolve_hook
from bae_lens.comsem.collect.background import Background
from bae_lens.comsem.collect.choice import check_features, choose_features
from bae_lens.comsem.collect.corpus import ContextStore, CorpusSettings, TextContext, text_contexts
from bae_lens.comsem.collect.dictionaries import informative, ten_strongest
from bae_lens.comsem.collect.excerpts import read_excerpts
from bae_lens.comsem.collect.instances import Excerpt
from bae_lens.comsem.collect.sampling import (
    CollectedDictionary,
    Collection,
    FeatureSampler,
    SamplingSettings,
    TokenRows,
    read_instance,
)
from bae_lens.distributed.connection import is_main_process, n_processes, process_index
from bae_lens.distributed.exchange import gather
from bae_lens.evaluation.metrics import activated_features, is_binary
from bae_lens.functional.outliers import is_outlier
from bae_lens.functional.strength import rescaled_activations
from bae_lens.saes.saelens_compat import get_special_token_ids, heads_concatenated

BATCH_BITS = 2**27  # tokens times features of a batch, at most
CONTEXTS_PER_BATCH = 16
CONTEXTS_OF_MEDIAN = 16  # whatever the batches are, so that what content is does not depend on them


@torch.no_grad()
def collect(
    model: Any,
    dictionaries: Mapping[str, SAE[Any]],
    documents: Iterable[Any],
    corpus: CorpusSettings,
    sampling: SamplingSettings,
) -> Collection:
    """Runs the model once over the documents, up to the deepest hook, and samples instances of each dictionary.

    Special tokens are skipped, and so are outliers by `is_outlier`, unless nothing is to be left out: at any hook,
    against the median norm there of the tokens of the first 16 contexts.
    The strengths of a binary dictionary's bits are relative to its exact firing rates over these tokens, whatever its
    own `prior`, and rescaled activations to their mean and deviation; the codes wait for these in a temporary file.
    Dictionaries stay as they are; at hook_z they take heads concatenated for the time being. Memory depends on the
    dictionaries, not on the length of the corpus.
    Several processes share the batches; each samples from all of them in order, and returns what a single one would.
    Raises ValueError for an unknown hook, a dictionary of another width, features that a dictionary does not have, and
    a text without tokens of content.
    """
    check_features({name: sae.cfg.d_sae for name, sae in dictionaries.items()}, sampling)
    activated = ten_strongest if sampling.leave_nothing_out else activated_features
    hooks = {name: resolve_hook(model, str(sae.cfg.metadata.hook_name)) for name, sae in dictionaries.items()}
    special = torch.tensor(sorted(get_special_token_ids(model.tokenizer)))
    vocabulary = 1 + max(len(model.tokenizer), *model.tokenizer.get_vocab().values(), *special.tolist())
    largest = max(sae.cfg.d_sae for sae in dictionaries.values())
    batch_size = max(1, min(CONTEXTS_PER_BATCH, BATCH_BITS // (corpus.context_size * largest)))
    samplers = {name: FeatureSampler(sae.cfg.d_sae, sampling) for name, sae in dictionaries.items()}
    counts, background = _Counts(torch.zeros(vocabulary, dtype=torch.int64)), Background(sampling.seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="comsem-")))
        store = stack.enter_context(closing(ContextStore(folder / "contexts.jsonl")))
        codes = {name: stack.enter_context((folder / f"{i}.npy").open("w+b")) for i, name in enumerate(dictionaries)}
        for sae in dictionaries.values():
            stack.enter_context(heads_concatenated(sae))
        contexts = text_contexts(model.tokenizer, documents, corpus, sampling.seed)
        batches = iter(lambda: list(islice(contexts, batch_size)), [])
        first = list(islice(batches, -(-CONTEXTS_OF_MEDIAN // batch_size)))
        at_hooks = sorted(set(hooks.values()))
        runs = [_run(model, batch, at_hooks, special) for batch in first]  # in every process, for the medians
        medians = {} if sampling.leave_nothing_out else _median_norms(runs)

        def encoded(batch: list[TextContext], run: _Run | None) -> _Encoded:
            activations, content = run or _run(model, batch, at_hooks, special)
            for hook, median in medians.items():
                content &= ~is_outlier(activations[hook].norm(dim=-1), median)
            return _Encoded(
                content,
                {
                    name: _code(sae, name, activations[hooks[name]][content], activated, sampling.rescale)
                    for name, sae in dictionaries.items()
                },
            )

        every = zip(chain(first, batches), chain(runs, repeat(None)), strict=False)
        total = None if corpus.sentences else corpus.tokens
        with tqdm(total=total, desc="collecting instances", unit="token", disable=not is_main_process()) as progress:
            for batch, (content, found) in _shared(every, encoded):
                rows = counts.rows(batch, content, [store.write(context) for context in batch])
                background.add(rows.sampled(torch.arange(len(rows.index))))
                for name, (of_tokens, code) in found.items():
                    if of_tokens is None:
                        _write(codes[name], rows, code)
                    else:
                        samplers[name].add(rows, of_tokens, code)
                progress.update(sum(len(context.tokens) for context in batch))
        if counts.tokens == 0:
            raise ValueError("the text holds no tokens of content to analyze")
        for name, sae in dictionaries.items():
            if is_binary(sae):
                _add_codes(samplers[name], sae, codes[name], counts.tokens, activated)
            elif sampling.rescale:
                _add_rescaled(samplers[name], sae, codes[name], counts.tokens, activated)
        scoreable = {name: sampler.scoreable() for name, sampler in samplers.items()}
        fired = {name: (sampler.n_fired.double() / counts.tokens).tolist() for name, sampler in samplers.items()}
        chosen = choose_features(scoreable, fired, sampling)
        collected = {
            name: sampler.finish(chosen[name], scoreable[name], store, counts.token_counts, counts.tokens)
            for name, sampler in samplers.items()
        }
        if sampling.excerpts:  # the bits of binary codes are known, activations are read
            valued = {name: sae for name, sae in dictionaries.items() if not is_binary(sae)}
            found = read_excerpts(
                {name: samplers[name].held_out for name in valued},
                store,
                lambda contexts: _encode_contexts(model, valued, hooks, contexts),
                batch_size,
            )
            collected |= {name: _with_excerpts(collected[name], of_held_out) for name, of_held_out in found.items()}
        shown = set().union(*(sampler.shown for sampler in samplers.values()))
        return Collection(
            n_documents=counts.documents,
            n_contexts=counts.contexts,
            n_sentences=counts.sentences,
            n_tokens=counts.tokens,
            dictionaries=collected,
            background=[read_instance(store, item) for item in background.outside(shown)],
        )


_Run = tuple[dict[str, Float[Tensor, "n position d_in"]], Bool[Tensor, "n position"]]


class _Code(NamedTuple):
    """What a dictionary says of the tokens of content of a batch."""

    activated: Int[Tensor, "n k"] | None
    """The features that each activates; None where it depends on the whole corpus: of a binary dictionary on its firing
    rates, of rescaled activations on their mean and deviation."""
    code: Bool[Tensor, "n d_sae"] | Float[Tensor, "n d_sae"]
    """The code if it is binary, activations that are to be rescaled, or which features are informative."""


class _Encoded(NamedTuple):
    """A batch as all dictionaries see it."""

    content: Bool[Tensor, "n position"]
    codes: dict[str, _Code]


def _shared(
    batches: Iterator[tuple[list[TextContext], _Run | None]],
    encoded: Callable[[list[TextContext], _Run | None], _Encoded],
) -> Iterator[tuple[list[TextContext], _Encoded]]:
    """All batches in order, each encoded by one of the processes."""
    for together in iter(lambda: list(islice(batches, n_processes())), []):
        own = together[process_index() : process_index() + 1]
        everyones = gather([encoded(*batch) for batch in own])
        yield from zip((batch for batch, _ in together), chain.from_iterable(everyones), strict=True)


def _code(
    sae: SAE[Any], name: str, x: Float[Tensor, "n d_in"], activated: Callable[..., Tensor], rescale: bool
) -> _Code:
    feature_acts = _encode(sae, name, x)
    if is_binary(sae):
        return _Code(None, feature_acts.bool())
    if rescale:
        return _Code(None, feature_acts)
    return _Code(activated(sae, feature_acts), informative(sae, feature_acts))


@dataclass
class _Counts:
    """What has been seen so far."""

    token_counts: Int[Tensor, " vocabulary"]
    tokens: int = 0
    contexts: int = 0
    sentences: int = 0
    documents: int = 0
    last_document: int | None = None

    def rows(self, batch: list[TextContext], content: Bool[Tensor, "n position"], places: list[int]) -> TokenRows:
        """The tokens of content of a batch, with sentences numbered throughout the corpus."""
        context, position = content.nonzero().unbind(1)
        first_sentence = np.cumsum([self.sentences] + [len(item.sentences) for item in batch])
        tokens = _pad([item.tokens for item in batch], content.shape[1])[content]
        sentences = _pad([item.sentence_of for item in batch], content.shape[1])[content]
        rows = TokenRows(
            place=torch.tensor(places)[context],
            position=position,
            token=tokens,
            sentence=sentences + torch.from_numpy(first_sentence)[context],
            index=self.tokens + torch.arange(len(tokens)),
            text=_pad([_sentence_hashes(item) for item in batch], content.shape[1])[content],
        )
        self.token_counts += torch.bincount(tokens, minlength=len(self.token_counts))
        self.tokens += len(tokens)
        self.contexts += len(batch)
        self.sentences = int(first_sentence[-1])
        numbers = [self.last_document, *(item.document for item in batch)]  # the contexts of a document come together
        self.documents += sum(number != before for before, number in pairwise(numbers))
        self.last_document = numbers[-1]
        return rows


def _median_norms(
    runs: list[tuple[dict[str, Float[Tensor, "_ _ _"]], Bool[Tensor, "_ _"]]],
) -> dict[str, Float[Tensor, ""]]:
    """Of the content of the first `CONTEXTS_OF_MEDIAN` contexts, at each hook; not a number if there is none."""
    norms: dict[str, list[Float[Tensor, " n"]]] = {}
    for activations, content in runs:
        for hook, at_hook in activations.items():
            norms.setdefault(hook, []).extend(at_hook[row][content[row]].norm(dim=-1) for row in range(len(content)))
    return {hook: torch.cat(of_contexts[:CONTEXTS_OF_MEDIAN]).median() for hook, of_contexts in norms.items()}


def _run(model: Any, batch: list[TextContext], hooks: list[str], special: Int[Tensor, " n_special"]) -> _Run:
    """Activations at the hooks, and which tokens are neither special nor padding."""
    size = max(len(context.tokens) for context in batch)
    tokens = _pad([context.tokens for context in batch], size)
    length = torch.tensor([len(context.tokens) for context in batch])
    content = (torch.arange(size) < length[:, None]) & ~torch.isin(tokens, special)
    return run_at_hooks(model, tokens, hooks), content


def _encode_contexts(
    model: Any, dictionaries: Mapping[str, SAE[Any]], hooks: Mapping[str, str], contexts: list[TextContext]
) -> dict[str, Float[Tensor, "n position d_sae"]]:
    tokens = _pad([context.tokens for context in contexts], max(len(context.tokens) for context in contexts))
    activations = run_at_hooks(model, tokens, sorted({hooks[name] for name in dictionaries}))
    return {
        name: _encode(sae, name, activations[hooks[name]].flatten(0, 1)).unflatten(0, tokens.shape)
        for name, sae in dictionaries.items()
    }


def _with_excerpts(collected: CollectedDictionary, found: Mapping[int, list[Excerpt]]) -> CollectedDictionary:
    """With these in the place of the excerpts of held-out instances."""
    features = [
        replace(instances, excerpts=[*found[instances.feature], *instances.excerpts[len(instances.held_out) :]])
        for instances in collected.features
    ]
    return replace(collected, features=features)


def _encode(sae: SAE[Any], name: str, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    if x.shape[1] != sae.cfg.d_in:
        raise ValueError(
            f"dictionary {name} takes {sae.cfg.d_in} wide activations, but {sae.cfg.metadata.hook_name} of this model "
            f"is {x.shape[1]} wide; use the model that it was trained on"
        )
    feature_acts = sae.encode(x.to(sae.device, sae.dtype))
    return (feature_acts.to_dense() if feature_acts.is_sparse else feature_acts).float().cpu()


def _write(file: IO[bytes], rows: TokenRows, code: Bool[Tensor, "n d_sae"] | Float[Tensor, "n d_sae"]) -> None:
    np.save(file, rows.stack().numpy())
    np.save(file, np.packbits((code != 0).numpy(), axis=1))
    if code.dtype != torch.bool:
        np.save(file, code[code != 0].numpy())


def _read(file: IO[bytes], d_sae: int, binary: bool) -> Iterator[tuple[TokenRows, Float[Tensor, "n d_sae"]]]:
    end = file.tell()
    file.seek(0)
    while file.tell() < end:
        rows = TokenRows.unstack(torch.from_numpy(np.load(file)))
        code = torch.from_numpy(np.unpackbits(np.load(file), axis=1, count=d_sae))
        yield rows, code.float() if binary else _masked(code.bool(), torch.from_numpy(np.load(file)))


def _masked(fires: Bool[Tensor, "n d_sae"], values: Float[Tensor, " fired"]) -> Float[Tensor, "n d_sae"]:
    return torch.zeros(fires.shape).masked_scatter_(fires, values)


def _add_codes(
    sampler: FeatureSampler, sae: Any, file: IO[bytes], n_tokens: int, activated: Callable[..., Tensor]
) -> None:
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
    for _, code in _read(file, sae.cfg.d_sae, binary=True):
        fired += code.sum(0).long()
    prior = (fired.double() / n_tokens).float()
    for rows, code in _read(file, sae.cfg.d_sae, binary=True):
        sampler.add(rows, activated(sae, code, prior), informative(sae, code, prior))


def _add_rescaled(
    sampler: FeatureSampler, sae: Any, file: IO[bytes], n_tokens: int, activated: Callable[..., Tensor]
) -> None:
    total, squares = torch.zeros(2, sae.cfg.d_sae, dtype=torch.float64)
    for _, feature_acts in _read(file, sae.cfg.d_sae, binary=False):
        total += feature_acts.double().sum(0)
        squares += feature_acts.double().square().sum(0)
    mean = total / n_tokens
    deviation = (squares / n_tokens - mean.square()).clamp(min=0).sqrt()
    for rows, feature_acts in _read(file, sae.cfg.d_sae, binary=False):
        strength = rescaled_activations(feature_acts, mean.float(), deviation.float())
        sampler.add(rows, activated(sae, strength), informative(sae, feature_acts))


def _sentence_hashes(context: TextContext) -> list[int]:
    """For each token, 63 bits that depend on the text of its sentence alone."""
    texts = [context.text[start:end].encode() for start, end in context.sentences]
    hashes = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1 for text in texts]
    return [hashes[sentence] for sentence in context.sentence_of]


def _pad(lists: list[list[int]], size: int) -> Int[Tensor, "n size"]:
    padded = torch.zeros(len(lists), size, dtype=torch.int64)
    for row, values in enumerate(lists):
        padded[row, : len(values)] = torch.tensor(values)
    return padded
