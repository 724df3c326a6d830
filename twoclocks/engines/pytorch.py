"""Plain PyTorch: a model of transformers, its `generate` as it stands, and a time for each token.

A batch is static: prompts are padded on the left to the longest, and the call returns with the longest answer.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asks import Answer, Ask, Refused, encode  # beside this file, which is started by path

OnToken = Callable[[int, int, int], bool]
"""Row of the batch, id of the token, when; answers whether more of this row is wanted."""


class PyTorch:
    """A loaded model. Raises ImportError, OSError or ValueError where it cannot be loaded."""

    kind = "pytorch"

    def __init__(
        self, model: Path | str, *, device: str = "auto", dtype: str = "auto", threads: int = 0, attention: str = "auto"
    ) -> None:
        """``dtype`` auto: float32 on a CPU, else what the model was saved in. ``threads`` 0: as torch chooses."""
        import torch
        import transformers

        self._torch, self._transformers = torch, transformers
        if threads:
            torch.set_num_threads(threads)
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        asked = ("float32" if self.device == "cpu" else "auto") if dtype == "auto" else dtype
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(model), padding_side="left")
        more = {} if attention == "auto" else {"attn_implementation": attention}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype=asked, **more)
        self.model.to(self.device).eval()
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or [])
        pad = self.tokenizer.pad_token_id
        self._pad = pad if pad is not None else next(iter(sorted(self.ends)), 0)
        # ends and lengths are each request's own, so they are watched here; what the model's file says of sampling is
        # left out, so that greedy means greedy
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=self._pad, use_cache=True)
        self.context: int | None = getattr(self.model.config, "max_position_embeddings", None)

    def encode(self, ask: Ask) -> list[int]:
        """Ids of the prompt's tokens. Raises Refused."""
        return encode(self.tokenizer, ask, self.context)

    def generate(
        self, asks: Sequence[Ask], prompts: Sequence[list[int]], on_token: OnToken | None = None
    ) -> list[Answer]:
        """The answers, in order; all share one Sampling. The call returns when the longest has ended.

        Raises Refused for mixed sampling, and whatever torch raises when memory is short.
        """
        torch, sampling = self._torch, asks[0].sampling
        if any(ask.sampling != sampling for ask in asks):
            raise Refused("requests of one batch ask for different sampling; `generate` takes one for all")
        width = max(map(len, prompts))
        ids = torch.full((len(asks), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
            mask[row, width - len(prompt) :] = 1
        answers = [Answer(ask.id, prompt_tokens=len(prompt)) for ask, prompt in zip(asks, prompts, strict=True)]
        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            how["top_k"] = sampling.top_k
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
        self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=max(ask.max_tokens for ask in asks),
            stopping_criteria=self._transformers.StoppingCriteriaList([self._watch(asks, answers, on_token)]),
            **how,
        )
        for answer in answers:
            ended = answer.finish_reason == "stop"
            kept = answer.token_ids[:-1] if ended else answer.token_ids
            answer.text = self.tokenizer.decode(kept, skip_special_tokens=True)
        now = time.monotonic_ns()
        for answer in answers:
            answer.ended_ns = now
        return answers

    def _watch(self, asks: Sequence[Ask], answers: Sequence[Answer], on_token: OnToken | None) -> Callable[..., Any]:
        """What `generate` calls after each step, to learn which rows have ended."""
        torch, ended = self._torch, [False] * len(asks)

        def step(input_ids: Any, _scores: Any, **_: Any) -> Any:
            tokens = input_ids[:, -1].tolist()  # waits for the device: the stamp is of tokens that are there
            now = time.monotonic_ns()
            for row, token in enumerate(tokens):
                if ended[row]:
                    continue  # its row goes on until the longest has ended; what it makes is thrown away
                ask, answer = asks[row], answers[row]
                answer.token_ids.append(token)
                answer.steps.append((now, 1))
                if token in self.ends and not ask.ignore_eos:
                    answer.finish_reason = "stop"
                elif len(answer.token_ids) >= ask.max_tokens:
                    answer.finish_reason = "length"
                wanted = on_token is None or on_token(row, token, now)
                ended[row] = answer.finish_reason is not None or not wanted
            return torch.tensor(ended, device=input_ids.device)

        return step

    def forget_peaks(self) -> None:
        """From now on peaks are counted anew."""
        if self.device.startswith("cuda"):
            self._torch.cuda.reset_peak_memory_stats()

    def memory(self) -> list[dict[str, Any]]:
        """What can be told of the memory, measured."""
        rows = [
            {
                "name": "weights",
                "bytes": parameter_bytes(self.model),
                "source": "torch",
                "definition": "sum over the model's parameters of elements x bytes of one; tied ones count once",
            }
        ]
        return rows + allocator_peaks(self._torch, self.device)

    def told(self) -> dict[str, Any]:
        """Versions and settings, for run.json."""
        return {
            "server_version": self._transformers.__version__,
            "versions": {"transformers": self._transformers.__version__, "torch": self._torch.__version__},
            "device": device_name(self._torch, self.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": self._torch.get_num_threads(),
            "context": self.context,
        }


def parameter_bytes(model: Any) -> int:
    """Of a model of torch; parameters that are tied to each other count once."""
    return sum(one.numel() * one.element_size() for one in model.parameters())


def allocator_peaks(torch: Any, device: str) -> list[dict[str, Any]]:
    """Peaks of torch's CUDA allocator of this process since they were last forgotten; none on a CPU."""
    if not device.startswith("cuda") or not torch.cuda.is_initialized():
        return []
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return [
        {
            "name": "allocator_peak",
            "bytes": allocated,
            "source": "torch.cuda.max_memory_allocated",
            "definition": "most bytes in tensors at one time while measuring, in the engine's process",
        },
        {
            "name": "allocator_reserved_peak",
            "bytes": reserved,
            "source": "torch.cuda.max_memory_reserved",
            "definition": "most bytes that torch's allocator held at one time while measuring, in use or not",
        },
    ]


def device_name(torch: Any, device: str) -> str:
    """``cpu``, or the GPU's name behind its device."""
    return f"{device} ({torch.cuda.get_device_name()})" if device.startswith("cuda") else device


def pytorch_flags(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The flags of kind pytorch."""
    parser = parser or argparse.ArgumentParser(prog="start.flags", add_help=False)
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", help="auto (float32 on a CPU, else the model's own), bfloat16, ...")
    parser.add_argument("--threads", type=int, default=0, help="of torch on a CPU (default: as torch chooses)")
    parser.add_argument("--attention", default="auto", help="eager, sdpa, flash_attention_2; else its own choice")
    return parser
