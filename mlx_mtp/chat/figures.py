"""What the drafter saved, in figures: the line after each answer, and the bars of /stats."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_mtp.chat.session import Answer
from mlx_mtp.engine.request import RequestStats

BAR = "█"


def status(answer: Answer, context: int) -> str:
    """One line: tokens, speed, what drafting gave, and how full the context is."""
    stats = answer.stats
    parts = [f"{stats.generation_tokens} tokens", f"{max(stats.generation_tps, 0):.1f} tok/s"]
    parts += [f"mean acceptance length {stats.mean_acceptance_length:.2f}", f"K {drafts_in_use(stats)}"]
    return ", ".join([*parts, f"context {answer.context} of {context}"])


def drafts_in_use(stats: RequestStats) -> int:
    """How many drafts most rounds proposed."""
    return max(stats.rounds_by_length, key=lambda k: stats.rounds_by_length[k], default=0)


def speedup(answers: Sequence[RequestStats]) -> float | None:
    """The time that decoding would have taken without drafts, over what it took; None where that was not measured."""
    measured = [(stats.plain_seconds, (stats.generation_tokens - 1) / stats.generation_tps) for stats in answers
                if stats.plain_seconds and stats.generation_tps > 0 and stats.generation_tokens > 1]
    plain, drafted = sum(plain for plain, _ in measured), sum(seconds for _, seconds in measured)
    return plain / drafted if drafted else None


def report(answers: Sequence[RequestStats], context: int, used: int, width: int) -> str:
    """All answers of this session together; acceptance at each position as bars, in at most `width` columns."""
    tokens, rounds = sum(stats.generation_tokens for stats in answers), sum(stats.rounds for stats in answers)
    drafted, accepted = sum(stats.drafted for stats in answers), sum(stats.accepted for stats in answers)
    prompts, reused = sum(stats.prompt_tokens for stats in answers), sum(stats.reused_tokens for stats in answers)
    lines = [
        f"answers: {len(answers)}, {tokens} tokens in {rounds} rounds",
        f"prompts: {prompts} tokens, {reused} of them reused",
        f"context: {used} of {context} tokens",
    ]
    if answers and answers[-1].ttft:
        lines.append(f"last answer: first token after {answers[-1].ttft:.2f} s")
    if drafted:
        lines.append(f"drafts: {accepted} of {drafted} accepted, mean acceptance length {1 + accepted / rounds:.2f}")
    if (faster := speedup(answers)) is not None:
        lines.append(f"decoding: {faster:.2f}x the speed of plain decoding")
    if drafted:
        lines += ["accepted, by position in the draft:", *(_bar(*row, width) for row in acceptance(answers))]
    return "\n".join(lines)


def acceptance(answers: Sequence[RequestStats]) -> list[tuple[int, float, int]]:
    """(position, share, rounds): in which share of the rounds with so long a draft its token was accepted."""
    rows = []
    for i in range(max((max(stats.rounds_by_length, default=0) for stats in answers), default=0)):
        rounds = sum(count for stats in answers for k, count in stats.rounds_by_length.items() if k > i)
        accepted = sum(stats.accepted_at[i] for stats in answers if i < len(stats.accepted_at))
        rows.append((i + 1, accepted / rounds, rounds))
    return rows


def _bar(position: int, share: float, rounds: int, width: int) -> str:
    label = f"  {position} {share:4.0%} of {rounds:5} "
    return label + BAR * round(share * max(min(width, 80) - len(label), 1))
