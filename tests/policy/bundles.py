"""Bundles made by tests."""

from __future__ import annotations

from pathlib import Path

from ringfence.rego.bundle import Bundle, load_bundle

ALLOWS = 'decision := {"allow": true, "deny": [], "approvals": [], "max_ttl_s": 60}\n'
"""Allows everything; the rule in code does not."""
EXPLODES = """
decision := {"allow": true, "deny": [], "approvals": [], "max_ttl_s": 60} if {
	not input.explode
}

decision := {"allow": true, "deny": [], "approvals": [], "max_ttl_s": count(slow)} if {
	input.explode == "time"
	slow := [i | some i in numbers.range(1, 1000); count(numbers.range(i, 10000000)) > 0]
}

decision := {"allow": true, "deny": [], "approvals": [], "max_ttl_s": count(a8)} if {
	input.explode == "memory"
	a0 := "aaaaaaaa"
	a1 := replace(a0, "a", "aaaaaaaaaaaaaaaa")
	a2 := replace(a1, "a", "aaaaaaaaaaaaaaaa")
	a3 := replace(a2, "a", "aaaaaaaaaaaaaaaa")
	a4 := replace(a3, "a", "aaaaaaaaaaaaaaaa")
	a5 := replace(a4, "a", "aaaaaaaaaaaaaaaa")
	a6 := replace(a5, "a", "aaaaaaaaaaaaaaaa")
	a7 := replace(a6, "a", "aaaaaaaaaaaaaaaa")
	a8 := replace(a7, "a", "aaaaaaaaaaaaaaaa")
}

decision := {"allow": true, "deny": [], "approvals": [], "max_ttl_s": count(found)} if {
	input.explode == "steps"
	found := {[a, b, c] | some a in numbers.range(1, 100); some b in numbers.range(1, 100); some c in [1, 2, 3]}
}
"""
"""Allows what does not say `explode`; what does never ends, takes all memory, or many steps."""


def write(folder: Path, rules: str, tests: str = "") -> Path:
    """A bundle of one file of rules in the package of the entry point, and one of tests."""
    folder.mkdir(exist_ok=True)
    (folder / "rules.rego").write_text(f"package ringfence.issuance\n\n{rules}")
    if tests:
        (folder / "rules_test.rego").write_text(
            f"package ringfence.issuance_test\n\nimport data.ringfence.issuance\n\n{tests}"
        )
    return folder


def made(folder: Path, rules: str, tests: str = "") -> Bundle:
    """The same, loaded."""
    return load_bundle(write(folder, rules, tests))
