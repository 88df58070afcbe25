package ringfence.delivery_test

import data.ringfence.delivery
import data.ringfence.fixture

test_revocable_credential_may_live_long if {
	count(delivery.deny) == 0 with input as lasting("instant", 3600)
	count(delivery.deny) == 0 with input as lasting("session", 3600)
}

test_irrevocable_credential_lives_five_minutes_at_most if {
	count(delivery.deny) == 0 with input as lasting("ttl", 300)
	"not_recallable" in fixture.codes(delivery.deny) with input as lasting("ttl", 301)
}

test_a_gateway_may_use_it_for_longer if {
	count(delivery.deny) == 0 with input as for_the_gateway(lasting("ttl", 3600))
}

test_lifetime_after_limits_is_checked if {
	count(delivery.deny) == 0 with input as json.patch(lasting("ttl", 3600), [{"op": "replace", "path": "/target/max_ttl_s", "value": 300}])
	count(delivery.deny) == 1 with input as json.patch(lasting("ttl", 3600), [{"op": "replace", "path": "/target/max_ttl_s", "value": 301}])
}

test_unknown_revocability_is_irrevocable if {
	unknown := json.remove(lasting("ttl", 301), ["target/revocability"])
	count(delivery.deny) == 1 with input as unknown
	count(delivery.deny) == 1 with input as lasting("at will", 301)
}

test_the_message_is_there_without_a_target if {
	some denial in delivery.deny with input as json.remove(fixture.good, ["target"])
	contains(denial.message, "a credential for unknown")
}

test_a_static_secret_is_never_handed_out if {
	every given in [static, json.remove(fixture.good, ["target/enforced_by"])] {
		fixture.codes(delivery.deny) == {"delivery_gateway_only"} with input as given
		count(delivery.deny) == 0 with input as for_the_gateway(given)
	}
}

test_a_denial_says_what_to_ask_for if {
	every given in [static, lasting("ttl", 301)] {
		messages := {denial.message | some denial in delivery.deny} with input as given
		every message in messages {
			contains(message, "--delivery gateway")
		}
	}
}

static := fixture.with_value("/target/enforced_by", "gateway")

lasting(revocability, ttl_s) := json.patch(fixture.good, [
	{"op": "replace", "path": "/target/revocability", "value": revocability},
	{"op": "replace", "path": "/request/ttl_s", "value": ttl_s},
])

for_the_gateway(given) := json.patch(given, [{"op": "replace", "path": "/request/delivery", "value": "gateway"}])
