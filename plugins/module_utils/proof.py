"""The proof that a release's memory holds: a prompt as long as its context, once per release.

An engine reserves its memory at start, and what it forgot shows when a prompt fills the context: only then is
the plan proven. The prompt is as long as the context of one slot, or as what prefills in ``proof_s`` seconds
at the rate measured first, which is a shorter proof and called so; where there is time for more, as many
slots as there is time for are filled at once.
"""

from __future__ import annotations

import string
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Optional

from .errors import FleetfitError
from .gate import (
    CHAT_PATH,
    PROBE_TIMEOUT_S,
    Gate,
    GateSpec,
    RefusedError,
    Streamed,
    Talk,
    UnitState,
    classify,
    read_log,
    read_stream,
    slot_context_tokens,
)

KINDS = ("llama_cpp", "vllm")
# Words that every tokenizer knows; the prompt is one such line many times, so that its tokens grow evenly.
LINE = "one two three four five six seven eight nine ten\n"
# Each prompt begins with another letter, so that no cache of prompts has its beginning.
LABELS = string.ascii_uppercase
# The prompt is shorter than the context by the answer and by this many lines, whose tokens were not counted.
ANSWER_TOKENS = 4
SLACK_LINES = 1
# Two prompts tell the tokens of a line; the longer one (about 300 tokens) tells the speed too.
FIRST_LINES, SECOND_LINES = 2, 26
# A longer prompt is measured where the speed of a short one would shorten the proof, but not for long.
GROWTH = 8
PROBE_SHARE = 0.1
# The rate falls with the length of a prompt: attention reads all that was before. Seen: to a half.
SLOWEST_FACTOR = 4.0


@dataclass(frozen=True)
class Scale:
    """How the tokens of a prompt grow with its lines: ``fixed`` with the chat template, ``per_line``."""

    fixed: float
    per_line: float

    def tokens(self, lines: int) -> int:
        """Return the tokens of a prompt of ``lines`` lines."""
        return round(self.fixed + lines * self.per_line)

    def lines(self, tokens: float) -> int:
        """Return the most lines that surely stay within ``tokens``."""
        return max(int((tokens - self.fixed) / self.per_line) - SLACK_LINES, 1)


def prompt_text(label: str, lines: int) -> str:
    """Return a prompt that begins with its own ``label``."""
    return f"Text {label}.\n{LINE * lines}How many numbers are in a line of this text?"


def scale_of(first: tuple[int, int], second: tuple[int, int]) -> Optional[Scale]:
    """Return the scale from two (lines, tokens), None where the tokens do not grow as text does."""
    per_line = (second[1] - first[1]) / (second[0] - first[0])
    # A line has ten words: fewer tokens than words means that the engine cuts prompts.
    if per_line < 10:
        return None
    return Scale(first[1] - first[0] * per_line, per_line)


