"""Makes a model folder that vLLM and transformers load, without a model hub. Run by the transformers environment.

    python scripts/make_model.py smollm2 GGUF FOLDER    SmolLM2-135M-Instruct, dequantised; bfloat16, 0.27 GB
    python scripts/make_model.py tiny TEXT FOLDER       a random Llama of 5 M parameters, its tokenizer trained on TEXT

scripts/prepare.py calls it. It knows nothing of twoclocks.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TINY_SEED = 20250107
TINY_VOCABULARY = 4096
TINY_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_smollm2(gguf: Path, folder: Path) -> None:
    """Dequantises the GGUF file into a model folder with tokenizer, chat template and generation config."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF keeps a quantisation mark in its config and refuses save_pretrained (transformers 5.23).
    fields = quantised.config.to_dict()
    fields.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig.from_dict(fields))
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = quantised.generation_config
    # In bfloat16, as the model was published: half the disk, and weights of four bits lose nothing that matters.
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tiny(text: Path, folder: Path) -> None:
    """Writes a random Llama (hidden 256, 4 layers) that speaks nonsense fast; the same weights each time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=TINY_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.read_text(encoding="utf-8").splitlines(), trainer)
    start, end = TINY_SPECIAL_TOKENS[1:]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=end)
    fast.chat_template = TINY_CHAT_TEMPLATE
    torch.manual_seed(TINY_SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            # The embedding has room for every id whatever the text gave the tokenizer, so the size is always the same.
            vocab_size=TINY_VOCABULARY,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def main() -> None:
    """Reads the command line and makes the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=["smollm2", "tiny"])
    parser.add_argument("source", type=Path, help="the GGUF file, or the text to train the tokenizer on")
    parser.add_argument("folder", type=Path, help="the model folder to write")
    arguments = parser.parse_args()
    make = {"smollm2": make_smollm2, "tiny": make_tiny}[arguments.kind]
    make(arguments.source, arguments.folder)


if __name__ == "__main__":
    main()
