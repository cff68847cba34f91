"""Stage 2: the demo model's tokenizer and its (untrained) text encoder, a small Mistral 3."""

import random
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)

from demo_model.scenes import random_scene

MAX_SEQUENCE_LENGTH = 32
"""Tokens of a prompt, including those of the chat template; FLUX.2 [dev] has 512."""
HIDDEN_LAYERS = (1, 2, 3)
"""Hidden states that are concatenated; FLUX.2 [dev] uses 10, 20 and 30 of 40."""
HIDDEN_SIZE = 128
VOCABULARY_SIZE = 384
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages if message.role == 'user' %}[INST]\
{% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}[/INST]{% endfor %}"""
"""The template of user messages only: the system message of FLUX.2 [dev] does not help a model this small."""


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which each word of the demo's prompts is one token."""
    rng = random.Random(seed)
    corpus = [random_scene(rng, rng.choice((1, 2))).prompt for _ in range(4000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def make_text_encoder(tokenizer: PreTrainedTokenizerFast) -> Mistral3ForConditionalGeneration:
    """Create a Mistral 3 with 4 layers, of which 3 are used, and a minimal vision tower, which is not used."""
    config: Any = Mistral3Config(
        text_config=MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=2 * HIDDEN_SIZE,
            num_hidden_layers=max(HIDDEN_LAYERS) + 1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            initializer_range=0.08,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        ),
        vision_config=PixtralVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        ),
        image_token_index=tokenizer.unk_token_id,
        tie_word_embeddings=True,
    )
    # What FLUX.2 [dev] has as constants in its pipeline: read by flux2_shared.model.folder.
    config.flux2_prompt_format = {"hidden_layers": list(HIDDEN_LAYERS), "max_sequence_length": MAX_SEQUENCE_LENGTH}
    return Mistral3ForConditionalGeneration(config)
