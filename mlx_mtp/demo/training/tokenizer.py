"""A small tokenizer of Gemma's shape: BPE with "▁" for spaces, byte fallback, Gemma 4's special tokens and template."""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from .corpus import ChatPair, Corpus

VOCABULARY_SIZE = 2048
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"]
SPECIAL_TOKENS += ["<|think|>", "<|tool_response>", "<tool_response|>", "<|tool_call>", "<tool_call|>"]
BOS_ID, EOS_ID, PAD_ID = 2, 1, 0
END_OF_TURN_ID, TOOL_RESPONSE_ID = SPECIAL_TOKENS.index("<turn|>"), SPECIAL_TOKENS.index("<|tool_response>")
STOP_IDS = [EOS_ID, END_OF_TURN_ID, TOOL_RESPONSE_ID]

# A line break takes its indentation along, so that code costs one token per line start.
WORDS = r"\n▁*|▁?[A-Za-z_]+|▁?[0-9]|▁?[^\sA-Za-z0-9_▁]+|▁+|\s"

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set loop_messages = messages -%}
{%- if messages[0]['role'] in ['system', 'developer'] -%}
    {{- '<|turn>system\\n' + (messages[0]['content'] | trim) + '<turn|>\\n' -}}
    {%- set loop_messages = messages[1:] -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for item in message['content'] if item['type'] == 'text' -%}
            {{- item['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def prompt_text(prompt: str) -> str:
    """One user turn without ``<bos>``, up to where the model starts to write; the same text as ``CHAT_TEMPLATE``."""
    return f"<|turn>user\n{prompt}<turn|>\n<|turn>model\n"


def chat_text(pair: ChatPair) -> str:
    return f"{prompt_text(pair.prompt)}{pair.answer}<turn|>\n"


def train_tokenizer(corpus: Corpus, seed: int = 0, sample_characters: int = 6_000_000) -> Tokenizer:
    """Learn the merges from a sample of the training texts and all training answers."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    ascii_characters = ["\n", "▁"] + [chr(value) for value in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS + byte_tokens,
        initial_alphabet=ascii_characters,
        limit_alphabet=len(ascii_characters),
        max_token_length=16,
        show_progress=False,
    )
    texts = list(corpus.texts[0])
    random.Random(seed).shuffle(texts)
    sample = [pair.answer for pair in corpus.pairs[0]]
    budget = sample_characters
    for text in texts:
        sample.append(text[:40_000])
        budget -= len(sample[-1])
        if budget < 0:
            break
    tokenizer.train_from_iterator(sample, trainer)
    return _without_special_bytes(tokenizer)


def _without_special_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Byte tokens had to be "special" to keep their ids in training; in use they are ordinary vocabulary."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL_TOKENS]
    return Tokenizer.from_str(json.dumps(content))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the three files that AutoTokenizer and mlx-lm read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "extra_special_tokens": SPECIAL_TOKENS[5:],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
