"""The modules that decide, and the unit tests that are to find a mistake in each: they run in seconds."""

from __future__ import annotations

MODULES: dict[str, tuple[str, ...]] = {
    "model/scope/rule.py": ("test_rule.py", "test_limiting_fields.py"),
    "model/scope/scope.py": ("test_scope.py", "test_rule.py", "test_limiting_fields.py"),
    "model/scope/globs.py": ("test_globs.py",),
    "model/records/command_chain.py": (
        "test_chains.py", "test_command_chain_order.py", "test_delegation.py", "test_agent_keys.py",
        "test_id_token_consent.py", "test_provisioners.py", "test_directory.py", "test_transfers.py",
        "test_trust_root.py", "test_lifecycle.py", "test_user_keys.py", "test_key_history.py",
    ),
    "model/records/runs.py": ("test_runs.py", "refusals/test_model.py"),
    "model/records/user_keys.py": ("test_passkeys.py", "test_passkey_records.py"),
    "model/requests/run_orders.py": ("test_run_orders.py",),
    "model/records/key_proofs.py": ("test_user_keys.py", "test_key_history.py", "test_passkey_records.py"),
    "model/lifecycle/key_history.py": ("test_key_history.py", "test_user_keys.py", "test_approver_keys.py"),
    "model/leases/revocations.py": ("test_revocation_entitlement.py",),
    "model/leases/lifecycle.py": ("test_leases.py",),
    "model/audit_log/chain.py": ("test_chain_recovery.py",),
    "model/requests/approvals.py": (
        "test_approvals.py", "test_delegation.py", "test_limiting_fields.py", "test_approver_keys.py",
    ),
    "model/requests/approver_keys.py": (
        "test_approver_keys.py", "test_user_keys.py", "test_key_history.py", "refusals/test_model.py",
    ),
    "model/requests/facts.py": (
        "test_requests.py", "test_delegation.py", "test_approvals.py", "test_agent_keys.py",
        "test_limiting_fields.py", "test_runs.py", "test_run_orders.py",
    ),
    "model/http_targets.py": (
        "test_request_map.py", "test_mcp_rules.py", "test_target_templates.py", "test_limiting_fields.py",
    ),
    "kernel/crypto/claims.py": ("test_jws.py", "test_opening.py"),
    "kernel/crypto/jws.py": ("test_jws.py", "test_keys_and_seals.py", "test_opening.py", "test_passkeys.py"),
    "kernel/crypto/webauthn.py": ("test_passkeys.py",),
    "kernel/crypto/trust_store.py": (
        "test_trust_root.py", "test_keys_and_seals.py", "test_service_keys.py", "test_seal_keys.py",
        "test_runs.py", "test_run_orders.py", "test_origins.py",
    ),
    "policy/domain.py": ("test_policy_domain.py", "refusals/test_policy.py"),
    "gateway/domain.py": ("test_gateway_domain.py", "test_runs.py", "refusals/test_gateway.py"),
    "issuer/domain.py": (
        "test_issuer_approvals.py", "test_issuer_grants.py", "test_issuer_invariant.py", "test_issuer_leases.py",
        "test_issuer_limits.py", "test_issuer_passkeys.py", "test_issuer_records.py", "test_issuer_refusals.py",
        "test_issuer_request_times.py", "test_issuer_requests.py", "test_issuer_terms.py",
        "test_issuer_vouched_keys.py", "test_limiting_fields.py", "test_passkey_records.py", "test_runs.py",
        "refusals/test_issuer.py",
    ),
    "revoker/domain.py": ("test_revoker_domain.py",),
    "registry/domain.py": (
        "test_registry_domain.py", "test_delegation.py", "test_id_token_consent.py", "test_limiting_fields.py",
        "test_provisioners.py", "test_task_length.py", "test_transfers.py", "test_user_keys.py", "test_key_history.py",
        "refusals/test_registry.py",
    ),
    "audit/trail/chain_recovery.py": ("test_chain_recovery.py", "test_strays.py"),
    "client/resource_server/dpop_proofs.py": ("test_client_dpop.py",),
    "gateway/state/leases.py": ("test_gateway_leases.py",),
    "client/resource_server/verifier.py": ("test_client_verify.py", "test_client_dpop.py", "test_client_asgi.py"),
}  # fmt: skip
