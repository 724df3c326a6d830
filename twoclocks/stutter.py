"""Stutter: a Run -> what a reader who watches an answer grow has to bear: stalls, and waiting for words.

Seconds. Of the measured requests that ended ok and got a token.
"""

from typing import Any

import numpy as np

from twoclocks import metrics
from twoclocks.load import Run
from twoclocks.metrics import Floats, definition, distribution

STALLS = (0.25, 0.5, 1.0, 2.0)
"""Gaps of which it is told how many answers have a longer one."""
WORDS_PER_S = 5.0
"""A brisk reader: 300 words of English a minute (238 on average: Brysbaert, J. of Memory and Language 109, 2019)."""
TOKENS_PER_WORD = 4 / 3
"""Assumed where no answers were kept: common tokenizers make some 4 tokens of 3 English words."""
MOST_TOKENS_PER_WORD = 4.0
"""Answers with more tokens between blanks are in no language that parts its words by blanks."""


def stutter(run: Run) -> dict[str, Any] | None:
    """Stalls and the reader's waiting, with their definitions; None where no answer got a token."""
    answers = run.ok[run.ok["ttft"].notna()]
    if answers.empty:
        return None
    longest = answers["itl_max"].fillna(0.0).to_numpy()  # an answer of one chunk has no gap, and so no stall
    tokens_per_word, how = _tokens_per_word(run)
    tokens = metrics.arrived_tokens(run.arrivals, run.requests["output_tokens"].to_numpy())
    waits = metrics.reading_wait(run.arrivals, tokens / tokens_per_word, WORDS_PER_S, len(run.requests))
    waited: Floats = waits[answers.index.to_numpy()]
    row = int(longest.argmax())
    return {
        "answers": len(answers),
        "unit": "s",
        "stalls": [
            {"over": limit, "answers": int((longest > limit).sum()), "share": float((longest > limit).mean())}
            for limit in STALLS
        ],
        "stall_definition": f"Stall = a gap longer than that. {definition(metrics.chunk_gaps)}",
        "longest": float(longest[row]) or None,
        "longest_request_id": str(answers["request_id"].iloc[row]),
        "reading_wait": {"unit": "s", "definition": definition(metrics.reading_wait), **distribution(waited)},
        "reading_waits": {"answers": int((waited > 0).sum()), "share": float((waited > 0).mean())},
        "words_per_s": WORDS_PER_S,
        "tokens_per_word": tokens_per_word,
        "tokens_per_word_from": how,
    }


def _tokens_per_word(run: Run) -> tuple[float, str]:
    """How many tokens a word of the answers has, and how that is known."""
    kept = run.ok[run.ok["output_text"].notna() & (run.ok["output_tokens"] > 0)]
    # the text that is kept has no reasoning and no tool calls, whose tokens the server counts too
    plain = [not any(kind in ("reasoning", "tool") for kind, _ in kinds) for kinds in kept["chunk_kinds"]]
    kept = kept[np.array(plain, dtype=bool)]
    words = sum(len(str(text).split()) for text in kept["output_text"])
    if not words:
        return TOKENS_PER_WORD, (
            "assumed: 4 tokens for 3 words, as of English; no answers of text alone were kept (output_text: true)"
        )
    found = float(kept["output_tokens"].sum()) / words
    if found > MOST_TOKENS_PER_WORD:
        return TOKENS_PER_WORD, (
            f"assumed: 4 tokens for 3 words, as of English; the answers that were kept have {found:.1f} tokens between "
            "blanks, so that their words cannot be counted"
        )
    return found, f"counted in the {len(kept):,} answers that were kept; words are parted by blanks"
