"""A program for vLLM's own Python: streams as recorded -> what `vllm bench serve` makes of them, by its own functions.

Reads JSON from the file of its first argument: {"requests": [...], "seconds": ..., "goodput": {...}}, each request with
"began_at", "prompt_tokens", "output_tokens", "ok" and "events" [[arrival, what its data holds], ...]. Its client reads
them by a clock that stands at each arrival; calculate_metrics then sees what that client kept. Writes JSON to the file
of its second argument.
"""

import asyncio
import dataclasses
import json
import sys
import types
from contextlib import asynccontextmanager
from pathlib import Path

from vllm.benchmarks import plot, serve
from vllm.benchmarks.lib import endpoint_request_func as client

NOW = [0.0]
client.time = types.SimpleNamespace(perf_counter=lambda: NOW[0])


class Session:
    """In place of aiohttp's: answers with one recorded stream."""

    def __init__(self, request):
        self.request = request

    @asynccontextmanager
    async def post(self, **_):
        status = 200 if self.request["ok"] else 503
        yield types.SimpleNamespace(status=status, reason="recorded as failed", content=self)

    async def iter_any(self):
        for at, data in self.request["events"]:
            NOW[0] = at
            yield f"data: {json.dumps(data)}\n\n".encode()
        yield b"data: [DONE]\n\n"


def replayed(request):
    asked = client.RequestFuncInput(
        prompt="recorded",
        api_url="http://127.0.0.1/v1/chat/completions",
        prompt_len=request["prompt_tokens"] or 0,
        output_len=0,
        model="recorded",
    )
    NOW[0] = request["began_at"]
    return asyncio.run(client.async_request_openai_chat_completions(asked, Session(request)))


given = json.loads(Path(sys.argv[1]).read_text())
outputs = [replayed(request) for request in given["requests"]]
metrics, lengths = serve.calculate_metrics([], outputs, given["seconds"], None, [50, 95, 99], given["goodput"])
told = {
    "metrics": dataclasses.asdict(metrics),
    "output_lens": lengths,
    "outputs": [{name: getattr(one, name) for name in ("ttft", "itl", "latency", "start_time")} for one in outputs],
}
# as serve.main_async hands a result's lists to its plot
bench, rows = given["bench"], []
for number, itl in enumerate(bench["itls"]):
    ttft, start = bench["ttfts"][number], bench["start_times"][number]
    rows.append({"start_time": start, "ttft": ttft, "itl": itl, "latency": ttft + sum(itl)})
told["timeline"] = len(plot.construct_timeline_data(rows, [0.025, 0.05], ["fast", "middling", "slow"]))
Path(sys.argv[2]).write_text(json.dumps(told, default=float))
