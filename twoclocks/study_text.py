"""Study text: a study's summary -> markdown to paste, text for the terminal, and the values of its page."""

import re
from dataclasses import replace
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from twoclocks.errors import plain
from twoclocks.study_tables import (
    DRIFT,
    Table,
    claims_table,
    differences_tables,
    ends,
    lines_table,
    overview,
    sections,
    sharing_table,
    times,
)
from twoclocks.terminal import to_text
from twoclocks.units import number

IN_SHORT = (
    "ttft.p50", "tpot.mean", "e2e.mean", "batch_latency.mean", "output_throughput", "batch_throughput.mean",
    "saturation.output_throughput", "memory.kv_used_peak", "memory.process_rss_peak",
)  # fmt: skip
"""What of the differences the terminal shows."""
ANSWER_LINES, ANSWER_WIDTH = 4, 100
"""How much of an answer the terminal shows."""


def page_values(summary: dict[str, Any]) -> dict[str, Any]:
    """What templates/study.html is filled with, beside its pictures."""
    judged = {cell["verdict"] for cell in summary["cells"]}
    return {
        "summary": summary,
        "worst": next((level for level in ("INVALID", "SUSPECT", "VALID") if level in judged), "NO FIGURES"),
        "verdicts": verdict_lines(summary),
        "claims": claims_table(summary),
        "sections": sections(summary),
        "answers": [_answer(row) for row in summary["answers"]],
    }


def terminal_text(summary: dict[str, Any]) -> str:
    """What is missing, an overview, the differences, the claims; all tables stand in report.html and report.md."""
    parts: list[RenderableType] = [Text(plain(summary["name"]), style="bold")]
    parts += [Text(plain(line), style="bold yellow") for line in summary["partial"]]
    parts += [Text(plain(line)) for line in verdict_lines(summary)]
    claimed = claims_table(summary)
    optional = [table for table in (lines_table(summary), sharing_table(summary)) if table is not None]
    tables = [overview(summary), *map(narrow, differences_tables(summary, IN_SHORT)), *optional]
    parts += [_rich(table) for table in tables if table.rows]
    if claimed is not None:
        parts += [Text("Claims", style="bold"), *_claim_lines(summary, claimed)]
    parts.append(Text(plain(summary["machine"]), style="dim"))
    return to_text(Group(*(Padding(part, (0, 0, 1, 0)) for part in parts)))


def duel_text(summary: dict[str, Any]) -> str:
    """Prompt by prompt the two answers, cut short, then the differences."""
    parts: list[RenderableType] = [Text(plain(line), style="bold yellow") for line in summary["partial"]]
    for row in summary["answers"]:
        answer = _answer(row)
        lines = [Text(plain(f"{row['prompt_id']}{', ' + row['variant'] if row['variant'] else ''}"), style="bold")]
        for side in answer["sides"]:
            lines.append(Text(f"{plain(side['target'])}: {side['latency']}"))
            lines += [Text(f"    {line}", style="dim") for line in cut(side["text"])]
        lines.append(Text(answer["same"]))
        parts.append(Group(*lines))
    if not summary["answers"]:
        parts.append(
            Text("No answers were kept for a prompt that two targets answered; ask for them: output_text: true")
        )
    parts += [_rich(narrow(table)) for table in differences_tables(summary, IN_SHORT)]
    parts += [Text(plain(line)) for line in verdict_lines(summary)]
    parts.append(Text(plain(summary["machine"]), style="dim"))
    return to_text(Group(*(Padding(part, (0, 0, 1, 0)) for part in parts)))


def markdown(summary: dict[str, Any]) -> str:
    """The report as markdown, to paste: every table, the machine, versions and date."""
    about = " ".join(part for part in (summary["date"], f"twoclocks {summary['twoclocks_version']}.") if part)
    lines = [f"# {md(summary['name'])}", "", md(f"{summary['machine']} {about}"), ""]
    lines += [line for told in summary["partial"] for line in (f"**{md(told)}**", "")]
    lines += [f"- {md(line)}" for line in verdict_lines(summary)] + [""]
    claimed = claims_table(summary)
    if claimed is not None:
        lines += ["## What was claimed, and what was measured here", "", *_md_table(claimed)]
    for title, note, tables in sections(summary):
        if not tables and title != DRIFT:
            continue
        lines += [f"## {title}", "", *([md(note), ""] if note else [])]
        for table in tables:
            lines += [f"### {md(table.title)}", "", *_md_table(table)]
    if summary["answers"]:
        lines += ["## Answers side by side", ""]
        for row in summary["answers"]:
            answer = _answer(row)
            lines += [f"### {md(row['prompt_id'])}", "", md(answer["same"]), ""]
            for side in answer["sides"]:
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", side["text"])), default=0))
                text = "\n".join(plain(line) for line in side["text"].splitlines())
                lines += [f"{md(side['target'])}: {side['latency']}", "", fence + "text", text, fence, ""]
    return "\n".join(lines).rstrip() + "\n"


