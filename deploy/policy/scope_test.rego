package ringfence.scope_test

import data.ringfence.fixture
import data.ringfence.scope

lack := {
	"code": "beyond_scope",
	"message": "the task does not allow deploy on env/production/web at platform",
	"permission": {"target": "platform", "verbs": ["deploy"], "resources": ["env/production/web"]},
	"side": "task",
}

test_good_request_is_not_denied if count(scope.deny) == 0 with input as fixture.good

test_excess_found_by_the_rule_is_repeated_whole if {
	found := [denial | some denial in scope.deny] with input as fixture.with_value("/lacking", [lack])
	found == [lack]
}

test_a_scope_that_nobody_checked if {
	"scope_unchecked" in fixture.codes(scope.deny) with input as fixture.without("lacking")
}

test_a_request_for_nothing if {
	"scope_empty" in fixture.codes(scope.deny) with input as fixture.with_value("/request/scope", [])
}

test_a_request_for_two_targets if {
	other := {"target": "database", "verbs": ["read"], "resources": ["**"]}
	wanted := array.concat(fixture.good.request.scope, [other])
	"several_targets" in fixture.codes(scope.deny) with input as fixture.with_value("/request/scope", wanted)
}
