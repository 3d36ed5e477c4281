"""Requests to the demo's own processes on loopback, past any proxy of the environment."""

import http.client
import json

TIMEOUT_S = 10


def request(port, method, path, body=None):
    """(status, headers, text), or None while nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        headers = {"content-type": "application/json"} if body is not None else {}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def is_ok(port, path):
    answer = request(port, "GET", path)
    return answer is not None and answer[0] == 200


def get_json(port, path):
    """The JSON at `path`; None while it is not to be had."""
    answer = request(port, "GET", path)
    if answer is None or answer[0] != 200:
        return None
    try:
        return json.loads(answer[2])
    except ValueError:
        return None
