"""A trust folder as it was made before there were shared signals."""

from __future__ import annotations

from ringfence.client.admin.trust_setup import TrustFolder, load_root_and_bundle, sign_next_bundle


def without_signals(folder: TrustFolder) -> None:
    """Take the service out of the bundle, and its key out of the folder."""
    root, bundle = load_root_and_bundle(folder)
    kept = tuple(service for service in bundle.services if "signals" not in service.roles)
    sign_next_bundle(folder, bundle, root, bundle.iat, services=kept)
    folder.service_key("signals").unlink()
