package ringfence.history_test

import data.ringfence.fixture
import data.ringfence.history

test_new_agent_needs_no_approval if {
	asked == set() with input as fixture.good
	asked == set() with input as registered(1000 - 604799)
}

test_the_first_use_of_a_target if {
	asked == {"first_use"} with input as registered(1000 - 604800)
	history.required == {"sponsor"} with input as registered(1000 - 604800)
}

test_an_agent_that_has_been_there_since_nobody_knows_when if {
	asked == {"first_use"} with input as fixture.without("agent/registered_at_s")
}

test_used_or_held_permission_is_no_first_use if {
	asked == set() with input as settled(["read"], {"read": {}})
	asked == set() with input as settled(["list"], {"read": {}})
	asked == set() with input as fixture.holding(registered(-1000000), "platform", ["list"])
}

test_a_lease_at_another_target_is_no_use_of_this_one if {
	asked == {"first_use"} with input as fixture.holding(registered(-1000000), "elsewhere", ["read"])
}

test_the_first_change_at_a_target_that_was_read if {
	asked == {"first_use"} with input as settled(["deploy"], {"read": {}})
	asked == set() with input as settled(["deploy"], {"read": {}, "deploy": {}})
	asked == set() with input as fixture.holding(settled(["deploy"], {}), "platform", ["deploy"])
	asked == {"first_use"} with input as fixture.holding(settled(["deploy"], {}), "platform", ["read"])
}

test_a_ceiling_far_wider_than_its_use if {
	asked == {"ceiling_too_wide"} with input as wide("deploy", 12, 14)
	asked == set() with input as wide("read", 12, 14)
	asked == set() with input as wide("deploy", 11, 12)
	asked == set() with input as wide("deploy", 12, 15)
	history.required == {"sponsor"} with input as wide("deploy", 12, 14)
}

test_a_ceiling_is_compared_with_a_whole_month if {
	early := json.patch(wide("deploy", 12, 14), [{"op": "replace", "path": "/agent/registered_at_s", "value": 1000 - 2591999}])
	asked == set() with input as early
}

test_a_past_that_nobody_knows if {
	denied == set() with input as fixture.good
	every part in ["history", "history/used", "history/granted", "history/unused"] {
		denied == {"history_unknown"} with input as fixture.without(part)
	}
}

registered(at_s) := fixture.with_value("/agent/registered_at_s", at_s)

# An agent that has been there for long wants these verbs at the platform, where it used those.
settled(verbs, used) := json.patch(fixture.wanting(verbs, ["web"]), [
	{"op": "replace", "path": "/agent/registered_at_s", "value": 1000 - 2592000},
	{"op": "replace", "path": "/history/used", "value": {"platform": used}},
])

wide(verb, unused, granted) := json.patch(settled([verb], {verb: {}}), [
	{"op": "replace", "path": "/history/unused", "value": unused},
	{"op": "replace", "path": "/history/granted", "value": granted},
])

asked := fixture.codes(history.notes)

denied := fixture.codes(history.deny)
