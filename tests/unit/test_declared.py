"""What policy is told of a target's credentials: what their backend declares, and the least where nobody does."""

from __future__ import annotations

from typing import Any, cast

import pytest

from ringfence.backends import BackendContext, built_in
from ringfence.backends.capabilities import BackendCapabilities
from ringfence.messages.registry import BackendSettings, TargetRecord, TargetState
from tools.schemas.examples import EXAMPLES

EXAMPLE = cast(TargetRecord, EXAMPLES[TargetRecord]).state


def target(kind: str, *, keys: bool = True) -> TargetState:
    update: dict[str, Any] = {"backend": BackendSettings(kind=kind)}
    update["keys"] = EXAMPLE.keys or cast(Any, EXAMPLES[TargetRecord]).state.keys if keys else ()
    return EXAMPLE.model_copy(update=update)


BACKENDS = built_in(BackendContext("acme.example", "https://issuer.acme.example"))
declared = BackendCapabilities(BACKENDS)


def test_the_example_has_a_key() -> None:
    assert target("jwt").keys


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        ("jwt", True, ("instant", "target")),
        ("jwt", False, ("ttl", "target")),
        ("postgres", True, ("session", "target")),
        ("redis", False, ("session", "target")),
        ("ssh", True, ("session", "target")),
        ("http", False, ("instant", "gateway")),
        ("nobody-knows", True, ("ttl", "target")),
    ],
)
def test_declared_revocability_and_enforcement_per_kind(kind: str, keys: bool, said: tuple[str, str]) -> None:
    found = declared(target(kind, keys=keys))
    assert (found["revocability"], found["enforced_by"]) == said


def test_only_what_the_gateway_enforces_is_never_handed_out() -> None:
    (reason,) = declared.delivery_refusals(target("http"), "agent")
    assert reason.code == "delivery_gateway_only"
    assert declared.delivery_refusals(target("http"), "gateway") == ()
    for kind in ("jwt", "postgres", "nobody-knows"):
        assert declared.delivery_refusals(target(kind, keys=False), "agent") == ()


def test_target_with_gateway_floor_denies_delivery_to_agent() -> None:
    floored = target("jwt").model_copy(update={"delivery": "gateway"})
    (reason,) = declared.delivery_refusals(floored, "agent")
    assert reason.code == "delivery_gateway_only"
    assert "--delivery gateway" in reason.message
    assert declared.delivery_refusals(floored, "gateway") == ()


def test_a_backend_that_fails_counts_for_the_least(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        kind, enforced_by = "broken", "target"

        def revocability(self, target: TargetState) -> str:
            raise KeyError("oops")

    found = BackendCapabilities({"broken": cast(Any, Broken())})(target("broken"))
    assert found == {"revocability": "ttl", "enforced_by": "target"}
    assert "broken" in caplog.text
