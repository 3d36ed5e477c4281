"""Starts Dynamo's simulated engine and its frontend from their published packages.

`mocker.py fetch ENV` makes the virtual environment ENV. `mocker.py model DIR` makes a model that is a
tokenizer alone, which is all that the simulated engine reads of one.
"""

import json
import os
import subprocess
import sys
import venv

# What ai-dynamo needs at run time. Its own list names a package that is an empty stub.
NEEDS = [
    "uvloop",
    "pydantic<=2.13.5",
    "aiohttp>=3.14.3",
    "certifi",
    "kubernetes<33,>=32.0.1",
    "msgspec>=0.19",
    "prometheus-client>=0.23.1,<1.0",
    "pyzmq>=26",
    "redis>=6.2,<9",
    "tqdm",
    "transformers>=4.56",
    "typing-extensions",
    "zstandard<1,>=0.23",
]
DYNAMO = ["ai-dynamo==1.6.1", "ai-dynamo-runtime==1.6.1"]


def fetch(env):
    done = os.path.join(env, "fetched")
    if os.path.exists(done):
        return
    venv.create(env, with_pip=True)
    pip = [os.path.join(env, "bin", "pip"), "install", "--quiet"]
    subprocess.run(pip + NEEDS, check=True)
    subprocess.run(pip + ["--no-deps"] + DYNAMO, check=True)
    open(done, "w").close()


def word_level(folder, words, longest):
    """Makes a model whose tokens are words: those for the unknown, the beginning and the end come
    first. Prompts have at most `longest` tokens.
    """
    os.makedirs(folder, exist_ok=True)
    vocabulary = {word: token for token, word in enumerate(words)}
    unknown, beginning, end = words[:3]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "bos_token": beginning,
        "eos_token": end,
        "model_max_length": longest,
        "chat_template": "{{ messages[0].content }}",
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": longest,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    for name, content in (("tokenizer", tokenizer), ("tokenizer_config", settings), ("config", config)):
        write(folder, name, content)


def model(folder):
    word_level(folder, ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 1000))], 8192)
    write(folder, "generation_config", {"bos_token_id": 1, "eos_token_id": 2})


def write(folder, name, content):
    with open(os.path.join(folder, name + ".json"), "w", encoding="utf-8") as file:
        json.dump(content, file)


if __name__ == "__main__":
    {"fetch": fetch, "model": model}[sys.argv[1]](sys.argv[2])