def size_of_proof(
    context_tokens: int, slots: int, prefill_tokens_per_s: float, proof_s: float
) -> tuple[int, int, bool]:
    """Return (tokens of the prompt, prompts at once, whether time shortens it) for a proof in ``proof_s``."""
    full = context_tokens - ANSWER_TOKENS
    can = int(prefill_tokens_per_s * proof_s)
    if can < full:
        return can, 1, True
    return full, max(1, min(slots, can // full, len(LABELS))), False


def proof_text(proof: Optional[Mapping[str, Any]]) -> str:
    """Return what a proof shows, in words: what was proven and, if it is less than all, how much less."""
    if not proof:
        return "memory not proven by a long prompt"
    many = f"{proof['slots']} prompts of" if proof["slots"] > 1 else "a prompt of"
    what = f"{many} {proof['prompt_tokens']:,} tokens"
    took = f"{proof['seconds']:.1f} s, {round(proof['prefill_tokens_per_s']):,} tokens/s"
    if proof["shortened"]:
        return (
            f"memory proven in part: {what} of a context of {proof['of_tokens']:,}, as much as "
            f"prefills in {proof['limit_s']:.0f} s ({took})"
        )
    slots = (
        "all slots at once"
        if proof["slots"] == proof["of_slots"]
        else f"{proof['slots']} of {proof['of_slots']} slots"
    )
    return f"memory proven: {what}, the whole context of {slots} ({took})"


class Proof:
    """The proof of one release, asked for after its gate has passed."""

    def __init__(self, gate: Gate) -> None:
        """Ask the service of ``gate``, which has been waited for or is prepared."""
        self.gate = gate
        self.spec = gate.spec
        self.labels = iter(LABELS + LABELS.lower())
        self.tried: dict[str, Any] = {}

    def run(self, ready: Mapping[str, Any]) -> dict[str, Any]:
        """Return the gate result ``ready`` with its proof, or the failure that the proof was."""
        begun_at = time.time()
        result = self.gate.attempt(self._prove, "a long prompt")
        if result["ok"]:
            proof = {"ok": True, **result["proof"]}
            return {**ready, "message": f"{ready['message']}; {proof_text(proof)}", "proof": proof}
        if result["state"] in ("wrong_answer", "hung"):
            # An engine that lives on says only in its log that memory ran out.
            state, cause = classify([*read_log(self.spec.service, begun_at)], UnitState())
            if state == "out_of_memory":
                result = self.gate.failed(state, cause)
        size = f" of {self.tried['prompt_tokens']:,} tokens" if self.tried else ""
        message = f"it answered a short prompt and failed at a long one{size}: {result['message']}"
        return {**result, "message": message, "proof": {"ok": False, **self.tried}}

    def _prove(self) -> dict[str, Any]:
        talk = Talk(self.spec, self.gate.key)
        context, slots = self._shape(talk)
        scale, asked, longest = self._measure(talk, context)
        rate = _rate(longest)
        tokens, streams, shortened = size_of_proof(context, slots, rate, self.spec.proof_s)
        lines = max(scale.lines(tokens), asked)
        self.tried = {
            "prompt_tokens": scale.tokens(lines),
            "of_tokens": context,
            "slots": streams,
            "of_slots": slots,
            "shortened": shortened,
            "limit_s": self.spec.proof_s,
        }
        expected_s = streams * self.tried["prompt_tokens"] / rate
        self.gate.limit_s = self.spec.timeout_s + SLOWEST_FACTOR * expected_s
        if shortened and lines == asked:
            # On a slow host what was asked to measure the speed took all the time that a proof may take.
            answers, seconds = [longest], longest.seconds
        else:
            begun = time.monotonic()
            # The requests of one prompt each are under way at once; the first failure is the proof's.
            with ThreadPoolExecutor(max_workers=streams) as pool:
                labels = [next(self.labels) for _ in range(streams)]
                answers = list(pool.map(lambda label: self._ask(talk, label, lines, ANSWER_TOKENS), labels))
            seconds = time.monotonic() - begun
        counted = [self._counted(answer) for answer in answers]
        if min(counted) < scale.tokens(lines - SLACK_LINES):
            raise RefusedError(
                "wrong_settings",
                f"it counted {min(counted):,} tokens in a prompt of {scale.tokens(lines):,}: it cuts prompts",
            )
        prefill_s = max(answer.seconds if answer.first_s is None else answer.first_s for answer in answers)
        return {
            "ok": True,
            "proof": {
                **self.tried,
                "prompt_tokens": min(counted),
                "seconds": round(seconds, 2),
                "prefill_tokens_per_s": round(sum(counted) / max(prefill_s, 1e-3), 1),
                "proven_at": time.time(),
            },
        }

    def _shape(self, talk: Talk) -> tuple[int, int]:
        """Return (context per slot in tokens, slots): of the release's settings, else of the engine's word."""
        settings: Mapping[str, Any] = self.spec.settings
        if self.spec.kind == "llama_cpp":
            context, slots = slot_context_tokens(settings), settings.get("slots")
            if context is None:
                props = talk.ask_json("GET", "/props", None, token=self.gate.key, timeout_s=PROBE_TIMEOUT_S)
                context = (props.get("default_generation_settings") or {}).get("n_ctx")
                slots = props.get("total_slots")
        else:
            context, slots = settings.get("max_model_len"), settings.get("max_num_seqs")
            if context is None:
                path = "/v1/models"
                models = talk.ask_json("GET", path, None, token=self.gate.key, timeout_s=PROBE_TIMEOUT_S)
                context = ((models.get("data") or [{}])[0]).get("max_model_len")
        if not isinstance(context, int) or context < 1:
            raise RefusedError("wrong_settings", f"its context is {context!r} tokens")
        return context, slots if isinstance(slots, int) and slots > 0 else 1

    def _measure(self, talk: Talk, context: int) -> tuple[Scale, int, Streamed]:
        """Return how tokens grow with lines, the lines of the longest prompt asked, and its answer."""
        first = self._ask(talk, next(self.labels), FIRST_LINES, 1)
        # A line has less than 25 tokens: the second prompt stays below half of the context, and in its time.
        in_time = int(_rate(first) * self.spec.proof_s / 25)
        lines = max(min(SECOND_LINES, context // 50, in_time), FIRST_LINES + 1)
        second = self._ask(talk, next(self.labels), lines, 1)
        scale = scale_of((FIRST_LINES, self._counted(first)), (lines, self._counted(second)))
        if scale is None:
            raise RefusedError(
                "wrong_settings",
                f"it counted {self._counted(first)} tokens in a prompt of {FIRST_LINES} lines and "
                f"{self._counted(second)} in one of {lines}: it cuts prompts",
            )
        longest = second
        while True:
            rate = _rate(longest)
            longer = scale.tokens(lines * GROWTH)
            enough = rate * self.spec.proof_s >= context - ANSWER_TOKENS
            if enough or longer > context // 2 or longer > rate * self.spec.proof_s * PROBE_SHARE:
                return scale, lines, longest
            lines *= GROWTH
            longest = self._ask(talk, next(self.labels), lines, 1)

    def _ask(self, talk: Talk, label: str, lines: int, max_tokens: int) -> Streamed:
        body = {
            "model": self.spec.model,
            "messages": [{"role": "user", "content": prompt_text(label, lines)}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        try:
            return read_stream(talk, CHAT_PATH, body, token=self.gate.key, timeout_s=self.gate.limit_s)
        except RefusedError as refusal:
            if refusal.status == 400 and self.tried:
                settings = f"its settings give each slot {self.tried['of_tokens']:,}"
                raise RefusedError("wrong_settings", f"{settings}, and {refusal.message}") from refusal
            raise

    @staticmethod
    def _counted(answer: Streamed) -> int:
        if answer.prompt_tokens is None:
            raise RefusedError("wrong_answer", "its answers do not tell how many tokens a prompt had")
        return answer.prompt_tokens


def _rate(answer: Streamed) -> float:
    """Return the prefill rate in tokens/s: the engine's own figure, else that to the first token."""
    if answer.prefill_tokens_per_s:
        return answer.prefill_tokens_per_s
    seconds = answer.seconds if answer.first_s is None else answer.first_s
    return (answer.prompt_tokens or 0) / max(seconds, 1e-3)


def is_due(spec: GateSpec, known: Optional[Mapping[str, Any]]) -> bool:
    """Return whether a release that is ready has still to be proven: once, and never the chat page."""
    return spec.kind in KINDS and spec.proof_s > 0 and not (known or {}).get("ok")


def prove(
    spec: GateSpec, ready: Mapping[str, Any], *, since: Optional[float], restarts: Optional[int]
) -> dict[str, Any]:
    """Prove a release that is ``ready`` (its gate result) and return that with ``proof``, or a failure.

    Never raises for what the service does wrong.
    """
    gate = Gate(spec, since=since, restarts=restarts)
    try:
        gate.prepare()
        return Proof(gate).run(ready)
    except FleetfitError as error:
        return {**gate.failed("refused", str(error)), "proof": {"ok": False}}
