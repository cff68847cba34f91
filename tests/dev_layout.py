"""A model folder in the layout of FLUX.2 [dev]'s repository on the hub.

Diffusers and transformers 4 wrote that repository: the transformer and the text encoder are in shards with an index,
the language model has its old names and its own output layer, its configuration has ``rope_theta``, and the tokenizer
belongs to a ``PixtralProcessor``, which needs torchvision.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NUM_SHARDS = {"text_encoder": 3, "transformer": 2}
STEM = {"text_encoder": "model", "transformer": "diffusion_pytorch_model"}


def lay_out_as_dev(source: Path, folder: Path, **tokenizer: Any) -> Path:
    """Write the model in ``source`` to ``folder``; ``tokenizer`` changes ``tokenizer_config.json`` (None removes)."""
    shutil.copytree(source, folder)
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"tokenizer": ["transformers", "PixtralProcessor"]})
    encoder = load_file(folder / "text_encoder" / "model.safetensors")
    encoder["language_model.lm_head.weight"] = encoder["language_model.model.embed_tokens.weight"].clone()
    write_shards(folder, "text_encoder", encoder)
    write_shards(folder, "transformer", load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    write_encoder_config(folder / "text_encoder" / "config.json")
    write_tokenizer_files(folder / "tokenizer", tokenizer)
    return folder


def write_shards(folder: Path, part: str, tensors: dict[str, torch.Tensor]) -> None:
    """Divide one file of weights into several, with an index."""
    (folder / part / f"{STEM[part]}.safetensors").unlink()
    count, names = NUM_SHARDS[part], sorted(tensors)
    where: dict[str, str] = {}
    for number in range(count):
        file = f"{STEM[part]}-{number + 1:05d}-of-{count:05d}.safetensors"
        shard = {name: tensors[name] for name in names[number::count]}
        save_file(shard, folder / part / file, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": where}
    write_json(folder / part / f"{STEM[part]}.safetensors.index.json", index)


def write_encoder_config(file: Path) -> None:
    """Write the configuration as transformers 4 does."""
    config = read_json(file)
    for inner in (config["text_config"], config["vision_config"]):
        inner["rope_theta"] = inner.pop("rope_parameters")["rope_theta"]
        inner.pop("tie_word_embeddings", None)
    del config["tie_word_embeddings"]
    config["torch_dtype"] = config.pop("dtype")
    write_json(file, config | {"transformers_version": "4.57.1"})


def write_tokenizer_files(folder: Path, changes: dict[str, Any]) -> None:
    """Write the files of a processor as transformers 4 does."""
    config = read_json(folder / "tokenizer_config.json")
    special = {name: value for name, value in config.items() if name.endswith("_token")}
    added = read_json(folder / "tokenizer.json")["added_tokens"]
    config = special | {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(token.pop("id")): token for token in added},
        "additional_special_tokens": [token["content"] for token in added],
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "legacy": True,
        "model_max_length": config["model_max_length"],
        "padding_side": "left",
        "processor_class": "PixtralProcessor",
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    config = {name: value for name, value in (config | changes).items() if value is not None}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
    processor = {
        "processor_class": "PixtralProcessor",
        "patch_size": 14,
        "spatial_merge_size": 2,
        "image_token": "[IMG]",
    }
    write_json(folder / "processor_config.json", processor)
    preprocessor = {"image_processor_type": "PixtralImageProcessorFast", "patch_size": {"height": 14, "width": 14}}
    write_json(folder / "preprocessor_config.json", preprocessor | {"processor_class": "PixtralProcessor"})


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
