"""Refusals by a data plane itself, before or after the decision, and the HTTP answer to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ringfence.gateway.contract import Verdict
from ringfence.kernel.http1.head import RequestRefusedError, answer_head, problem_answer

__all__ = ["AnswerVerdict", "RequestRefusedError", "answer_head", "problem_answer"]

AnswerVerdict = Callable[[Verdict], tuple[int, Mapping[str, str], bytes]]
"""Returns status, headers and body of the answer to a verdict that does not allow."""
