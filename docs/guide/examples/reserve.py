"""Asks the select service for a worker, sends it the request, and says how far it is."""
import json, sys, urllib.request

select, model, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

def call(method, url, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method))

question = {"model_name": model, "token_ids": tokens}
chosen = json.load(call("POST", f"{select}/select_and_reserve", question))
reservation = f"{select}/reservations/{chosen['selection_id']}"
try:
    request = {"model": model, "prompt": tokens, "stream": True, "max_tokens": 16}
    for number, line in enumerate(call("POST", f"{chosen['endpoint']}/v1/completions", request)):
        if number == 0:
            call("POST", f"{reservation}/prefill_complete")
        print(line.decode(), end="")
finally:
    call("DELETE", reservation)
