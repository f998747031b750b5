"""Whisper tiny.en (4 + 4 layers of 384, 37.8 M parameters): word error rate on Asterisk's prompts.

They are read by one speaker at 8 kHz. Decoding is greedy, without timestamps, with the suppressed tokens of the
package. The outputs that are compared beside it are the logits of the tokens that the float32 model wrote, so that
one different token does not change all that follow. Calibrated on the longest recordings that are not evaluated, with
what the float32 model wrote. Needs `scipy`.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quality import assets
from quality.subject import Scores, Subject
from quality.whisper_model import END, NO_TIMESTAMPS, START, load_model

_BATCH = 8
_MOST_TOKENS = 120
#: Of a usable reference: no notes, digits or ellipses.
_UNFIT = re.compile(r"[\[\(<]|\d|\.\.\.")
_SECONDS = 29.0


def subject(test: int = 60, calibration: int = 48) -> Subject:
    """The model, evaluated on `test` recordings of five words or more, at most 132, drawn with seed 0."""
    folder = assets.wheel_files(assets.WHISPER)
    model = load_model(folder / "model.bin")
    listener = Listener(folder)
    texts, files = _recordings()
    usable = [n for n in sorted(files) if n in texts and len(words(texts[n])) >= 5 and not _UNFIT.search(texts[n])]
    random.Random(0).shuffle(usable)
    evaluated = usable[:test]
    others = [
        n
        for n in sorted(files)
        if n in texts and n not in evaluated and words(texts[n]) and _length(files[n]) < _SECONDS
    ]
    longest = sorted(others, key=lambda n: -_length(files[n]))[:calibration]
    sound = [listener.features([files[n] for n in evaluated[i : i + _BATCH]]) for i in range(0, len(evaluated), _BATCH)]
    references = [words(texts[n]) for n in evaluated]
    written: list[list[int]] = []  # by the model that is evaluated first, in float32

    @torch.inference_mode()
    def evaluate(evaluated: Any) -> Scores:
        errors, logits, first = 0, [], not written
        for i, batch in enumerate(sound):
            encoded = evaluated.model.encoder(batch)
            found = listener.write(evaluated, encoded)
            if first:
                written.extend(found)
            part = slice(i * _BATCH, i * _BATCH + len(batch))
            for tokens, reference in zip(found, references[part], strict=True):
                errors += edit_distance(reference, words(listener.text(tokens)))
            logits.append(_logits(evaluated, encoded, written[part]))
        return Scores(errors / sum(map(len, references)), torch.cat(logits))

    samples = [_sample(listener, model, files[n]) for n in longest]
    return Subject(
        name="Whisper tiny.en",
        model=model,
        calibration=samples,
        evaluate=evaluate,
        metric="word error rate",
        counted=f"{len(evaluated)} recordings, {sum(map(len, references))} words; calibration {len(samples)} others",
        higher=False,
        change="points",
        outputs="logits",
    )


class Listener:
    """Sound to features, features to tokens, tokens to text."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import WhisperFeatureExtractor

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._extract = WhisperFeatureExtractor()
        config = json.loads((folder / "config.json").read_text())
        self._never: list[int] = config["suppress_ids"]
        self._not_first: list[int] = config["suppress_ids_begin"]

    def features(self, files: list[Path]) -> torch.Tensor:
        """[n, 80, 3000]: log-mel of 30 s."""
        from scipy.signal import resample_poly

        sounds = []
        for file in files:
            with wave.open(str(file)) as recording:
                rate = recording.getframerate()
                values = (
                    np.frombuffer(recording.readframes(recording.getnframes()), np.int16).astype(np.float32) / 2**15
                )
            sounds.append(resample_poly(values, 16000 // rate, 1).astype(np.float32))
        found: torch.Tensor = self._extract(sounds, sampling_rate=16000, return_tensors="pt").input_features
        return found

    @torch.inference_mode()
    def write(self, model: Any, encoded: Any) -> list[list[int]]:
        """The tokens of each recording, greedily, without those at the beginning and the end, from what was encoded."""
        n = len(encoded.last_hidden_state)
        tokens = torch.tensor([[START, NO_TIMESTAMPS]]).repeat(n, 1)
        new, past, done = tokens, None, torch.zeros(n, dtype=torch.bool)
        for step in range(_MOST_TOKENS):
            out = model(encoder_outputs=encoded, decoder_input_ids=new, past_key_values=past, use_cache=True)
            past, scores = out.past_key_values, out.logits[:, -1].clone()
            scores[:, self._never] = -torch.inf
            scores[:, START:] = -torch.inf
            if step == 0:
                scores[:, self._not_first] = -torch.inf
            new = scores.argmax(-1, keepdim=True).masked_fill(done[:, None], END)
            tokens, done = torch.cat([tokens, new], 1), done | (new[:, 0] == END)
            if bool(done.all()):
                break
        return [[token for token in row if token != END] for row in tokens[:, 2:].tolist()]

    def text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens)
        return text


def words(text: str) -> list[str]:
    """Lower case, hyphens are spaces, no notes in brackets and no punctuation but the apostrophe."""
    plain = re.sub(r"\[.*?\]|\(.*?\)", "", text.lower()).replace("-", " ")
    return re.sub(r"[^a-z0-9' ]", " ", plain).split()


def edit_distance(reference: list[str], hypothesis: list[str]) -> int:
    """Substitutions, insertions and deletions."""
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, 1):
        before, row = row, [i]
        for j, word in enumerate(hypothesis, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (word != expected)))
    return row[-1]


def _logits(model: Any, encoded: Any, written: list[list[int]]) -> torch.Tensor:
    """[tokens, vocabulary]: of each token that was written and of the end after it."""
    longest = max(map(len, written))
    ids = torch.tensor([[START, NO_TIMESTAMPS, *row, *[END] * (longest - len(row))] for row in written])
    logits = model(encoder_outputs=encoded, decoder_input_ids=ids).logits
    return torch.cat([row[1 : len(w) + 2] for row, w in zip(logits, written, strict=True)]).clone()


@torch.inference_mode()
def _sample(listener: Listener, model: Any, file: Path) -> dict[str, torch.Tensor]:
    features = listener.features([file])
    (tokens,) = listener.write(model, model.model.encoder(features))
    return {"input_features": features, "decoder_input_ids": torch.tensor([[START, NO_TIMESTAMPS, *tokens]])}


def _recordings() -> tuple[dict[str, str], dict[str, Path]]:
    """Texts and files by name."""
    listed = assets.debian_files(assets.TRANSCRIPTS) / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    texts = {}
    for line in gzip.decompress(listed.read_bytes()).decode().splitlines():
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            texts[name.strip()] = text.strip()
    folder = assets.debian_files(assets.SPEECH) / "usr/share/asterisk/sounds/en_US_f_Allison"
    return texts, {str(file.relative_to(folder).with_suffix("")): file for file in sorted(folder.rglob("*.wav"))}


def _length(file: Path) -> float:
    with wave.open(str(file)) as recording:
        return recording.getnframes() / recording.getframerate()
