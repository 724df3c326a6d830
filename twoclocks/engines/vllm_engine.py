"""vLLM without its HTTP server: requests into LLMEngine, step after step, and a time for each step's tokens."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asks import Answer, Ask, encode, one_line  # beside this file, which is started by path
from pytorch import allocator_peaks, device_name, parameter_bytes


class Vllm:
    """A loaded engine, whose scheduler runs in this process. ``flags`` are those of `vllm serve`."""

    kind = "vllm"

    def __init__(self, model: Path | str, flags: Sequence[str] = ()) -> None:
        """Raises ImportError where vLLM is missing, SystemExit for a flag it does not know, and what vLLM raises."""
        os.environ.setdefault(
            "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
        )  # the scheduler here, where its blocks can be counted
        import torch
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self._torch, self._vllm = torch, vllm
        ours = [] if torch.cuda.is_available() else ["--dtype", "float32", "--enforce-eager"]
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="start.flags"))
        arguments = EngineArgs.from_cli_args(parser.parse_args(["--model", str(model), *ours, *flags]))
        arguments.disable_log_stats = True
        self._loaded_bytes = _watch_loading()
        self.engine = vllm.LLMEngine.from_engine_args(arguments)
        config = self.engine.vllm_config
        self.context: int | None = config.model_config.max_model_len
        self.tokenizer = self.engine.get_tokenizer()
        self.device = str(config.device_config.device_type)
        self._dtype = str(config.model_config.dtype).removeprefix("torch.")
        self._most_blocks: int | None = None
        self._watch_blocks()

    def encode(self, ask: Ask) -> list[int]:
        """Ids of the prompt's tokens. Raises Refused."""
        return encode(self.tokenizer, ask, self.context)

    def generate(self, asks: Sequence[Ask], prompts: Sequence[list[int]]) -> list[Answer]:
        """The answers, in order. Each ends with the step that brought its last token."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        answers = {ask.id: Answer(ask.id, prompt_tokens=len(ids)) for ask, ids in zip(asks, prompts, strict=True)}
        for ask, ids in zip(asks, prompts, strict=True):
            sampling = ask.sampling
            params = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
                max_tokens=ask.max_tokens,
                ignore_eos=ask.ignore_eos,
                output_kind=RequestOutputKind.DELTA,
            )
            try:
                self.engine.add_request(ask.id, {"prompt_token_ids": ids}, params)
            except ValueError as error:  # what vLLM itself refuses
                answers[ask.id].error, answers[ask.id].error_kind = one_line(error), "refused"
                answers[ask.id].ended_ns = time.monotonic_ns()
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.monotonic_ns()
            for output in outputs:
                answer, part = answers[output.request_id], output.outputs[0]
                if part.token_ids:
                    answer.token_ids += part.token_ids
                    answer.steps.append((now, len(part.token_ids)))
                answer.text += part.text
                if output.num_cached_tokens is not None:
                    answer.cached_tokens = output.num_cached_tokens
                if output.finished:
                    answer.finish_reason, answer.ended_ns = part.finish_reason, now
        return list(answers.values())

    def _watch_blocks(self) -> None:
        """Count the blocks in use whenever the scheduler has just given out those of a step: then they are the most."""
        scheduler = getattr(getattr(self.engine.engine_core, "engine_core", None), "scheduler", None)
        manager = getattr(scheduler, "kv_cache_manager", None)
        pool = getattr(manager, "block_pool", None)
        if scheduler is None or pool is None:
            return  # another version, or an engine in a process of its own: then the peak is not known, and not told
        schedule, self._most_blocks = scheduler.schedule, 0

        def counted(*arguments: Any, **named: Any) -> Any:
            output = schedule(*arguments, **named)
            used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is a placeholder that nobody gets
            self._most_blocks = max(self._most_blocks or 0, used)
            return output

        scheduler.schedule = counted

    def forget_peaks(self) -> None:
        """From now on peaks are counted anew."""
        if self._most_blocks is not None:
            self._most_blocks = 0
        if self.device == "cuda" and self._torch.cuda.is_initialized():
            self._torch.cuda.reset_peak_memory_stats()

    def memory(self) -> list[dict[str, Any]]:
        """What can be told of the memory, measured in the workers and in the scheduler."""
        how = "sum over the model's parameters of elements x bytes of one; tied ones count once"
        if self._loaded_bytes:  # the workers are this process
            weights, how = sum(self._loaded_bytes), f"{how}; as loaded, before vLLM packs them for the processor"
        else:
            weights, how = sum(self.engine.collective_rpc(_weight_bytes)), f"{how}; over all workers"
        rows = [{"name": "weights", "bytes": weights, "source": "torch", "definition": how}]
        reserved, blocks = sum(self.engine.collective_rpc(_cache_bytes)), self.blocks
        if blocks:
            rows.append(
                {
                    "name": "kv_reserved",
                    "bytes": reserved,
                    "source": "vLLM's workers",
                    "definition": f"bytes of the tensors that hold the KV cache, {blocks:,} blocks of "
                    f"{reserved // blocks:,} bytes",
                }
            )
            if self._most_blocks is not None:
                rows.append(
                    {
                        "name": "kv_used_peak",
                        "bytes": self._most_blocks * (reserved // blocks),
                        "source": "vLLM's scheduler",
                        "definition": f"{self._most_blocks:,} blocks, in use at the fullest step while measuring, x "
                        "bytes of one; a block that is kept only in case its prefix comes again is not in use",
                    }
                )
        return rows + allocator_peaks(self._torch, self.device)

    @property
    def blocks(self) -> int | None:
        """Blocks of the KV cache, the placeholder among them."""
        blocks: int | None = self.engine.vllm_config.cache_config.num_gpu_blocks
        return blocks

    def told(self) -> dict[str, Any]:
        """Versions and settings, for run.json."""
        return {
            "server_version": self._vllm.__version__,
            "versions": {"vllm": self._vllm.__version__, "torch": self._torch.__version__},
            "device": device_name(self._torch, self.device),
            "dtype": self._dtype,
            "threads": max(self.engine.collective_rpc(_threads)),
            "context": self.context,
        }


def _watch_loading() -> list[int]:
    """Bytes of the parameters of each model that is loaded in this process from now on; none where it is in another.

    On a CPU vLLM then packs most of them where nobody can count them.
    """
    from vllm.model_executor.model_loader import base_loader

    found: list[int] = []
    pack = base_loader.process_weights_after_loading

    def counted(model: Any, *arguments: Any, **named: Any) -> Any:
        found.append(parameter_bytes(model))
        return pack(model, *arguments, **named)

    base_loader.process_weights_after_loading = counted
    return found


def _weight_bytes(worker: Any) -> int:
    return parameter_bytes(worker.get_model())


def _cache_bytes(worker: Any) -> int:
    seen = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in _tensors(worker.model_runner.kv_caches)
    }
    return sum(seen.values())


def _tensors(tree: Any) -> list[Any]:
    return [one for part in tree for one in _tensors(part)] if isinstance(tree, list | tuple) else [tree]


def _threads(_worker: Any) -> int:
    import torch

    return int(torch.get_num_threads())
