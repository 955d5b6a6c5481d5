"""A report as one self-contained HTML page: SVG charts, light and dark, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from llava_edge.bench.compare import compare, condition_differences, stages
from llava_edge.bench.records import DECODE, FIRST_TOKEN, PARTS, QUESTIONS, WARM, Report, Run
from llava_edge.bench.table import LIMIT_NAMES

WIDTH, LABEL_HEIGHT, BAR_HEIGHT, BAR_GAP = 960, 18, 18, 10  # pixels

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #ffffff; --line: #d5d9de; --dim: #5b6470;
  --c0: #3b6fb6; --c1: #7aa6d8; --c2: #d9822b; --c3: #f0b86c; --c4: #5a9e6f; --c5: #a8acb3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --page: #15181c; --line: #343a42; --dim: #98a2ae;
    --c0: #5b8fd6; --c1: #9cc2ec; --c2: #e09a4f; --c3: #f5cd92; --c4: #79bd8e; --c5: #737982; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem .15rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td.n { text-align: right; } .dim { color: var(--dim); } svg { max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--text); }
""" + "\n".join(f".c{number} {{ fill: var(--c{number}); background: var(--c{number}); }}" for number in range(6))

Bar = tuple[str, Sequence[float]]  # label, one value for each colour


def page(reports: Mapping[str, Report]) -> str:
    """Render the page. The first report is the new one; the others are shown beside it and compared with it."""
    runs = [(name, run) for name, report in reports.items() for run in report.runs if not run.error]
    new_report = next(iter(reports.values()))
    body = [f"<h1>llava-edge bench</h1><p class=dim>{_conditions(new_report)}</p>", *_limits(new_report)]
    body += _chart("Until the first token, warm process, new picture (ms)", [*PARTS, "rest"], _first_token_bars(runs))
    body += _chart("Each token after that (ms)", [DECODE], _decode_bars(runs))
    body += _chart("Memory at the end (MB)", ["private", "of files"], _memory_bars(runs))
    for name, report in list(reports.items())[1:]:
        body += _comparison_table(name, report, new_report)
    body += [part for name, report in reports.items() for run in report.runs for part in _stage_table(name, run)]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>llava-edge bench</title><style>{_STYLE}</style>"
    return f"{head}\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"


def _conditions(report: Report) -> str:
    machine, settings = report.machine, report.settings
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    settings_text = f"{settings['repeats']} repeats, picture {settings['image']}, prompt “{settings['prompt']}”"
    return escape(f"{report.created}. {machine['processor']} ({' '.join(machine['features'])}), {machine['system']}. "
                  f"{versions}. {settings_text}.")  # fmt: skip


def _limits(report: Report) -> list[str]:
    rows = [
        [
            f"{threads}",
            f"{limits['int8_ops'] / 1e12:.2f}",
            f"{limits['fp32_ops'] / 1e12:.2f}",
            f"{limits['read_bytes'] / 1e9:.1f}",
        ]
        for threads, limits in report.limits.items()
        if limits is not None
    ]
    notes = [
        f"<p>Limits with threads={escape(threads)} were not measured. {escape(error)}</p>"
        for threads, error in report.limits_errors.items()
    ]
    headings = ["threads", "8-bit products, T operations/s", "float32 products, T operations/s", "memory reads, GB/s"]
    table = [_table(headings, rows)] if rows else []
    return ["<h2>Limits of the machine, reached in this run</h2>", *table, *notes] if table or notes else []


def _first_token_bars(runs: Sequence[tuple[str, Run]]) -> list[Bar]:
    bars: list[Bar] = []
    for name, run in runs:
        warm = run.questions[WARM].stages
        values = [warm[part].median for part in PARTS]
        rest = max(0.0, warm[FIRST_TOKEN].median - sum(values))
        bars.append((_name(name, run), [*values, rest]))
    return bars


def _decode_bars(runs: Sequence[tuple[str, Run]]) -> list[Bar]:
    decode_stages = [(name, run, run.questions[WARM].stages.get(DECODE)) for name, run in runs]
    return [(_name(name, run), [stage.median]) for name, run, stage in decode_stages if stage]


