"""The interface of engines that evaluate the Rego bundle, their errors, and the strict parser of their results."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, cast, get_args

import orjson
from pydantic import ValidationError

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.registry import ApprovalClass
from ringfence.rego.bundle import Bundle

ISSUANCE = "data.ringfence.issuance.decision"
"""The entry point that decides on credential requests."""
ACTION = "data.ringfence.action.decision"
"""The entry point that decides on a single action of an agent."""
CEILING = "data.ringfence.ceiling.decision"
"""The entry point that names the forbidden combinations of a ceiling. It decides nothing."""

_FIELDS = frozenset({"allow", "deny", "approvals", "max_ttl_s", "notes"})
_CLASSES = frozenset(get_args(ApprovalClass))


class PolicyFailedError(RingfenceError):
    """The bundle gave no result, or an invalid one. The request is denied."""

    code = Code.POLICY_INVALID


class PolicyTimeoutError(PolicyFailedError):
    """The result did not come in time."""

    code = Code.POLICY_TIMEOUT


class PolicyUnavailableError(PolicyFailedError):
    """No engine can evaluate the bundle now."""

    code = Code.POLICY_UNAVAILABLE


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """The result of the bundle. It can deny, ask for approvals, and shorten the TTL; it can never widen anything."""

    allow: bool
    deny: tuple[Reason, ...]
    approvals: tuple[ApprovalClass, ...]
    max_ttl_s: int
    notes: tuple[Reason, ...] = ()
    """Remarks for the people who approve; they do not affect the decision."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of the bundle, and the revision of the bundle that gave it."""

    result: PolicyResult
    revision: str


class PolicyEngine(Protocol):
    """Evaluates one bundle at a time."""

    @property
    def revision(self) -> str: ...

    async def start(self) -> None:
        """Get ready to evaluate.

        An engine that compiles the bundle itself raises BundleError if it does not compile, or fails its tests.
        """
        ...

    async def use(self, bundle: Bundle) -> None:
        """Put another bundle in force. Raises BundleError as `start` does; the old bundle then stays in force."""
        ...

    async def evaluate(self, input_json: bytes) -> Answer:
        """Evaluate an input (JSON). Raises PolicyFailedError if there is no valid result: the caller has to deny."""
        ...

    async def close(self) -> None:
        """Release all resources. Nothing can be evaluated afterwards."""
        ...


@lru_cache(maxsize=1024)
def read_result(answer: str | bytes) -> PolicyResult:
    """Parse an engine's result (JSON) strictly. Raises PolicyFailedError if it has any other shape.

    No field has a default: a list of approvals that got lost must not read as "no approval needed". Most results
    repeat, so they are cached.
    """
    try:
        value = orjson.loads(answer)
    except ValueError:
        raise PolicyFailedError("the policy bundle did not answer in JSON") from None
    return result_of(value)


def result_of(value: object) -> PolicyResult:
    """`read_result` for a result that is already parsed."""
    if not isinstance(value, dict):
        raise PolicyFailedError(f"the policy bundle's decision is {_kind(value)}, not an object")
    if unknown := sorted(value.keys() - _FIELDS):
        raise PolicyFailedError(
            f"the policy bundle's decision has the unknown field {unknown[0][:80]!a}, which may limit something: leave "
            f"it out, or upgrade; it has {', '.join(sorted(_FIELDS))}"
        )
    allow, deny, approvals, max_ttl_s = (value.get(k) for k in ("allow", "deny", "approvals", "max_ttl_s"))
    if not isinstance(allow, bool):
        raise PolicyFailedError(f"`allow` of the policy bundle's decision is {_kind(allow)}, not a boolean")
    if not isinstance(approvals, list) or not all(isinstance(a, str) and a in _CLASSES for a in approvals):
        raise PolicyFailedError(
            f"`approvals` of the policy bundle's decision is no list of {', '.join(sorted(_CLASSES))}"
        )
    if not isinstance(max_ttl_s, int) or isinstance(max_ttl_s, bool):
        raise PolicyFailedError(
            f"`max_ttl_s` of the policy bundle's decision is {_kind(max_ttl_s)}, not a whole number"
        )
    classes = cast("tuple[ApprovalClass, ...]", tuple(approvals))
    notes = _reasons("notes", value.get("notes", []))
    return PolicyResult(allow, _reasons("deny", deny), classes, max_ttl_s, notes)


def _reasons(name: str, entries: object) -> tuple[Reason, ...]:
    if not isinstance(entries, list):
        raise PolicyFailedError(f"`{name}` of the policy bundle's decision is {_kind(entries)}, not a list")
    try:
        return tuple(Reason.model_validate_json(orjson.dumps(entry)) for entry in entries)
    except ValidationError:
        raise PolicyFailedError(
            f"an entry of `{name}` of the policy bundle's decision is no {{code, message, permission?, side?}}"
        ) from None


def _kind(value: object) -> str:
    if value is None or value == "<undefined>":  # how regorus writes that no rule applied
        return "undefined"
    return type(value).__name__
