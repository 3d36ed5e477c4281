"""Tells Envoy KV Router what worker WORKER holds: python3 post_events.py URL [TOKEN]."""
import json, sys, time, urllib.error, urllib.request

URL, TOKEN = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
WORKER, BLOCK, RUN = 1, 16, f"{time.time_ns():x}"
sent = []  # every batch of this run; send a whole cache under a new RUN to begin anew

def post(sequence):
    body = {"worker_id": WORKER, "incarnation": RUN, "sequence": sequence, "events": sent[sequence]}
    headers = {"content-type": "application/json", "authorization": f"Bearer {TOKEN}"}
    return urllib.request.urlopen(urllib.request.Request(URL, json.dumps(body).encode(), headers))

def publish(*events):
    sent.append(events)
    sequence = len(sent) - 1
    while sequence < len(sent):
        try:
            sequence = json.load(post(sequence))["next"]
        except urllib.error.HTTPError as error:
            if error.code == 409:  # the router lacks earlier batches
                sequence = json.load(error)["expected"]
            elif error.code in (429, 503):
                time.sleep(1)
            else:
                raise

tokens = list(range(1, 1 + 3 * BLOCK))
publish({"type": "BlockStored", "block_hashes": [501, 502, 503], "parent_block_hash": None,
         "token_ids": tokens, "block_size": BLOCK})
publish({"type": "BlockRemoved", "block_hashes": [503]})
