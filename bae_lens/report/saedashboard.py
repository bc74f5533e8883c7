"""Dashboards of features by SAEDashboard, in an environment of its own: `python -I saedashboard.py JOB.json`.

SAEDashboard 0.8 needs a TransformerLens older than that of bae_lens, so nothing of bae_lens is imported here, and what
is to be shown comes in files; `bae_lens.cli.dashboard` writes them and starts this. `saedashboard_constraints.txt` is
the environment in which it was tried.
"""
# pyright: reportMissingImports=false

import json
import sys
from copy import copy
from pathlib import Path
from typing import Any


def _main(job: dict[str, Any]) -> None:
    import numpy as np
    import torch
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    sae = SAE.load_from_disk(job["sae"], device=job["device"])
    model = _load_model(job["model"], job["device"], job["model_options"])
    hook_name = sae.cfg.metadata.hook_name
    tokens = torch.from_numpy(np.load(job["tokens"])).long().to(job["device"])
    tokenizer: Any = model.tokenizer
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    config = SaeVisConfig(
        hook_point=hook_name, features=job["features"], ignore_tokens=special, device=job["device"], verbose=True
    )
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    output = Path(job["output"])
    (output / "neuronpedia").mkdir(parents=True)
    save_feature_centric_vis(sae_vis_data=data, filename=output / "dashboard.html")
    of_batches = NeuronpediaRunnerConfig(
        sae_set=job["sae_set"],
        sae_path=job["sae"],
        outputs_dir=str(output),
        huggingface_dataset_path=job["dataset"],
        n_prompts_total=len(tokens),
        n_tokens_in_prompt=tokens.shape[1],
        model_id=job["model_id"],
        layer=int(hook_name.split(".")[1]),
    )
    words = {index: tokenizer.decode([index]) for index in range(model.cfg.d_vocab)}
    features, size = list(data.feature_data_dict), job["batch_size"]
    for number, start in enumerate(range(0, len(features), size)):
        part = copy(data)
        part.feature_data_dict = {each: data.feature_data_dict[each] for each in features[start : start + size]}
        batch = NeuronpediaConverter.convert_to_np_json(model, part, of_batches, words)
        (output / "neuronpedia" / f"batch-{number}.json").write_text(batch, encoding="utf-8")


def _load_model(name: str, device: str, options: dict[str, Any]) -> Any:
    """As `bae_lens.activations.demo_model.load_hooked` does, which cannot be imported beside SAEDashboard."""
    import torch
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig, loading_from_pretrained
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    if options or not Path(name).is_dir():
        return HookedSAETransformer.from_pretrained_no_processing(name, device=device, **options)
    values = loading_from_pretrained.convert_hf_model_config(name)
    values |= {"model_name": Path(name).name, "device": device}
    rotary = json.loads((Path(name) / "config.json").read_text()).get("rope_parameters")
    if rotary is not None:  # as transformers 5 writes it, where 4 would take its default and say nothing
        values["rotary_base"] = rotary["rope_theta"]
    cfg = HookedTransformerConfig.from_dict(values)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(name, add_bos_token=True)
    model = HookedSAETransformer(cfg, tokenizer)
    weights = AutoModelForCausalLM.from_pretrained(name, torch_dtype=torch.float32)
    model.load_and_process_state_dict(
        loading_from_pretrained.get_pretrained_state_dict(name, cfg, weights),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


if __name__ == "__main__":
    _main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
