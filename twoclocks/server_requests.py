"""One request as a server told it: a line of server_requests.jsonl, or what a log says of a request.

Whatever the source (a span, a log line), its durations come into the same fields, in seconds; what each of them means
there stands in clocks.CLOCKS under the names of source and server. Knows no source.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from twoclocks.errors import RunFolderError


class ServerRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one span or log line told of one request. Durations in seconds; None where it does not say."""

    source: str  # otlp or log
    server: str  # whose words these are: vllm, tgi, sglang, transformers, or the name of a stage
    at: float | None = None  # when it came to us, seconds on the run's clock
    request_id: str | None = None  # ours, without what the server put around it
    trace_id: str | None = None  # 32 hex digits
    choice: int | None = None  # of a child request, with n > 1
    ttft: float | None = None
    validation: float | None = None
    queue: float | None = None
    prefill: float | None = None
    decode: float | None = None
    inference: float | None = None  # prefill + decode where a server tells them only together
    time_per_token: float | None = None
    e2e: float | None = None
    prompt_tokens: int | None = None  # by the server's count
    output_tokens: int | None = None  # by the server's count
    cached_tokens: int | None = None  # prompt tokens that it had in its prefix cache
    finish_reason: str | None = None  # in the server's words
    told: dict[str, Any] = {}  # the rest, verbatim


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(ServerRequest)


def encode_server_request(request: ServerRequest) -> bytes:
    """One line of JSON, newline included."""
    return _encoder.encode(request) + b"\n"


def read_server_requests(path: Path) -> Iterator[ServerRequest]:
    """The lines of a server_requests.jsonl; nothing if the file is not there. A cut last line is left out.

    Raises RunFolderError for any other line that cannot be read.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield _decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise RunFolderError(f"{path} line {number} is no request of a server: {error}") from None
