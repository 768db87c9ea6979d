"""A stand-in for a vLLM server, as a process of its own that starts in an instant and misbehaves on demand.

    python stand_in.py PORT [FAULTS]

Responses are a function of the prompt, the seed and the weights, so that it shows whether one was lost, mixed up or
made by other weights. FAULTS, and later POST /fault, are JSON {"delay_s": 0.5, ...}: see `Faults`.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock
from typing import Any

NUM_TOKENS = 6
NUM_IDS = 251
"""Token ids are below this: models of the tests have as many, and it is prime."""


def response(prompt: list[int], seed: int, sibling: int, version: int) -> list[int]:
    """The token ids of one response."""
    return [(sum(prompt) + seed + 31 * sibling + 7 * version + 3 * step) % NUM_IDS for step in range(NUM_TOKENS)]


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong with generation requests."""

    delay_s: float = 0.0
    """Each answer takes this long; tokens are computed meanwhile."""
    slow_s: float = 0.0
    """Answers to prompts whose ids have a sum divisible by five take this long."""
    holds: bool = False
    """No answer comes until other faults are armed; tokens are computed meanwhile."""
    is_stuck: bool = False
    """No answer comes, no token is computed, and everything else works."""
    reply: str | None = None
    """The body of every answer, in place of JSON."""
    status: int = 200
    """The status of every answer."""
    drops: bool = False
    """Every connection breaks without an answer."""
    drop_key: str | None = None
    """This part is missing from every choice."""


class StandIn(ThreadingHTTPServer):
    """The server's state."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int, faults: Faults) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.version = "default"
        self.faults = faults
        self.others_armed = Event()
        """Set when other faults are armed."""
        self.num_tokens = 0
        self.calls: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.lock = Lock()


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        match self.path:
            case "/metrics":
                with self.server.lock:
                    self.server.num_tokens += not self.server.faults.is_stuck
                    text = f'# a comment\nvllm:generation_tokens_total{{engine="0"}} {self.server.num_tokens}.0\n'
                self._send(200, text)
            case "/weight_info":
                self._send(200, json.dumps({"weight_version": self.server.version}))
            case "/requests":
                self._send(200, json.dumps(self.server.requests))
            case "/calls":
                self._send(200, json.dumps(self.server.calls))
            case "/health":
                self._send(200, "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        match self.path:
            case "/fault":
                with self.server.lock:
                    self.server.faults = replace(Faults(), **body)
                    self.server.others_armed.set()
                    self.server.others_armed = Event()
                self._send(200, "{}")
            case "/update_weight_version":
                self.server.version = body["new_version"]
                self._send(200, "{}")
            case "/v1/completions" | "/inference/v1/generate":
                self._complete(body)
            case _:
                self.server.calls.append(self.path)
                self._send(200, "{}")

    def _complete(self, request: dict[str, Any]) -> None:
        has_spans = "sampling_params" in request
        sampling = request["sampling_params"] if has_spans else request
        prompt, first = request["token_ids" if has_spans else "prompt"], self.server.version
        with self.server.lock:
            self.server.requests.append(request)
            faults, others_armed = self.server.faults, self.server.others_armed
        if faults.is_stuck:
            Event().wait()
        if faults.holds:
            others_armed.wait()
        time.sleep(faults.slow_s if sum(prompt) % 5 == 0 else faults.delay_s)
        if faults.drops:
            self.close_connection = True
            self.connection.close()
            return
        # New weights that came meanwhile sample the second half.
        last = self.server.version
        swap = NUM_TOKENS if first == last else NUM_TOKENS // 2
        spans = [{"version": first, "start": 0, "end": swap}, {"version": last, "start": swap, "end": NUM_TOKENS}]
        choices = []
        for index in reversed(range(sampling["n"])):
            seed = sampling.get("seed", 0)
            old, new = (response(prompt, seed, index, int(version)) for version in (first, last))
            choice = {
                "index": index,
                "token_ids": old[:swap] + new[swap:],
                "logprobs": {"content": [{"logprob": -0.25}] * NUM_TOKENS},
                "finish_reason": "length",
                "weight_versions": [span for span in spans if span["start"] < span["end"]],
            }
            if not has_spans:
                del choice["weight_versions"]
                choice["logprobs"] = {"token_logprobs": [-0.25] * NUM_TOKENS}
            choice.pop(faults.drop_key, None)
            choices.append(choice)
        name, prefix = ("request_id", "generate-tokens") if has_spans else ("id", "cmpl")
        reply = json.dumps({name: f"{prefix}-{request['request_id']}", "choices": choices})
        self._send(faults.status, faults.reply or reply)

    def _send(self, status: int, text: str) -> None:
        payload = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: object) -> None:
        pass


if __name__ == "__main__":
    StandIn(int(sys.argv[1]), Faults(**json.loads(sys.argv[2] if sys.argv[2:] else "{}"))).serve_forever()
