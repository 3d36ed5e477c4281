"""What a prompt that is text costs in each router, before the same engines that answer at once.

Starts engines and routers, and has target/release/text_peers measure them.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys

from arms import ARMS, MODEL, RELEASE, ROOT, check_built
from main import OUT, Run, fetch_peers
from processes import Failed

ENGINES = 4
# Room for 64 prompts of 36,000 words at once, in blocks.
BLOCKS = 1 << 18
# Tokens of the longest prompt that a router may take.
LONGEST = 131_072
ROUTERS = ["envoy-round-robin", "ours", "sglang-router", "vllm-router", "dynamo"]
# Engines behind a router, which is not the router.
BEHIND = ["dynamo-worker"]
CLIENT = os.path.join(RELEASE, "text_peers")
TOKENIZER = os.environ.get("KV_BENCH_MODEL", os.path.join(ROOT, "target/tokenizer-parity/models/trl-deepseekv3"))


def copy_model(folder):
    """The model's folder with what routers ask of it besides."""
    if not os.path.isdir(TOKENIZER):
        raise Failed(f"{TOKENIZER}: no model; run make tokenizer-parity CONVERSATIONS=1, or set KV_BENCH_MODEL")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TOKENIZER, folder)
    file = os.path.join(folder, "tokenizer_config.json")
    with open(file, encoding="utf-8") as text:
        settings = json.load(text)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LONGEST}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 129_280,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": LONGEST,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    for name, content in ((file, settings), (os.path.join(folder, "config.json"), config)):
        with open(name, "w", encoding="utf-8") as text:
            json.dump(content, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--routers", nargs="+", choices=ARMS, default=ROUTERS, help="Envoy alone first")
    wanted = parser.parse_args()
    check_built()
    os.makedirs(OUT, exist_ok=True)
    model = os.path.join(OUT, "text-model")
    copy_model(model)
    absent = fetch_peers(wanted.routers)
    with contextlib.ExitStack() as stack:
        engines = stack.enter_context(Run("text-engines"))
        engines.blocks = BLOCKS
        engines.start_engines(ENGINES, ["--instant"])
        arms = []
        for name in wanted.routers:
            peer, start = ARMS[name]
            if peer in absent:
                print(f"==> left out: {name}, {absent[peer]}")
                continue
            run = stack.enter_context(Run(f"text-{name}"))
            run.engines, run.model, run.blocks = engines.engines, model, BLOCKS
            try:
                start(run)
                run.wait(f"{name} to route", 90, run.serves)
            except Failed as failure:
                print(f"==> left out: {failure}")
                continue
            arms.append({"name": name, "port": run.port, "processes": run.members(BEHIND), "model": MODEL})
        file = engines.write("arms.json", json.dumps(arms))
        print("==> measuring: half an hour", flush=True)
        subprocess.run([CLIENT, file], check=True)


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"bench-text-peers: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
