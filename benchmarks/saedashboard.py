"""Dashboards of a BAE's features by SAEDashboard: a page of HTML, and Neuronpedia's JSON.

SAEDashboard 0.8 needs a TransformerLens older than ours, so a saved graded view is what the two environments share:

python -c "from bae_lens import BAE; BAE.load_from_disk('demo/dictionaries/BAE').to_graded_sae().save_model('graded')"

MODEL is a folder, for the demo `python -c "from bae_lens.activations.demo_model import *; print(demo_model_folder())"`.
Then, in an environment of its own (`saedashboard_constraints.txt` says why):

pip install -c benchmarks/saedashboard_constraints.txt torch sae-dashboard tyro
pip uninstall -y torchvision torchaudio
python benchmarks/saedashboard.py --sae graded --tokens demo/activations/test/tokens.npy --model MODEL
"""
# pyright: reportMissingImports=false

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from transformer_lens import HookedTransformerConfig, loading_from_pretrained
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class SAEDashboard:
    """Writes `dashboard.html` and `neuronpedia.json` for some features on some contexts."""

    sae: Path
    """Folder of an SAE that SAELens saved."""
    model: str
    """Folder of a model in the format of transformers, or a name that TransformerLens lists."""
    tokens: Path
    """A .npy file of token ids (n_contexts, context_size); those with negative ids (padding) are left out."""
    features: tuple[int, ...] = tuple(range(16))
    n_contexts: int = 128
    sae_set: str = "bae"
    """Neuronpedia's name for the set of dictionaries."""
    output: Path = Path("runs/saedashboard")

    def run(self) -> None:
        sae, model = SAE.load_from_disk(self.sae), _load_model(self.model)
        hook_name = sae.cfg.metadata.hook_name
        tokens = torch.from_numpy(np.load(self.tokens)).long()
        tokens = tokens[(tokens >= 0).all(1)][: self.n_contexts]
        special = {model.tokenizer.bos_token_id, model.tokenizer.eos_token_id, model.tokenizer.pad_token_id}
        config = SaeVisConfig(hook_point=hook_name, features=list(self.features), ignore_tokens=special)
        data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
        self.output.mkdir(parents=True, exist_ok=True)
        save_feature_centric_vis(sae_vis_data=data, filename=self.output / "dashboard.html")
        (self.output / "neuronpedia.json").write_text(self._neuronpedia(model, data, tokens, hook_name))

    def _neuronpedia(self, model: HookedSAETransformer, data: Any, tokens: torch.Tensor, hook_name: str) -> str:
        config = NeuronpediaRunnerConfig(
            sae_set=self.sae_set,
            sae_path=str(self.sae),
            outputs_dir=str(self.output),
            huggingface_dataset_path=str(self.tokens),
            n_prompts_total=len(tokens),
            n_tokens_in_prompt=tokens.shape[1],
            model_id=Path(self.model).name,
            layer=int(hook_name.split(".")[1]),
        )
        words = {index: model.tokenizer.decode([index]) for index in range(model.cfg.d_vocab)}
        return NeuronpediaConverter.convert_to_np_json(model, data, config, words)


def _load_model(name: str) -> HookedSAETransformer:
    """As `bae_lens.activations.demo_model.load_hooked` does, which cannot be imported beside SAEDashboard."""
    if not Path(name).is_dir():
        return HookedSAETransformer.from_pretrained_no_processing(name, device="cpu")
    values = loading_from_pretrained.convert_hf_model_config(name)
    values |= {"model_name": Path(name).name, "device": "cpu"}
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
    tyro.cli(SAEDashboard).run()
