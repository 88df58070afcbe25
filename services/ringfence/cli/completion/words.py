"""Words that may stand in places whose type is a text: services, roles, kinds of credentials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args


def words_of(path: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return the words by placeholder or by option, for the options of one command."""
    match tuple(path):
        case ("dev",):
            from ringfence.client.admin.trust_setup import ON_DEMAND

            return {"SERVICE": tuple(ON_DEMAND)}
        case ("serve",):
            from ringfence.client.admin.trust_setup import BY_NAME, ON_DEMAND, SERVICE_ROLES

            return {"SERVICE...": (*SERVICE_ROLES, *ON_DEMAND, *BY_NAME, "sign-page")}
        case ("init",):
            from ringfence.client.admin.trust_setup import ON_DEMAND, SERVICE_ROLES

            return {
                "--add-service": tuple(ON_DEMAND),
                "--rotate-service": (*SERVICE_ROLES, *ON_DEMAND),
                "USE": ("users", "instances"),
            }
        case ("user", _):
            from ringfence.messages.registry import Role

            return {"ROLE": get_args(Role)}
        case ("target", "add"):
            from ringfence.cli.commands.target_templates import TEMPLATES
            from ringfence.model.target_settings import CREDENTIAL_KINDS

            return {"--backend": tuple(CREDENTIAL_KINDS), "--template": tuple(TEMPLATES)}
        case ("request",) | ("release",) | ("mcp", "serve"):
            return {"SOURCE": ("file:", "github", "gcp")}
        case ("completion",):
            return {"SHELL": ("bash", "zsh", "fish")}
    return {}