def md(text: object) -> str:
    """Text that markdown shows as it is, on one line."""
    one_line = " ".join(plain(text).split())
    return re.sub(r"([\\`*_\[\]|<>#~])", r"\\\1", one_line)


def verdict_lines(summary: dict[str, Any]) -> list[str]:
    """How many cells are VALID, SUSPECT, INVALID, and each reason once."""
    judged = [cell["verdict"] for cell in summary["cells"] if cell["verdict"]]
    counts = ", ".join(f"{judged.count(level)} {level}" for level in ("VALID", "SUSPECT", "INVALID") if level in judged)
    lines = [f"Verdicts of the cells: {counts}."] if judged else []
    for row in summary["verdicts"]:
        seen = "; ".join(f"{text} ({', '.join(cells)})" for text, cells in row["seen"].items())
        lines.append(f"{row['level']}: {seen}" + (f"; {row['remedy']}." if row["remedy"] else "."))
    return lines


def cut(text: str) -> list[str]:
    """The beginning of an answer as lines for a terminal, without what would steer it."""
    lines = [plain(line)[:ANSWER_WIDTH] for line in text.splitlines() if line.strip()]
    return lines[:ANSWER_LINES] + (["..."] if len(lines) > ANSWER_LINES else [])


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    """One prompt of two targets, in words: how long each took, and whether the answers are the same."""
    sides = [
        {
            "target": row["targets"][place],
            "text": row["answers"][place],
            "latency": f"{number(row['e2e'][place], 's')} ms, TTFT {number(row['ttft'][place], 's')} ms, "
            f"{number(row['output_tokens'][place], 'tokens')} tokens (means of {row['n'][place]})"
            + (f"; {row['distinct'][place]} different answers" if row["distinct"][place] > 1 else ""),
        }
        for place in (0, 1)
    ]
    at = row["differ_at"]
    same = "The answers are the same." if at is None else f"The answers differ from character {at + 1} on."
    if row["difference"] is not None:
        same += f" {row['targets'][1]} - {row['targets'][0]}: {number(row['difference'], 's')}"
        same += f"{ends(row['difference_low'], row['difference_high'], 's')} ms of E2E"
        same += f", {times(row['ratio'], None, None)}."
    return {"prompt_id": row["prompt_id"], "variant": row["variant"], "sides": sides, "same": same}


def narrow(table: Table) -> Table:
    """A table of differences for a terminal: the ratio alone, since the difference follows from the figures."""
    kept = [column for column, heading in enumerate(table.headings) if heading not in ("difference", "paired")]
    rows = [[row[column] for column in kept] for row in table.rows]
    return replace(table, headings=[table.headings[column] for column in kept], rows=rows, words=(4,))


def _md_table(table: Table) -> list[str]:
    ruler = ["---" if table.is_words(column) else "---:" for column in range(len(table.headings))]
    lines = [f"| {' | '.join(cells)} |" for cells in ([md(heading) for heading in table.headings], ruler)]
    lines += [f"| {' | '.join(map(md, row))} |" for row in table.rows]
    notes = [line for text in (table.note,) if text for line in ("", md(text))]
    notes += [""] if table.definitions else []
    notes += [f"- {md(name)}: {md(meaning.rstrip('.'))}." for name, meaning in table.definitions.items()]
    return [*lines, *notes, ""]


def _rich(table: Table) -> RenderableType:
    made = RichTable(
        title=Text(plain(table.title)), title_style="bold", title_justify="left", show_edge=False, pad_edge=False
    )
    for column, heading in enumerate(table.headings):
        justify: Any = "left" if table.is_words(column) else "right"
        made.add_column(Text(plain(heading)), justify=justify, overflow="fold")
    for row in table.rows:
        made.add_row(*(Text(plain(cell)) for cell in row))
    return made


def _claim_lines(summary: dict[str, Any], table: Table) -> list[RenderableType]:
    """A claim is too much for a row of a terminal's table."""
    lines: list[RenderableType] = []
    for says, published, measured, same, holds, of, over, about in table.rows:
        told = [f"published: {published} ({about})", f"measured here: {measured}"]
        told += [f"of {of}" + (f"; over {over}" if over != "–" else "")]
        judged = [f"same direction: {same}"] if same != "–" else []
        judged += [f"published value in the interval: {holds}"] if holds != "–" else []
        told += ["; ".join(judged)] if judged else []
        lines.append(Group(Text(plain(says)), *(Text(plain(f"    {line}")) for line in told)))
    return lines
