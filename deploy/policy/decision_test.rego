package ringfence.issuance_test

import data.ringfence.fixture
import data.ringfence.issuance

test_the_good_request_is_allowed if {
	issuance.decision == {
		"allow": true,
		"deny": [],
		"approvals": [],
		"max_ttl_s": 3600,
		"notes": [],
	} with input as fixture.good
}

test_every_part_can_deny if {
	not issuance.decision.allow with input as fixture.with_value("/agent/status", "suspended")
	not issuance.decision.allow with input as fixture.with_value("/request/scope", [])
	not issuance.decision.allow with input as fixture.with_value("/request/ttl_s", 3601)
	not issuance.decision.allow with input as fixture.wanting(["pull", "run-ci"], ["web"])
}

test_all_reasons_are_given if {
	patched := json.patch(fixture.good, [
		{"op": "replace", "path": "/agent/status", "value": "suspended"},
		{"op": "replace", "path": "/request/ttl_s", "value": 7200},
	])
	codes := fixture.codes(issuance.decision.deny) with input as patched
	codes == {"agent_suspended", "ttl_too_long"}
}

test_the_past_is_asked_about_too if {
	settled := fixture.with_value("/agent/registered_at_s", -1000000)
	issuance.decision.approvals == ["sponsor"] with input as settled
	fixture.codes(issuance.decision.notes) == {"first_use"} with input as settled
}

test_approvals_are_passed_on if {
	issuance.decision.approvals == ["sponsor"] with input as fixture.wanting(["deploy"], ["env/production/web"])
}

# Whatever is missing from the input, nothing is allowed for want of it.
test_missing_input_allows_nothing if {
	every part in ["now_s", "request", "agent", "sponsor", "task", "user", "target", "lacking", "held", "history"] {
		not issuance.decision.allow with input as fixture.without(part)
	}
	not issuance.decision.allow with input as {}
}
