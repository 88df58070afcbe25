package ringfence.limits_test

import data.ringfence.fixture
import data.ringfence.limits

test_good_request_is_not_denied if {
	count(limits.deny) == 0 with input as fixture.good
	limits.max_ttl_s == 3600 with input as fixture.good
}

test_an_hour_and_no_longer if {
	count(limits.deny) == 0 with input as fixture.with_value("/request/ttl_s", 3600)
	"ttl_too_long" in denied with input as fixture.with_value("/request/ttl_s", 3601)
}

test_a_life_that_is_not_known if {
	"ttl_too_long" in denied with input as fixture.without("request/ttl_s")
	"ttl_too_long" in denied with input as fixture.with_value("/request/ttl_s", null)
}

test_the_target_allows_less if limits.max_ttl_s == 60 with input as fixture.with_value("/target/max_ttl_s", 60)

test_the_target_cannot_allow_more if {
	limits.max_ttl_s == 3600 with input as fixture.with_value("/target/max_ttl_s", 86400)
}

test_the_task_ends_before if limits.max_ttl_s == 120 with input as fixture.with_value("/task/not_after", 1120)

test_the_task_has_ended if "ttl_beyond_task" in denied with input as fixture.with_value("/task/not_after", 1000)

# A person who approves an hour later approves the life that was shown, not what is left of it.
test_the_life_does_not_shrink_while_somebody_thinks if {
	limits.max_ttl_s == 3600 with input as fixture.with_value("/now_s", 8000)
}

denied := fixture.codes(limits.deny)