def _memory_bars(runs: Sequence[tuple[str, Run]]) -> list[Bar]:
    return [
        (_name(name, run), [run.memory["private"] / 1e6, run.memory["file"] / 1e6])
        for name, run in runs
        if {"private", "file"} <= set(run.memory)
    ]


def _chart(title: str, legend: Sequence[str], bars: Sequence[Bar]) -> list[str]:
    """Horizontal stacked bars on one scale, below their labels, which may be long, and followed by their sums."""
    if not bars:
        return []
    scale = (WIDTH - 90) / max(max(sum(values) for _, values in bars), 1e-9)
    shapes, spoken = [], [title]
    for row, (label, values) in enumerate(bars):
        y, x = row * (LABEL_HEIGHT + BAR_HEIGHT + BAR_GAP), 0.0
        spoken.append(f"{label}: " + ", ".join(map("{} {:,.1f}".format, legend, values)))
        shapes.append(f"<text x=0 y={y + 13}>{escape(label)}</text>")
        y += LABEL_HEIGHT
        for number, (value, part) in enumerate(zip(values, legend, strict=True)):
            hint = f"<title>{escape(part)}: {value:,.1f}</title>"
            shapes.append(
                f"<rect class=c{number} x={x:.1f} y={y} width={value * scale:.1f} height={BAR_HEIGHT}>{hint}</rect>"
            )
            x += value * scale
        shapes.append(f"<text x={x + 6:.1f} y={y + 13}>{sum(values):,.1f}</text>")
    keys = " ".join(f"<span class=c{number}>&emsp;</span> {escape(part)}&ensp;" for number, part in enumerate(legend))
    height = len(bars) * (LABEL_HEIGHT + BAR_HEIGHT + BAR_GAP)
    size = f'viewBox="0 0 {WIDTH} {height}" width={WIDTH} height={height}'
    name = escape("; ".join(spoken))  # for those who do not see it: what is in an image is not read out
    drawing = f'<svg {size} role=img aria-label="{name}">{"".join(shapes)}</svg>'
    return [f"<h2>{escape(title)}</h2>", f"<p>{keys}</p>" if len(legend) > 1 else "", drawing]


def _comparison_table(name: str, old: Report, new: Report) -> list[str]:
    rows = [
        [item.label, f"{item.question} {item.stage}".strip(), f"{item.old:.1f}", f"{item.new:.1f}", f"{item.ratio:.2f}",
         f"{item.low:.2f} to {item.high:.2f}", item.verdict]
        for item in compare(old, new)
    ]  # fmt: skip
    headings = ["configuration", "stage", "old ms", "new ms", "times faster", "range", "verdict"]
    notes = [f"<p class=dim>{escape(condition)}</p>" for condition in condition_differences(old, new)]
    return [f"<h2>Compared with {escape(name)}</h2>", *notes, _table(headings, rows)]


def _stage_table(name: str, run: Run) -> list[str]:
    title = f"<h2>{escape(_name(name, run))}</h2>"
    if run.error:
        return [title, f"<p>Failed. {escape(run.error)}</p>"]
    rows = []
    for (question, stage_name), stage in stages(run):
        share = "" if stage.share is None else f"{stage.share:.1%} of {LIMIT_NAMES[stage.limit]}"
        cells = [f"{stage.median:.1f}", f"{stage.low:.1f}", f"{stage.high:.1f}"]
        rows.append([question, stage_name, *cells, share])
    caches = ", ".join(f"{question} {'/'.join(dict.fromkeys(run.questions[question].cache))}" for question in QUESTIONS)
    warm = run.questions[WARM]
    facts = f"{warm.prompt_tokens} positions, {warm.image_tokens} of them image, {warm.completion_tokens} answered; "
    facts += f"cache: {caches}; bundle {run.configuration.identity[:12]}"
    return [title, f"<p class=dim>{escape(facts)}</p>",
            _table(["question", "stage", "median ms", "low", "high", "share of the limit"], rows)]  # fmt: skip


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heading_cells = "".join(f"<th>{escape(head)}</th>" for head in headings)
    lines = [
        "".join(f"<td{' class=n' if _is_number(cell) else ''}>{escape(cell)}</td>" for cell in row) for row in rows
    ]
    return f"<table><tr>{heading_cells}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _name(name: str, run: Run) -> str:
    return f"{name}: {run.configuration.label}"
