package ringfence.action_test

import data.ringfence.action
import data.ringfence.fixture

test_the_good_action_is_allowed if {
	action.decision == {
		"allow": true,
		"deny": [],
		"approvals": [],
		"max_ttl_s": 5,
	} with input as fixture.action
}

test_a_lease_that_ended if {
	denied == {"lease_ended"} with input as changed("/lease/status", "ending")
	denied == {"lease_ended"} with input as changed("/lease/deadline", 1000)
}

test_a_lease_of_another_agent if denied == {"lease_other_agent"} with input as changed("/lease/agent_id", "review-bot")

test_another_target if denied == {"other_target"} with input as changed("/action/target_id", "database")

test_a_lease_for_another_task if denied == {"task_other_agent"} with input as changed("/lease/task_id", "another")

test_a_suspended_agent if denied == {"agent_suspended"} with input as changed("/agent/status", "suspended")

test_excess_found_by_the_rule_is_repeated_whole if {
	lack := {"code": "beyond_scope", "message": "the lease does not allow deploy", "side": "lease"}
	found := action.decision.deny with input as changed("/lacking", [lack])
	found == [lack]
}

test_an_action_that_nobody_checked if {
	unchecked := json.remove(fixture.action, ["lacking"])
	denied == {"scope_unchecked"} with input as unchecked
}

test_not_beyond_the_lease if {
	decision := action.decision with input as changed("/lease/deadline", 1002)
	decision.max_ttl_s == 2
}

test_no_more_in_a_minute_than_a_task_may_do if {
	denied == set() with input as changed("/earlier/last_minute", 5999)
	denied == {"rate_exceeded"} with input as changed("/earlier/last_minute", 6000)
	denied == {"rate_exceeded"} with input as changed("/earlier/last_minute", null)
}

test_missing_input_allows_nothing if {
	every part in ["now_s", "action", "lease", "agent", "sponsor", "task", "user", "target", "lacking", "earlier"] {
		missing := json.remove(fixture.action, [part])
		not action.decision.allow with input as missing
	}
	not action.decision.allow with input as {}
}

test_a_verb_that_is_marked_waits_for_a_person if {
	decision := action.decision with input as marked([{"verb": "read", "floor": "none", "ask": "sponsor"}])
	decision.approvals == ["sponsor"]
	decision.allow
}

test_no_other_verb_waits if {
	decision := action.decision with input as marked([{"verb": "merge", "ask": "sponsor"}, {"verb": "read"}])
	decision.approvals == []
	decision.allow
}

test_denied_action_stays_denied_with_a_verb_floor if {
	suspended := json.patch(
		marked([{"verb": "read", "ask": "operator"}]),
		[{"op": "replace", "path": "/agent/status", "value": "suspended"}],
	)
	decision := action.decision with input as suspended
	not decision.allow
}

marked(verbs) := json.patch(fixture.action, [{"op": "add", "path": "/target/verbs", "value": verbs}])

changed(path, value) := json.patch(fixture.action, [{"op": "replace", "path": path, "value": value}])

denied := fixture.codes(action.decision.deny)
