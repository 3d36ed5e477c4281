"""One simulated engine as a worker of Dynamo 1.6.1: token ids in, token ids out, and its KV events.

Arguments: the engine's URL, the address of its events over ZMQ, the folder of the model's tokenizer,
tokens to a block, blocks of the cache. Runs in Dynamo's own Python environment.
"""

import asyncio
import json
import os
import sys

import aiohttp
import uvloop
from dynamo.llm import KvEventPublisher, ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime

ENGINE, EVENTS, MODEL_PATH, BLOCK_SIZE, BLOCKS = sys.argv[1:6]
MODEL = "sim"
# The engines write token 12 as the word `qbc`.
DIGITS = str.maketrans("abcdefghij", "0123456789")


def event_of(line):
    """The event in a line of an engine's answer; None in other lines."""
    return json.loads(line[6:]) if line.startswith(b"data: {") else None


async def main():
    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, os.environ["DYN_DISCOVERY_BACKEND"], os.environ["DYN_REQUEST_PLANE"])
    endpoint = runtime.endpoint("bench.backend.generate")
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    )

    async def generate(request, context=None):
        wanted = (request.get("stop_conditions") or {}).get("max_tokens") or 16
        body = {
            "model": MODEL,
            "prompt": request["token_ids"],
            "max_tokens": wanted,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        # The last token is told with the usage, which comes after it.
        told, last = 0, {"token_ids": [], "index": 0}
        async with session.post(ENGINE + "/v1/completions", json=body) as answer:
            async for line in answer.content:
                event = event_of(line)
                if event is None:
                    continue
                if event["choices"]:
                    word = event["choices"][0]["text"].strip()
                    part = {"token_ids": [int(word[1:].translate(DIGITS))] if word else [], "index": 0, "finish_reason": None}
                    told += len(part["token_ids"])
                    if told < wanted:
                        yield part
                    else:
                        last = part
                if event.get("usage"):
                    last["completion_usage"] = event["usage"]
        yield last | {"finish_reason": "length"}

    config = ModelRuntimeConfig()
    config.total_kv_blocks = int(BLOCKS)
    config.max_num_seqs = 256
    config.max_num_batched_tokens = 8192
    config.enable_local_indexer = True
    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate, graceful_shutdown=False))
    await asyncio.sleep(0.2)
    publisher = KvEventPublisher(
        endpoint=endpoint,
        kv_block_size=int(BLOCK_SIZE),
        zmq_endpoint=EVENTS,
        zmq_topic="",
        enable_local_indexer=True,
    )
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat | ModelType.Completions,
        endpoint,
        MODEL_PATH,
        MODEL,
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=int(BLOCK_SIZE),
        runtime_config=config,
        ignore_weights=True,
    )
    print("registered", flush=True)
    await serving
    del publisher


uvloop.run(main())
