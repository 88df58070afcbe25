"""What `ringfence doctor` says of OPA, where the settings name one: does it answer, by the bundle that is here?"""

from __future__ import annotations

from collections.abc import AsyncIterator

from ringfence.cli.doctor.finding import Finding
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.settings import load

_WITHIN_MS = 3_000


async def opa_findings() -> AsyncIterator[Finding]:
    """Nothing where the embedded engine decides, or services cannot run here."""
    try:
        from ringfence.policy.settings import PolicySettings
        from ringfence.rego.bundle import load_bundle
        from ringfence.rego.engine import PolicyFailedError
        from ringfence.rego.opa import OpaEngine
        from ringfence.rego.settings import OpaSettings
    except ModuleNotFoundError:
        return
    url = load(OpaSettings).url
    if url is None:
        return
    try:
        bundle = load_bundle(load(PolicySettings).bundle)
        opa = OpaEngine(url, bundle, timeout_ms=_WITHIN_MS, connections=1)
        try:
            await opa.evaluate(b"{}")
        except PolicyFailedError:
            pass  # no answer to an empty question is one by the right bundle all the same
        finally:
            await opa.close()
    except RingfenceError as error:
        yield Finding("OPA", "bad", str(error))
        return
    yield Finding("OPA", "good", f"{url} answers by bundle {bundle.revision[:12]}, which is the one here")
