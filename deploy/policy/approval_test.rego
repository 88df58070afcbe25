package ringfence.approval_test

import data.ringfence.approval
import data.ringfence.fixture

test_reading_staging_takes_nobody if approval.required == set() with input as fixture.good

test_reading_production_takes_nobody if {
	approval.required == set() with input as fixture.wanting(["read", "get-logs", "list:pods", "contents:read"], ["env/production/web"])
}

# The target's own floor asks for the sponsor where it wants one.
test_changing_staging_is_left_to_the_target if {
	approval.required == set() with input as fixture.wanting(["deploy"], ["env/staging/*"])
}

test_changing_production_takes_the_sponsor if {
	every resource in ["env/production/web", "prod/web", "production/web", "eu/prod/web/1"] {
		approval.required == {"sponsor"} with input as fixture.wanting(["deploy"], [resource])
	}
}

test_a_wildcard_over_production_counts_as_production if {
	every resource in ["**", "*/web", "env/*/web", "env/**", "env/prod*/web", "apps/*/web", "apps/prod*/web", "eu/**", "env/qa/prod*"] {
		approval.required == {"sponsor"} with input as fixture.wanting(["deploy"], [resource])
	}
}

test_a_wildcard_elsewhere_does_not if {
	every resource in ["env/qa/*/web", "environment/x/**", "eu/staging/*", "apps/web-*"] {
		approval.required == set() with input as fixture.wanting(["deploy"], [resource])
	}
}

test_one_change_among_much_reading_counts if {
	verbs := ["read", "list", "restart"]
	approval.required == {"sponsor"} with input as fixture.wanting(verbs, ["env/staging/web", "env/production/web"])
}

test_only_whole_words_are_reading if {
	every verb in ["readwrite", "listen", "getaway", "unread", "contents:readwrite", "contents-read"] {
		approval.required == {"sponsor"} with input as fixture.wanting([verb], ["env/production/web"])
	}
}

test_a_target_that_is_production if {
	permission := {"target": "production", "verbs": ["deploy"], "resources": ["web"]}
	approval.required == {"sponsor"} with input as fixture.with_value("/request/scope", [permission])
}
