"""Answers written by the target itself: what a drafter will have to predict."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Gemma4ForCausalLM

from .corpus import ChatPair
from .tokenizer import BOS_ID, END_OF_TURN_ID, PAD_ID, STOP_IDS, prompt_text

MAX_NEW_TOKENS = 200
LONGEST_PERIOD = 40


def has_loop(tokens: list[int]) -> bool:
    """Does some stretch of up to 40 tokens occur three times in a row (and for at least 16 tokens beyond its first)?"""
    for period in range(1, LONGEST_PERIOD + 1):
        run = 0
        for index in range(period, len(tokens)):
            run = run + 1 if tokens[index] == tokens[index - period] else 0
            if run >= max(2 * period, 16):
                return True
    return False


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return [BOS_ID, *tokenizer.encode(prompt_text(prompt), add_special_tokens=False).ids]


@torch.no_grad()
def write_answers(
    target: Gemma4ForCausalLM, prompts: list[list[int]], temperature: float = 0.0, batch_size: int = 192
) -> list[list[int]]:
    """The target's answer to each prompt, with its stop token if it stopped; temperature 0 is greedy."""
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        width = max(len(prompts[index]) for index in indices)
        padded = torch.tensor([[PAD_ID] * (width - len(prompts[index])) + prompts[index] for index in indices])
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        written = target.generate(
            padded,
            attention_mask=(padded != PAD_ID).long(),
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=STOP_IDS,
            pad_token_id=PAD_ID,
            **sampling,
        )[:, width:].tolist()
        for index, answer in zip(indices, written, strict=True):
            stop = next((place + 1 for place, token in enumerate(answer) if token in STOP_IDS), len(answer))
            answers[index] = answer[:stop]
    return answers


def choose_prompts(pairs: list[ChatPair], count: int, seed: int = 0) -> list[str]:
    """Half of each kind; half from training, half invented by recombination.

    Answers to training prompts are partly known by heart; a drafter that saw only those would be surprised later.
    """
    chance = random.Random(seed)
    explain = [pair for pair in pairs if pair.kind == "explain"]
    write = [pair for pair in pairs if pair.kind == "write_python"]
    names = [name for pair in explain if (name := pair.prompt.split("`")[1])]
    prompts = [pair.prompt for pair in chance.sample(explain, count // 4) + chance.sample(write, count // 4)]
    while len(prompts) < count:
        owner, other = chance.choice(names).rpartition(".")[0], chance.choice(names).rpartition(".")[2]
        prompts.append(f"Explain `{owner}.{other}`." if owner else f"Explain `{other}`.")
        sentence = chance.choice(explain).answer.split("\n\n")[1].split(". ")[0].rstrip(".")
        prompts.append(f"Write Python: {sentence[:160]}.")
    chance.shuffle(prompts)
    return prompts[:count]


def write_own_text(
    target: Gemma4ForCausalLM, tokenizer: Tokenizer, prompts: list[str], sampled_share: float, path: Path
) -> None:
    """One-turn conversations, mostly greedy, as ``[prompt tokens, answer tokens]``; answers that loop are dropped."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    sampled = int(len(prompts) * sampled_share)
    torch.manual_seed(0)
    answers = write_answers(target, encoded[sampled:]) + write_answers(target, encoded[:sampled], temperature=0.7)
    pairs = zip(encoded[sampled:] + encoded[:sampled], answers, strict=True)
    kept = [[prompt, answer] for prompt, answer in pairs if len(answer) > 8 and not has_loop(answer)]
    stopped = sum(answer[-1] == END_OF_TURN_ID for _, answer in kept)
    print(f"own text: {len(prompts)} answers, {len(kept)} without loops, {stopped} end by themselves", flush=True)
    path.write_text(json.dumps(kept))
