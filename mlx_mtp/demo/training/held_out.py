"""Held-out prompts: choosing them, and measuring a finished pair on them."""

import json
import zlib
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM

from .corpus import ChatPair
from .own_text import encode_prompt, has_loop, write_answers
from .tokenizer import STOP_IDS
from .walk import WalkStatistics, greedy_walk

CANDIDATES_PER_KIND = 120
PROMPTS_PER_KIND = 30
UNENDING_PER_KIND = 2


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def ends_well(answer: list[int]) -> bool:
    return bool(answer) and answer[-1] in STOP_IDS and not has_loop(answer)


def choose_prompts(target: Gemma4ForCausalLM, tokenizer: Tokenizer, pairs: list[ChatPair]) -> list[dict[str, Any]]:
    """30 prompts of each kind, about 2 of which do not end by themselves.

    The order is by checksum and the choice looks at the target's text alone, never at a drafter.
    """
    chosen: list[dict[str, Any]] = []
    for kind in ("explain", "write_python"):
        prompts = sorted((pair.prompt for pair in pairs if pair.kind == kind), key=_checksum)[:CANDIDATES_PER_KIND]
        answers = write_answers(target, [encode_prompt(tokenizer, prompt) for prompt in prompts])
        ending = [prompt for prompt, answer in zip(prompts, answers, strict=True) if ends_well(answer)]
        unending = [prompt for prompt in prompts if prompt not in set(ending)]
        print(f"{kind}: {len(ending)} of {len(prompts)} held-out prompts end by themselves without a loop")
        kept = ending[: PROMPTS_PER_KIND - UNENDING_PER_KIND] + unending[:UNENDING_PER_KIND]
        # Near-ties fall differently in a batch: what is written down is measured one prompt at a time.
        alone = write_answers(target, [encode_prompt(tokenizer, prompt) for prompt in kept], batch_size=1)
        for prompt, answer in zip(kept, alone, strict=True):
            chosen.append({"kind": kind, "prompt": prompt, "stops": ends_well(answer)})
    return chosen


def measure_pair(
    target: Gemma4ForCausalLM,
    assistant: Gemma4AssistantForCausalLM,
    tokenizer: Tokenizer,
    prompts: list[dict[str, Any]],
    drafts: int,
) -> dict[str, WalkStatistics]:
    """Walk over the answers that end by themselves and do not loop; statistics by kind and for all."""
    statistics = {kind: WalkStatistics(drafts) for kind in ("explain", "write_python", "all")}
    encoded = [encode_prompt(tokenizer, entry["prompt"]) for entry in prompts]
    counted = 0
    for entry, prompt, answer in zip(prompts, encoded, write_answers(target, encoded, batch_size=1), strict=True):
        if not ends_well(answer):
            continue
        counted += 1
        for kind in (entry["kind"], "all"):
            greedy_walk(target, assistant, prompt, answer, statistics[kind])
    print(f"{counted} of {len(prompts)} answers end by themselves without a loop")
    return statistics


def load_pair(folder: Path, name: str) -> tuple[Gemma4ForCausalLM, Gemma4AssistantForCausalLM, Tokenizer]:
    """The exported pair through transformers, in float32; fails on missing or unexpected tensors."""
    from transformers import Gemma4ForConditionalGeneration

    models = []
    for model_class, path in (
        (Gemma4ForConditionalGeneration, folder / name),
        (Gemma4AssistantForCausalLM, folder / f"{name}-assistant"),
    ):
        model, information = model_class.from_pretrained(path, dtype="float32", output_loading_info=True)
        problems = {key: value for key, value in information.items() if value}
        if problems:
            raise ValueError(f"{path} does not load cleanly: {problems}")
        models.append(model.eval())
    full, assistant = models
    target = Gemma4ForCausalLM(full.config.text_config).float().eval()
    target.model.load_state_dict(full.model.language_model.state_dict())
    target.tie_weights()
    return target, assistant, Tokenizer.from_file(str(folder / name / "tokenizer.json"))


def save_prompts(prompts: list[dict[str, Any]], path: Path) -> None:
    lines = ",\n".join("  " + json.dumps(entry) for entry in prompts)
    path.write_text(f"[\n{lines}\n]\n")
