"""Where a request may go: to one worker, to some of them, to those with a taint."""
import json, sys, urllib.error, urllib.request

select, model = sys.argv[1:3]

def ask(**constraints):
    body = {"model_name": model, "token_ids": list(range(64)), **constraints}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{select}/select", json.dumps(body).encode(), headers)
    try:
        return json.load(urllib.request.urlopen(request))["worker_id"]
    except urllib.error.HTTPError as refusal:
        return json.load(refusal)["error"]

second = {"worker_id": 2, "dp_rank": 0}
print("pinned:", ask(pinned_worker=second))
print("allowed:", ask(allowed_worker_ids=[3]))
print("tainted:", ask(routing_constraints={"required_taints": ["gpu=h100"]}))
print("preferred, while it takes requests:", ask(affinity_target=second))
print("refused:", ask(pinned_worker=second, allowed_worker_ids=[3]))
