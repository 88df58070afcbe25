package ringfence.identity_test

import data.ringfence.fixture
import data.ringfence.identity

test_good_request_is_not_denied if {
	count(identity.deny) == 0 with input as fixture.good
}

test_a_suspended_agent if {
	"agent_suspended" in denied with input as fixture.with_value("/agent/status", "suspended")
}

test_an_agent_without_a_status if "agent_unknown" in denied with input as fixture.without("agent/status")

test_a_disabled_sponsor if {
	"agent_orphaned" in denied with input as fixture.with_value("/sponsor/status", "disabled")
}

test_a_sponsor_who_lost_the_role if {
	"agent_orphaned" in denied with input as fixture.with_value("/sponsor/roles", ["auditor"])
}

test_sponsor_of_another_agent if {
	"agent_orphaned" in denied with input as fixture.with_value("/sponsor/user_id", "petra")
}

test_no_sponsor_at_all if "agent_orphaned" in denied with input as fixture.without("sponsor")

test_a_task_that_was_ended if "task_ended" in denied with input as fixture.with_value("/task/status", "ended")

test_a_task_whose_time_is_over if "task_ended" in denied with input as fixture.with_value("/task/not_after", 1000)

test_a_task_of_another_agent if {
	"task_other_agent" in denied with input as fixture.with_value("/task/agent_id", "review-bot")
}

test_another_task_than_the_one_asked_for if {
	"task_other_agent" in denied with input as fixture.with_value("/request/task_id", "another")
}

test_a_disabled_user if "user_disabled" in denied with input as fixture.with_value("/user/status", "disabled")

test_another_user_than_the_tasks if {
	"user_disabled" in denied with input as fixture.with_value("/user/user_id", "mallory")
}

test_a_removed_target if "target_removed" in denied with input as fixture.with_value("/target/status", "removed")

test_empty_input_denies_every_party if {
	denied == {
		"agent_unknown", "agent_orphaned", "task_ended",
		"task_other_agent", "user_disabled", "target_removed",
	} with input as {}
}

denied := fixture.codes(identity.deny)
